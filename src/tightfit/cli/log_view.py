"""`plan --from-log`: the plan of a start-up beside what vLLM printed about it."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tightfit.planner.devices import CATALOGUE
from tightfit.planner.plan import Plan
from tightfit.planner.vllm_log import LogLine, VLLMLog, compare, mismatches
from tightfit.units import MiB, format_bytes

if TYPE_CHECKING:
    from rich.console import Console

_SAME_TOTAL_BYTES = 16 * MiB
"""Logs print GiB with two digits."""


def asked_by(log: VLLMLog) -> dict[str, Any]:
    """The options of the start-up, with its device if the log prints its memory."""
    options = {"entrypoint": log.entrypoint, **log.options}
    total_bytes = log.bytes_of("total")
    requested, share = log.bytes_of("requested"), log.number("utilization")
    if total_bytes is None and requested and share:
        total_bytes = round(requested / share)
    if total_bytes is None:
        return options
    same = [
        one
        for one in CATALOGUE.values()
        if one.logged and abs(one.total_bytes - total_bytes) <= _SAME_TOTAL_BYTES
    ]
    return options | ({"gpu": same[0].name} if same else {"gpu_memory": str(total_bytes)})


def log_json(plan: Plan, log: VLLMLog) -> dict[str, Any]:
    """The comparison in schema 1."""
    return {
        "lines": [
            {
                "name": line.name,
                "unit": line.unit,
                "planned": line.planned,
                "logged": line.logged,
                "difference": line.difference,
            }
            for line in compare(plan, log)
        ],
        "mismatches": list(mismatches(plan, log)),
    }


def render_log(plan: Plan, log: VLLMLog, page: "Console") -> None:
    """Planned, logged and the difference of every line that the log has."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("beside the log")
    for name in ("planned", "logged", "difference"):
        table.add_column(name, justify="right")
    for line in compare(plan, log):
        table.add_row(
            line.name,
            _figure(line, line.planned),
            _figure(line, line.logged),
            _figure(line, line.difference, sign="+"),
        )
    page.print()
    page.print(table)
    for text in mismatches(plan, log):
        page.print(Text(f"not comparable: {text}", style="yellow"))


def _figure(line: LogLine, value: float | None, sign: str = "") -> str:
    if value is None:
        return "-"
    if line.unit == "bytes":
        return ("+" if sign and value > 0 else "") + format_bytes(round(value))
    digits = 2 if line.unit == "sequences" else 0
    return f"{value:{sign},.{digits}f}"


def remember(plan: Plan, log: VLLMLog, source: Path) -> str:
    """Add what the log teaches to the user's calibration, and say so.

    Raises:
        ConfigError: the calibration that is there cannot be understood.
        OutputError: it cannot be written.
    """
    from tightfit.planner.user_calibration import add_record, record_of

    record = record_of(plan, compare(plan, log), source=source.name)
    if record is None or mismatches(plan, log):
        return "nothing to remember: the log has no line that calibrates this plan"
    adjusted = ", ".join(f"{name} {_signed(n)}" for name, n in record.adjustments.items())
    return f"remembered for {record.device} in {add_record(record)}: {adjusted}"


def _signed(n: int) -> str:
    return ("+" if n > 0 else "") + format_bytes(n)
