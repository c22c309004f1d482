"""What `tightfit quantize` costs beside llm-compressor's path without data, `model_free_ptq`.

usage: bench_quantize.py --peer PYTHON [--layers 8 36] [--schemes fp8-channel w4a16] [--record]

PYTHON is that of an environment with llm-compressor. Every command is a process of its own; each
round runs all of them once, in changing order, on the same source in the page cache and to a new
directory on the same disk. CPU seconds are those of the user and the system. Start-up is what the
same command costs for a model of 2 MB, so imports count for both alike; "without start-up" takes
it off.

The floor is reading the same bytes and writing as many as tightfit writes, with nothing between
(`cat` and `head`), and a sync, because tightfit's files are on disk when it ends. llm-compressor's
need not be. Its memory follows the largest file, so files are small here: a quarter of the model.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy
from bench_shard import ROOT, config, set_cache, write_model
from measure import RESULTS, observe, record, with_bytecode

OURS, THEIRS, FLOOR = "tightfit", "llm-compressor", "read and write"
GROUPED = ("w4a16", "w4a16-asym", "w8a16")


def gaussian() -> bytes:
    """16M bfloat16 numbers as weights have them, and three, so that no two matrices are alike."""
    values = numpy.random.default_rng(0).normal(0, 0.02, 2**24 + 3).astype(numpy.float32)
    return (values.view(numpy.uint32) >> 16).astype(numpy.uint16).tobytes()


def ours(source: Path, out: Path, scheme: str) -> list[str]:
    command = [sys.executable, "-m", "tightfit", "quantize", str(source), str(out)]
    return [*command, "--scheme", scheme, "--quiet"]


def theirs(peer: Path, source: Path, out: Path, scheme: str) -> list[str]:
    script = Path(__file__).parent / "peers" / "llm_compressor.py"
    group = ["128"] if scheme in GROUPED else []
    return [str(peer), str(script), str(source), str(out), scheme, *group]


def floor(source: Path, out: Path, written: int) -> list[str]:
    at = out / "out"
    script = (
        f"cat {source}/*.safetensors > /dev/null && mkdir {out} && "
        f"head -c {written} /dev/zero > {at} && sync {at}"
    )
    return ["sh", "-c", script]


def measure(
    command: Sequence[str], out: Path, environment: Mapping[str, str]
) -> tuple[dict[str, float], int]:
    """Seconds and bytes of one run, and how much it wrote."""
    os.sync()
    start = time.perf_counter()
    done = observe(command, environment, timeout=3600)
    wall = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    written = sum(path.stat().st_size for path in out.iterdir())
    shutil.rmtree(out)
    found = {"cpu_seconds": done.cpu_seconds, "peak_rss_mib": done.peak_rss_bytes / 2**20}
    return found | {"wall_seconds": wall}, written


Runs = dict[str, list[dict[str, float]]]


def start_ups(tiny: Path, scheme: str, peer: Path, rounds: int, environment: Any) -> Runs:
    """What both cost for a model of next to nothing; the first run of each compiles modules."""
    out, runs = tiny.parent / "out", Runs()
    for number in range(rounds + 1):
        for name, command in (
            (OURS, ours(tiny, out, scheme)),
            (THEIRS, theirs(peer, tiny, out, scheme)),
        ):
            found, _ = measure(command, out, environment)
            if number:
                runs.setdefault(f"{name} start-up", []).append(found)
    return runs


def compare(
    source: Path, scheme: str, peer: Path, rounds: int, begun: Runs, environment: Mapping[str, str]
) -> dict[str, Any]:
    out = source.parent / "out"
    commands = {
        OURS: ours(source, out, scheme),
        THEIRS: theirs(peer, source, out, scheme),
    }
    runs = Runs(begun)
    written = 0
    for number in range(rounds):
        for name in sorted(commands, reverse=bool(number % 2)):
            set_cache(source, warm=True)
            found, nbytes = measure(commands[name], out, environment)
            written = nbytes if name == OURS else written
            runs.setdefault(name, []).append(found)
            print(f"{scheme} {name}: {found}", file=sys.stderr, flush=True)
        set_cache(source, warm=True)
        found, _ = measure(floor(source, out, written), out, environment)
        runs.setdefault(FLOOR, []).append(found)
    return {"rounds": rounds, "written_bytes": written, **summary(runs)}


def summary(runs: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, Any]:
    """Medians and spread of each, and the ratios that count, round by round."""

    def spread(values: Sequence[float]) -> list[float]:
        return [round(v, 2) for v in (median(values), min(values), max(values))]

    rows = {
        name: {key: spread([one[key] for one in found]) for key in found[0]}
        for name, found in runs.items()
    }

    def ratio(key: str, base: str, of: str) -> list[float]:
        return spread([b[key] / m[key] for b, m in zip(runs[base], runs[of], strict=True)])

    def net(name: str) -> list[float]:
        begun = median(one["cpu_seconds"] for one in runs[f"{name} start-up"])
        return [one["cpu_seconds"] - begun for one in runs[name]]

    pairs = zip(net(THEIRS), net(OURS), strict=True)
    return {
        "rows": rows,
        "times_less_cpu": ratio("cpu_seconds", THEIRS, OURS),
        "times_less_cpu_without_start_up": spread([t / max(o, 0.01) for t, o in pairs]),
        "times_less_memory": ratio("peak_rss_mib", THEIRS, OURS),
        "times_less_wall": ratio("wall_seconds", THEIRS, OURS),
        "throughput_of_read_and_write": ratio("wall_seconds", FLOOR, OURS),
    }


def table(result: Mapping[str, Any]) -> str:
    lines = [
        f"Medians (lowest .. highest), {result['cores']} cores; net CPU is without start-up.",
        "",
    ]
    for size, schemes in result["models"].items():
        lines += [
            f"### {size}",
            "",
            "| | CPU s | net CPU s | peak RSS MiB | wall s |",
            "|---|---|---|---|---|",
        ]
        for scheme, found in schemes.items():
            rows = found["rows"]
            for name in (OURS, THEIRS, FLOOR):
                row, net = rows[name], "-"
                if begun := rows.get(f"{name} start-up"):
                    net = f"{row['cpu_seconds'][0] - begun['cpu_seconds'][0]:.1f}"
                memory = row["peak_rss_mib"][0]
                lines.append(
                    f"| {scheme}, {name} | {_cell(row['cpu_seconds'])} | {net} | {memory:.0f} | "
                    f"{_cell(row['wall_seconds'])} |"
                )
        lines += [
            "",
            "| | times less CPU | without start-up | times less memory | times faster "
            "| throughput of reading and writing |",
            "|---|---|---|---|---|---|",
        ]
        keys = ("cpu", "cpu_without_start_up", "memory", "wall")
        for scheme, found in schemes.items():
            cells = [_cell(found[f"times_less_{key}"]) for key in keys]
            cells.append(_cell(found["throughput_of_read_and_write"]))
            lines.append(f"| {scheme} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def _cell(spread: Sequence[float]) -> str:
    middle, low, high = spread
    return f"{middle:.2f} ({low:.2f} .. {high:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--peer", type=Path, required=True, help="python with llm-compressor")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 36], help="of 113 MB each")
    parser.add_argument("--schemes", nargs="+", default=["fp8-channel", "w4a16"])
    parser.add_argument("--directory", help="on the disk to measure; the default is for temporary")
    parser.add_argument("--record", action="store_true", help="write the result to results/")
    options = parser.parse_args()
    result: dict[str, Any] = {"cores": os.cpu_count(), "models": {}}
    kept = RESULTS / "quantize_cost.json"
    if options.record and kept.exists():
        # Sizes can be measured one by one.
        result["models"] = json.loads(kept.read_text())["models"]
    with tempfile.TemporaryDirectory(dir=options.directory) as place:
        work = Path(place)
        environment = with_bytecode(os.environ, work / "bytecode")
        environment["PYTHONPATH"] = str(ROOT / "src")
        content = gaussian()
        write_model(
            work / "tiny", config(256, 1, 512) | {"num_key_value_heads": 2}, content=content
        )
        begun = start_ups(
            work / "tiny", options.schemes[0], options.peer, options.rounds, environment
        )
        for layers in options.layers:
            source, document = work / "model", config(2048, layers, 32_000)
            file_bytes = (2 * 131e6 + layers * 113e6) / 4
            nbytes = write_model(source, document, content=content, file_bytes=int(file_bytes))
            files = len([*source.glob("*.safetensors")])
            size = f"{nbytes / 1e9:.1f} GB in {files} files"
            result["models"][size] = {
                scheme: compare(source, scheme, options.peer, options.rounds, begun, environment)
                for scheme in options.schemes
            }
            shutil.rmtree(source)
            if options.record:
                record("quantize_cost", result)
                (RESULTS / "quantize_cost.md").write_text(table(result))
    print(table(result), end="")


if __name__ == "__main__":
    main()
