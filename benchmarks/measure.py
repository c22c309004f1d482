"""Run commands alternately and measure the CPU time and the peak memory of each."""

import argparse
import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

RESULTS = Path(__file__).with_name("results")


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    cpu_seconds: float
    peak_rss_bytes: int


def run(command: Sequence[str], environment: Mapping[str, str]) -> Run:
    """Run to the end, and ask the kernel what it cost, children included."""
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    assert process.stderr is not None
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed:\n{errors.decode()[-2000:]}")
    return Run(cpu_seconds=usage.ru_utime + usage.ru_stime, peak_rss_bytes=usage.ru_maxrss * 1024)


def compare(
    commands: Mapping[str, Sequence[str]], *, rounds: int, environment: Mapping[str, str]
) -> dict[str, Any]:
    """Every command once per round, so that a busy minute hits all of them."""
    runs: dict[str, list[Run]] = {name: [] for name in commands}
    for command in commands.values():
        run(command, environment)
    for _ in range(rounds):
        for name, command in commands.items():
            runs[name].append(run(command, environment))
    base = median(r.cpu_seconds for r in next(iter(runs.values())))
    rows = {}
    for name, measured in runs.items():
        seconds = sorted(r.cpu_seconds for r in measured)
        rows[name] = {
            "cpu_seconds_median": round(median(seconds), 3),
            "cpu_seconds_spread": [round(seconds[0], 3), round(seconds[-1], 3)],
            "times_the_first": round(median(seconds) / max(base, 0.001), 1),
            "peak_rss_mib": round(median(r.peak_rss_bytes for r in measured) / 2**20),
        }
    return {
        "rounds": rounds,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "rows": rows,
    }


def show(result: Mapping[str, Any]) -> None:
    width = max(len(name) for name in result["rows"])
    print(f"{'':{width}}  CPU s median  (spread)           x first  peak RSS MiB")
    for name, row in result["rows"].items():
        low, high = row["cpu_seconds_spread"]
        print(
            f"{name:{width}}  {row['cpu_seconds_median']:12.3f}  ({low:.3f} .. {high:.3f})  "
            f"{row['times_the_first']:10.1f}  {row['peak_rss_mib']:12d}"
        )


def arguments(description: str | None, *, rounds: int) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--record", action="store_true", help="write the result to results/")
    return parser.parse_args()


def record(name: str, result: Mapping[str, Any]) -> None:
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
