"""Which planners are right about nine models, and what does an answer cost?

usage: compare_peers.py [--environments DIR] [--tools kvfit,hf-mem] [--record]

Every planner that can run offline is installed in an environment of its own and asked for the
weights and for the KV cache and state of one sequence of 32,768 tokens in bfloat16, of models whose
configs and headers a loopback Hub serves. The figures are ratios to the truth of
`tests/support/probes.py`; "-" says nothing, "refused" exits with an error and says why, "crashed"
prints a traceback. CPU seconds (user and system, children included) and the peak memory are those
of one answer.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from measure import RESULTS, Run, observe, record, with_bytecode

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from peers.hub import REPOS, config_of, serve_probes  # noqa: E402
from peers.tools import TOOLS, Answer, Tool, install, redirect, tightfit_answer  # noqa: E402

from support.hub_server import HubServer  # noqa: E402
from support.probes import PROBES, TOKENS  # noqa: E402

CLOSE = 0.01
"""Within so much of the truth a figure is right."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """What a tool says of a model, as ratios to the truth."""

    status: str
    """answered, refused, crashed or timed out."""
    weights: float | None
    cache: float | None
    cpu_seconds: float
    peak_rss_mib: int
    says: str | None = None


def ours(model: str) -> list[str]:
    return [
        *(sys.executable, "-m", "tightfit", "plan", model, "--json"),
        *("--max-model-len", str(TOKENS), "--kv-cache-dtype", "bfloat16"),
        *("--mamba-cache-dtype", "bfloat16", "--mamba-ssm-cache-dtype", "bfloat16"),
    ]


def cell(tool: Tool, probe: str, runs: list[Run], text: str) -> Cell:
    """Read the answers to one question."""
    last = runs[-1]
    answer: Answer = None, None
    status, says = "answered", None
    try:
        if last.returncode:
            raise ValueError((last.stderr or last.stdout).strip().splitlines()[-1][:160])
        answer = tool.read(text)
    except (ValueError, KeyError, TypeError, IndexError, AssertionError, StopIteration) as error:
        status, says = "refused", str(error)[:160] or "no figures in its output"
        if "Traceback (most recent call last)" in last.stderr + last.stdout:
            status = "crashed"
    truth = PROBES[probe]
    weights, cache = answer
    return Cell(
        status=status,
        weights=None if weights is None else round(weights / truth.checkpoint_bytes, 4),
        cache=None if cache is None else round(cache / truth.cache_bytes, 4),
        cpu_seconds=round(median(run.cpu_seconds for run in runs), 3),
        peak_rss_mib=round(median(run.peak_rss_bytes for run in runs) / 2**20),
        says=says,
    )


def measured(tool: Tool, at: Path, environment: Mapping[str, str], rounds: int) -> dict[str, Cell]:
    cells: dict[str, Cell] = {}
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "out.json"
        # The first run of all compiles.
        observe(tool.ask(at, next(iter(REPOS.values())), out), environment)
        for probe, repo in REPOS.items():
            out.unlink(missing_ok=True)
            try:
                runs = [observe(tool.ask(at, repo, out), environment) for _ in range(rounds)]
            except subprocess.TimeoutExpired:
                cells[probe] = Cell(
                    status="timed out", weights=None, cache=None, cpu_seconds=600, peak_rss_mib=0
                )
                continue
            text = out.read_text() if out.exists() else runs[-1].stdout
            cells[probe] = cell(tool, probe, runs, text)
    return cells


def compare(tools: list[Tool], environments: Path, rounds: int, torch: str) -> dict[str, Any]:
    left_out: dict[str, str] = {}
    rows: dict[str, dict[str, Any]] = {}
    with HubServer() as hub, tempfile.TemporaryDirectory() as cache:
        serve_probes(hub)
        files = {repo: Path(cache) / f"{probe}.json" for probe, repo in REPOS.items()}
        for probe, repo in REPOS.items():
            files[repo].write_text(json.dumps(config_of(probe)))
        own = (
            Tool(name="tightfit", ask=lambda _, repo, __: ours(repo), read=tightfit_answer),
            Tool(
                name="tightfit, config.json alone",
                ask=lambda _, repo, __: ours(str(files[repo])),
                read=tightfit_answer,
            ),
        )
        for tool in (*own, *tools):
            at = Path(sys.executable).parent
            if tool.requirements:
                try:
                    at = install(tool, environments, torch)
                    redirect(tool, at, hub.url)
                except (subprocess.CalledProcessError, OSError) as error:
                    text = getattr(error, "stderr", None) or str(error)
                    left_out[tool.name] = text.strip().splitlines()[-1][:200]
                    continue
            environment = hub.env(Path(cache) / tool.name, COLUMNS="200")
            environment = with_bytecode(environment, Path(cache) / "bytecode" / tool.name)
            cells = measured(tool, at, environment, min(rounds, tool.rounds))
            rows[tool.name] = {
                "version": tool.requirements[0].partition("==")[2] if tool.requirements else None,
                "cells": {probe: asdict(one) for probe, one in cells.items()},
            }
            print(f"{tool.name}: done", file=sys.stderr)
    return {
        "tokens": TOKENS,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "rounds": rounds,
        "tools": rows,
        "left_out": left_out,
    }


def _shown(one: Mapping[str, Any], figure: str) -> str:
    if one["status"] != "answered":
        return str(one["status"])
    value = one[figure]
    if value is None:
        return "-"
    if value == 1:
        return "exact"
    return f"**{value:.2f}**" if abs(value - 1) > CLOSE else f"{value:.3f}"


def _right(one: Mapping[str, Any], figure: str) -> bool:
    return one[figure] is not None and abs(one[figure] - 1) <= CLOSE


def tables(result: Mapping[str, Any]) -> Iterator[str]:
    """The result as Markdown."""
    tools: Mapping[str, Any] = result["tools"]
    names = {n: f"{n} {t['version']}" if t["version"] else n for n, t in tools.items()}
    for figure, title in (
        ("weights", "Weights, ratio to the published bytes"),
        ("cache", f"KV cache and state of one sequence of {TOKENS:,} tokens, ratio to the truth"),
    ):
        yield f"### {title}"
        yield ""
        yield "| model | " + " | ".join(names.values()) + " |"
        yield "|---|" + "---|" * len(names)
        for probe in PROBES:
            shown = (_shown(tool["cells"][probe], figure) for tool in tools.values())
            yield f"| {probe} | " + " | ".join(shown) + " |"
        right = (sum(_right(c, figure) for c in t["cells"].values()) for t in tools.values())
        yield f"| **right, of {len(PROBES)}** | " + " | ".join(map(str, right)) + " |"
        yield ""
    yield "### Cost of an answer (median over the models, and the worst)"
    yield ""
    yield "| | " + " | ".join(names.values()) + " |"
    yield "|---|" + "---|" * len(names)
    for key, unit, digits in (("cpu_seconds", "CPU s", 2), ("peak_rss_mib", "peak MiB", 0)):
        cost = ([c[key] for c in tool["cells"].values()] for tool in tools.values())
        shown = (f"{median(values):.{digits}f} ({max(values):.{digits}f})" for values in cost)
        yield f"| {unit} | " + " | ".join(shown) + " |"
    for name, reason in result["left_out"].items():
        yield ""
        yield f"{name} was left out: {reason}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tools", default=",".join(tool.name for tool in TOOLS))
    parser.add_argument(
        "--environments",
        type=Path,
        default=Path(tempfile.gettempdir()) / "tightfit-peers",
        help="where the peers are installed, and found again",
    )
    parser.add_argument("--torch", default="2.13.0+cpu", help="of the peers that import it")
    parser.add_argument("--record", action="store_true", help="write the result to results/")
    options = parser.parse_args()
    chosen = [tool for tool in TOOLS if tool.name in options.tools.split(",")]
    result = compare(chosen, options.environments, options.rounds, options.torch)
    text = "\n".join(tables(result)) + "\n"
    print(text)
    if options.record:
        record("peers", result)
        (RESULTS / "peers.md").write_text(text)


if __name__ == "__main__":
    main()
