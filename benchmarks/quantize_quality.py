"""What quantizing costs in perplexity: `tightfit quantize` beside llm-compressor.

usage: quantize_quality.py MODEL --peer PYTHON [--calibration FILE] [--record] ...

Every scheme and method is carried out by both, with the same calibration text and as many samples,
and one program judges both ([perplexity.py](peers/perplexity.py), transformers and
compressed-tensors). PYTHON is that of an environment with llm-compressor. The test text is
`pydoc_data.topics`, the language reference in every Python; the text to calibrate with is the
docstrings of the standard library, as `train_small.py --prepare` writes them.

A difference is that of the mean loss, in percent of perplexity, with the standard error of the mean
over the windows, which both are judged on. It does not know that rounding is a matter of luck, the
same in all windows: any disturbance of the weights moves the loss up or down. How far predictions
are from the original's (the mean Kullback-Leibler divergence) only grows with it, so that tells
methods apart. What was judged is kept in `--work` and not computed again, except with `--again`.
"""

import argparse
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from measure import RESULTS, record
from train_small import calibration, topics

HERE = Path(__file__).parent
ORIGINAL, OURS, THEIRS = "original", "tightfit", "llm-compressor"
DATA_FREE = ("rtn", "mse")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A scheme by a method; without a group size where there are no groups, or just one size."""

    scheme: str
    group_size: int | None = None
    method: str = "rtn"

    @property
    def label(self) -> str:
        group = f" g{self.group_size}" if self.group_size else ""
        return f"{self.scheme}{group} {self.method}"

    @property
    def needs_data(self) -> bool:
        return self.method not in DATA_FREE or self.scheme == "nvfp4"


def cases(groups: Sequence[int]) -> Iterator[Case]:
    """`groups` are the sizes that divide the model; the calibrated ones use the largest."""
    for scheme in ("fp8-tensor", "fp8-channel", "fp8-block", "int8"):
        yield Case(scheme=scheme)
    for scheme in ("w8a16", "w4a16", "w4a16-asym"):
        for group in groups if scheme != "w8a16" else groups[-1:]:
            yield Case(scheme=scheme, group_size=group)
    for scheme in ("nvfp4a16", "nvfp4", "mxfp4", "mxfp8"):
        yield Case(scheme=scheme)
    for scheme in ("fp8-channel", "int8", "nvfp4a16", "mxfp4"):
        yield Case(scheme=scheme, method="mse")
    for scheme in ("w4a16", "w4a16-asym"):
        for method in ("mse", "gptq", "awq"):
            yield Case(scheme=scheme, group_size=groups[-1], method=method)
    yield Case(scheme="w4a16", group_size=groups[0], method="gptq")
    for method in ("gptq", "smoothquant"):
        yield Case(scheme="int8", method=method)
    for scheme in ("nvfp4a16", "mxfp4"):
        yield Case(scheme=scheme, method="gptq")


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    model: Path
    work: Path
    peer: Path
    calibration: Path
    samples: int
    length: int
    windows: int

    @property
    def kept(self) -> Path:
        return self.work / "losses.json"

    def out(self, producer: str, case: Case) -> Path:
        return self.work / producer / re.sub(r"\W+", "-", case.label)

    def ours(self, case: Case) -> str | None:
        """Quantize; returns what went wrong."""
        command = [sys.executable, "-m", "tightfit", "quantize", str(self.model)]
        command += [str(self.out(OURS, case)), "--scheme", case.scheme, "--json"]
        if case.group_size:
            command += ["--group-size", str(case.group_size)]
        if case.method != "rtn":
            command += ["--method", case.method]
        if case.needs_data:
            command += ["--calibration", str(self.calibration)]
            command += ["--calibration-samples", str(self.samples)]
            command += ["--calibration-length", str(self.length)]
        environment = {**os.environ, "PYTHONPATH": str(HERE.parent / "src")}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if not done.returncode:
            return None
        told = (done.stderr or done.stdout).strip().splitlines()
        return " ".join(told[-3:])[:300] or f"exit {done.returncode}"

    def theirs(self, wanted: Iterable[Case]) -> Mapping[str, str]:
        """Quantize all in one process, because starting takes longer; returns what went wrong."""
        jobs = [
            {
                "label": case.label,
                "model": str(self.model),
                "out": str(self.out(THEIRS, case)),
                "scheme": case.scheme,
                "group_size": case.group_size,
                "method": case.method,
                "calibration": str(self.calibration),
                "samples": self.samples,
                "length": self.length,
            }
            for case in wanted
        ]
        path = self.work / "jobs.json"
        path.write_text(json.dumps(jobs))
        script = HERE / "peers" / "llm_compressor.py"
        lines = _lines("JOB", [str(self.peer), str(script), "--jobs", str(path)])
        return {line["label"]: line["error"] for line in lines if line["error"]}

    def judge(self, directories: Sequence[Path]) -> Iterator[dict[str, Any]]:
        text = self.work / "topics.txt"
        text.write_text(topics())
        script = HERE / "peers" / "perplexity.py"
        command = [str(self.peer), str(script), str(text), str(self.windows), str(self.model)]
        yield from _lines("RESULT", [*command, *map(str, directories)])


def _lines(mark: str, command: Sequence[str]) -> Iterator[dict[str, Any]]:
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(f"{mark} "):
                yield json.loads(line.removeprefix(mark))
    if process.returncode:
        raise SystemExit(f"{' '.join(command[:3])} exited with {process.returncode}")


def measure(bench: Bench, wanted: Sequence[Case], producers: Sequence[str]) -> None:
    """Add to the kept losses what is not there; checkpoints are deleted once they are judged."""
    kept: dict[str, Any] = json.loads(bench.kept.read_text()) if bench.kept.exists() else {}

    def keep(key: str, answer: Mapping[str, Any]) -> None:
        names = ("losses", "divergences", "dtype", "error")
        kept[key] = {name: answer.get(name) for name in names}
        bench.kept.write_text(json.dumps(kept))
        said = str(answer.get("error"))
        if losses := answer.get("losses"):
            said = f"{math.exp(mean(losses)):.3f} {mean(answer['divergences']):.5f}"
        print(f"{key:45} {said}", flush=True)

    for producer in producers:
        missing = [case for case in wanted if f"{producer} {case.label}" not in kept]
        # A few at a time: the checkpoints of all are more than many disks hold.
        for start in range(0, len(missing), 8):
            part = missing[start : start + 8]
            shutil.rmtree(bench.work / producer, ignore_errors=True)
            (bench.work / producer).mkdir(parents=True)
            if producer == OURS:
                failed = {c.label: said for c in part if (said := bench.ours(c)) is not None}
            else:
                failed = dict(bench.theirs(part))
            for label, said in failed.items():
                keep(f"{producer} {label}", {"error": said})
            done = {str(bench.out(producer, c)): c for c in part if c.label not in failed}
            for answer in bench.judge([Path(one) for one in done]) if done else ():
                case = done.get(answer["model"])
                keep(f"{producer} {case.label}" if case else ORIGINAL, answer)
            shutil.rmtree(bench.work / producer)


def row(case: Case, kept: Mapping[str, Any]) -> dict[str, Any]:
    """What both are at, their difference (negative: ours is better), or what failed."""
    found: dict[str, Any] = {"case": case.label}
    answers = {p: kept.get(f"{p} {case.label}", {"error": "not run"}) for p in (OURS, THEIRS)}
    for producer, answer in answers.items():
        found[producer] = {"error": answer["error"]}
        if losses := answer.get("losses"):
            found[producer] = {
                "perplexity": round(math.exp(mean(losses)), 4),
                "divergence": round(mean(answer["divergences"]), 6),
            }
    if all("perplexity" in found[producer] for producer in answers):
        for key, name in (("losses", "loss"), ("divergences", "divergence")):
            mine, other = answers[OURS][key], answers[THEIRS][key]
            apart = [a - b for a, b in zip(mine, other, strict=True)]
            error = stdev(apart) / math.sqrt(len(apart))
            found[f"{name}_difference"] = [round(mean(apart), 6), round(error, 6)]
    return found


def result(bench: Bench, wanted: Sequence[Case]) -> dict[str, Any]:
    kept = json.loads(bench.kept.read_text())
    return {
        "windows": len(kept[ORIGINAL]["losses"]),
        "calibration": f"{bench.samples} samples of {bench.length} tokens",
        ORIGINAL: round(math.exp(mean(kept[ORIGINAL]["losses"])), 4),
        "rows": [
            row(case, kept)
            for case in wanted
            if f"{OURS} {case.label}" in kept or f"{THEIRS} {case.label}" in kept
        ],
    }


def table(name: str, found: Mapping[str, Any]) -> str:
    lines = [
        f"### {name}",
        "",
        f"Unquantized: {found[ORIGINAL]:.3f}, over {found['windows']} windows of 512 tokens; "
        f"calibrated with {found['calibration']}.",
        "",
        f"| scheme and method | {OURS} | {THEIRS} | difference in % | divergence: {OURS} "
        f"| {THEIRS} | difference |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in found["rows"]:
        cells = [one["case"]]
        for key, digits in (("perplexity", 3), ("divergence", 4)):
            for producer in (OURS, THEIRS):
                value = one[producer].get(key)
                cells.append(_short(one[producer]) if value is None else f"{value:.{digits}f}")
            if key == "perplexity" and (pair := one.get("loss_difference")):
                cells.append(f"{100 * pair[0]:+.2f} ± {100 * pair[1]:.2f}")
            elif key == "divergence" and (pair := one.get("divergence_difference")):
                cells.append(f"{pair[0]:+.4f} ± {pair[1]:.4f}")
            else:
                cells.append("-")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _short(answer: Mapping[str, str]) -> str:
    told = re.sub(r"\s+", " ", answer["error"]).replace("|", "/")
    return told if len(told) < 60 else f"{told[:57]}..."


def write(models: Mapping[str, Any]) -> None:
    record("quantize_quality", {"models": models})
    head = [
        "# Perplexity after quantization",
        "",
        "`benchmarks/quantize_quality.py`: the same scheme and method by both, judged by one",
        "program. Test text: `pydoc_data.topics`; calibration text: docstrings of the standard",
        "library. Differences are of perplexity in percent, and of the mean divergence from the",
        "unquantized model's predictions in nats, ± the standard error over windows; negative:",
        f"{OURS} is better. Perplexity moves up or down with the luck of rounding, by a percent",
        "where nothing else differs; the divergence tells methods apart. `small` was trained by",
        "`train_small.py` and never quantized; others come from 4-bit files, and show correctness",
        "more than ranking.",
        "",
    ]
    tables = "\n\n".join(table(name, found) for name, found in models.items())
    (RESULTS / "quantize_quality.md").write_text("\n".join(head) + "\n" + tables + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--name", help="in the table; default: that of the directory")
    parser.add_argument("--peer", type=Path, required=True, help="python with llm-compressor")
    parser.add_argument("--work", type=Path, default=Path("/tmp/tightfit-quality"))
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--groups", default="32,64,128")
    parser.add_argument("--producers", default=f"{THEIRS},{OURS}")
    parser.add_argument("--only", default="", help="regular expression over the cases")
    parser.add_argument("--again", default="", metavar="REGEX", help="forget what matches")
    parser.add_argument("--record", action="store_true")
    arguments = parser.parse_args()
    name = arguments.name or arguments.model.name
    work = arguments.work / name
    work.mkdir(parents=True, exist_ok=True)
    text = arguments.calibration or work / "calibration.txt"
    if not text.exists():
        text.write_text(calibration())
    bench = Bench(
        model=arguments.model.resolve(),
        work=work,
        peer=arguments.peer,
        calibration=text,
        samples=arguments.samples,
        length=arguments.length,
        windows=arguments.windows,
    )
    if arguments.again and bench.kept.exists():
        kept = json.loads(bench.kept.read_text())
        rest = {k: v for k, v in kept.items() if not re.search(arguments.again, k)}
        bench.kept.write_text(json.dumps(rest))
    everything = [*cases([int(size) for size in arguments.groups.split(",")])]
    wanted = [case for case in everything if re.search(arguments.only, case.label)]
    measure(bench, wanted, [p for p in arguments.producers.split(",") if p])
    found = result(bench, everything)
    print(table(name, found))
    if arguments.record:
        path = RESULTS / "quantize_quality.json"
        models = json.loads(path.read_text())["models"] if path.exists() else {}
        write({**models, name: found})


if __name__ == "__main__":
    main()
