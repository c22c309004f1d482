"""`tightfit run --bench`: throughput and latency of the planned model."""

import math
import re
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tightfit.cli.output import console, print_json, status, until_closed
from tightfit.cli.running.job import Job, in_world, launch_other_ranks
from tightfit.errors import ExitCode, UsageError

if TYPE_CHECKING:
    from tightfit.runtime.bench import Load
    from tightfit.runtime.ranks.world import World

_MOST = 1_000_000
"""Requests, and tokens of one."""


def read_load(given: Mapping[str, Any], *, seed: int) -> "Load":
    """The load that the options describe.

    Raises:
        UsageError: a length or a rate that is none, or a report that cannot be written.
    """
    from tightfit.runtime.bench import Load

    if (report := given.get("report")) is not None:
        from tightfit.cli.report.quality import check_suffix

        check_suffix(report)
        if not report.parent.is_dir():
            raise UsageError(
                f"--report {report}: there is no directory {report.parent}",
                hint="make it, or write somewhere else",
            )
    standard = Load(seed=seed)
    rate = given.get("request_rate")
    if rate is not None and not (math.isfinite(rate) and rate > 0):
        raise UsageError(f"--request-rate {rate} is out of range", hint="such as 4 per second")
    count = given.get("num_prompts", standard.num_prompts)
    if count > _MOST:
        raise UsageError(f"--num-prompts {count} is out of range", hint=f"at most {_MOST:,}")
    return replace(
        standard,
        num_prompts=count,
        input_len=_lengths("--input-len", given.get("input_len"), standard.input_len),
        output_len=_lengths("--output-len", given.get("output_len"), standard.output_len),
        request_rate=rate,
        concurrency=given.get("concurrency"),
    )


def _lengths(flag: str, text: str | None, standard: tuple[int, int]) -> tuple[int, int]:
    if text is None:
        return standard
    match = re.fullmatch(r"(\d{1,7})(?:-(\d{1,7}))?", text)
    low, high = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= low <= high <= _MOST:
        raise UsageError(
            f"{flag} {text!r} is no length",
            hint="a number of tokens, or a range such as 100-1024",
        )
    return low, high


def bench(job: Job, load: "Load", *, report: Path | None, as_json: bool, quiet: bool) -> ExitCode:
    """Measure; every rank calls it, and rank 0 speaks.

    Raises:
        UsageError: the load is too much for the options.
        OutputError: the report cannot be written.
    """
    load.check(job.options)
    launch_other_ranks(job)
    result = in_world(job, lambda world: _measure(job, load, world, quiet=quiet), quiet=quiet)
    if result is None:
        return ExitCode.OK
    document = job.plan.to_json() | result
    with until_closed():
        if as_json:
            print_json(document)
        else:
            _render(document, quiet=quiet)
    if report is not None:
        from tightfit.cli.report.bench import write_bench_report

        write_bench_report(report, document)
        if not quiet:
            print(f"wrote {report}", file=sys.stderr)
    return ExitCode.OK


def _measure(job: Job, load: "Load", world: "World", *, quiet: bool) -> dict[str, Any] | None:
    from tightfit.runtime.bench import measure
    from tightfit.runtime.ranks.lockstep import Lockstep
    from tightfit.runtime.session import start

    session = start(job.checkpoint, job.spec, job.options, world=world, **job.source(world.rank))
    lockstep = Lockstep(session.engine, world)
    if world.rank > 0:
        lockstep.follow()
        return None

    def tell(done: int) -> None:
        if not quiet:
            status(f"{done} of {load.num_prompts} requests are answered ...")

    measured = measure(lockstep, load, job.spec.vocab_size, tell)
    lockstep.close()
    return {"bench": measured.to_json(load), "load_seconds": session.load_seconds}


ROWS = (
    ("time to first token", "time_to_first_token"),
    ("between tokens", "inter_token_latency"),
    ("whole request", "request_latency"),
    ("step", "step"),
)
"""Latencies by the name in the table, and in the document."""


def _render(document: Mapping[str, Any], *, quiet: bool) -> None:
    from rich.table import Table

    found, page = document["bench"], console()
    page.print(
        f"{found['output_tokens_per_second']:,.0f} output tokens per second "
        f"({found['total_tokens_per_second']:,.0f} with prompts, "
        f"{found['requests_per_second']:,.2f} requests) over {found['duration_seconds']:,.1f} s"
    )
    if quiet:
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("milliseconds")
    for name in ("median", "p90", "p99", "mean", "max"):
        table.add_column(name, justify="right")
    for name, key in ROWS:
        spread = found[key]
        if spread["count"]:
            figures = (f"{spread[f'{one}_ms']:,.1f}" for one in ("median", "p90", "p99", "mean"))
            table.add_row(name, *figures, f"{spread['max_ms']:,.1f}")
    page.print(table)
    page.print(
        f"{found['requests']:,} requests, {found['input_tokens']:,} tokens in, "
        f"{found['output_tokens']:,} out, {found['step']['count']:,} steps, "
        f"{found['num_preemptions']:,} preemptions; ready after {document['load_seconds']:.1f} s"
    )
