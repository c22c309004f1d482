"""Tokens per second of the built-in runtime beside vLLM and transformers, for the same requests.

    python benchmarks/runtime_speed.py MODEL --vllm PYTHON --loads 256:100-1024:100-1024 1:512:256

A load is requests : tokens of a prompt : tokens of an answer. Every engine gets a process of its
own, in turns, and all loads one after the other in it; weights are random where the model has none.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

PEERS = Path(__file__).parent / "peers"
SOURCES = Path(__file__).parents[1] / "src"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--loads", nargs="+", default=["256:100-1024:100-1024"])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--max-model-len", type=int, default=4096)
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--max-num-batched-tokens", type=int, default=16384)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--vllm", help="the Python of an environment with vLLM")
    parser.add_argument("--transformers", help="that of one with transformers")
    parser.add_argument("--out", type=Path, help="where to write the rows as JSON")
    options = parser.parse_args()
    engines = {"tightfit": sys.executable}
    engines |= {"vllm": options.vllm} if options.vllm else {}
    engines |= {"transformers": options.transformers} if options.transformers else {}
    rates: dict[str, dict[str, list[float]]] = {name: {} for name in engines}
    for _ in range(options.rounds):
        for name, python in engines.items():
            for load, rate in run(name, python, options):
                rates[name].setdefault(load, []).append(rate)
                print(f"{name} {load}: {rate:.1f} output tokens per second", flush=True)
    print(table(options, rates))
    if options.out:
        options.out.write_text(json.dumps({"model": options.model.name, "rates": rates}, indent=1))


def run(name: str, python: str, options: argparse.Namespace) -> list[tuple[str, float]]:
    """Each load, and its output tokens per second; nothing of an engine that fails."""
    with tempfile.TemporaryDirectory() as directory:
        job = Path(directory) / "job.json"
        answers = Path(directory) / "answers.jsonl"
        settings: dict[str, Any] = {
            key: str(value) if isinstance(value, Path) else value
            for key, value in vars(options).items()
        }
        job.write_text(json.dumps(settings))
        environment = dict(os.environ, HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1")
        path = [str(SOURCES), environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(path)
        script = PEERS / f"{name}_loads.py"
        done = subprocess.run(
            [python, str(script), str(job), str(answers)],
            env=environment,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            print(f"{name} failed:\n{done.stderr[-2000:]}", file=sys.stderr, flush=True)
        if not answers.exists():
            return []
        rows = map(json.loads, answers.read_text().splitlines())
        return [(row["load"], row["output_tokens"] / row["seconds"]) for row in rows]


def table(options: argparse.Namespace, rates: dict[str, dict[str, list[float]]]) -> str:
    others = [name for name in rates if name != "tightfit"]
    lines = [
        f"\n{options.model.name}, {options.device}, {options.tensor_parallel_size} ranks, "
        f"{options.rounds} rounds: median output tokens per second (least to most)",
        " | ".join(["load", "tightfit", *others, *(f"tightfit / {name}" for name in others)]),
    ]
    for load in options.loads:
        cells = [load]
        found = {name: rates[name].get(load, []) for name in rates}
        for values in found.values():
            spread = f" ({min(values):.0f} to {max(values):.0f})" if len(values) > 1 else ""
            cells.append(f"{median(values):.0f}{spread}" if values else "failed")
        for name in others:
            both = found["tightfit"] and found[name]
            cells.append(f"{median(found['tightfit']) / median(found[name]):.2f}" if both else "")
        lines.append(" | ".join(cells))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
