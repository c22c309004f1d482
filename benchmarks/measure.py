"""Run commands alternately and measure the CPU time and the peak memory of each."""

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

RESULTS = Path(__file__).with_name("results")


# The kernel counts what a process was before `exec` to its peak: a small process has to start it.
_LAUNCHER = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[2]), int(sys.argv[2])))
pid = os.posix_spawnp(sys.argv[3], sys.argv[3:], os.environ)
_, status, usage = os.wait4(pid, 0)
figures = os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime, usage.ru_maxrss
os.write(int(sys.argv[1]), " ".join(map(str, figures)).encode())
"""


_ADDRESS_SPACE = 16 * 2**30
"""Bytes; some tools make the weights of the largest models."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What a command and its children cost, and what it said."""

    returncode: int
    cpu_seconds: float
    peak_rss_bytes: int
    stdout: str
    stderr: str


def observe(command: Sequence[str], environment: Mapping[str, str], timeout: float = 600) -> Run:
    """Run to the end, whatever that is.

    Raises:
        subprocess.TimeoutExpired: it took longer, and was killed with its children.
    """
    read, write = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-S", "-E", "-c", _LAUNCHER, str(write), str(_ADDRESS_SPACE), *command],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        pass_fds=(write,),
        start_new_session=True,
        text=True,
        errors="replace",
    )
    os.close(write)
    try:
        stdout, stderr = process.communicate(timeout=timeout)
        figures = os.read(read, 1000).decode().split()
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise
    finally:
        os.close(read)
    if not figures:
        raise SystemExit(f"{command[0]} did not start:\n{stderr[-2000:]}")
    return Run(
        returncode=int(figures[0]),
        cpu_seconds=float(figures[1]),
        peak_rss_bytes=int(figures[2]) * 1024,
        stdout=stdout,
        stderr=stderr,
    )


def run(command: Sequence[str], environment: Mapping[str, str]) -> Run:
    """Run what must succeed."""
    done = observe(command, environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return done


def with_bytecode(environment: Mapping[str, str], directory: str | Path) -> dict[str, str]:
    """The environment of an installed program, whose modules were compiled before."""
    kept = {k: v for k, v in environment.items() if k != "PYTHONDONTWRITEBYTECODE"}
    return kept | {"PYTHONPYCACHEPREFIX": str(directory)}


def compare(
    commands: Mapping[str, Sequence[str]], *, rounds: int, environment: Mapping[str, str]
) -> dict[str, Any]:
    """Every command once per round, so that a busy minute hits all of them."""
    runs: dict[str, list[Run]] = {name: [] for name in commands}
    with tempfile.TemporaryDirectory() as bytecode:
        environment = with_bytecode(environment, bytecode)
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
