"""The human view of a plan: the verdict first, a stacked bar per rank, a table of components."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from tightfit.planner.plan import Component, Plan, RankPlan
from tightfit.units import GiB, MiB, format_bytes

if TYPE_CHECKING:
    from tightfit.cli.ci import Finding
    from tightfit.runtime.checks import Check

_COLORS = {
    "weights": "dodger_blue2",
    "kv_cache": "green3",
    "activations": "orange3",
    "logits_and_sampler": "gold3",
    "persistent_buffers": "medium_purple",
    "process_baseline": "grey50",
    "cuda_graphs": "deep_pink3",
    "weights_after_load": "deep_sky_blue1",
    "moe_workspace": "dark_orange3",
    "vision_encoder": "turquoise4",
    "encoder_cache": "cyan3",
    "lora": "plum3",
    "nccl": "light_salmon3",
    "non_torch": "grey62",
    "cuda_context": "grey42",
    "block_tables": "dark_sea_green4",
    "allocator_cache": "light_slate_grey",
}
_OTHER = "grey70"


def render_plan(plan: Plan, console: Console) -> None:
    """Print a plan."""
    console.print(_verdict(plan))
    console.print(_subject(plan), style="dim")
    console.print()
    for group in alike(plan.ranks):
        console.print(_bar(group, console.width))
    console.print()
    measured = any(c.measured_bytes is not None for r in plan.ranks for c in r.components)
    for group in alike(plan.ranks):
        console.print(_table(group, measured=measured))
    if plan.host:
        console.print()
        console.print(_host_table(plan.host))
    _notes(plan, console)


def alike(ranks: Sequence[RankPlan]) -> list[list[RankPlan]]:
    """Ranks that hold the same bytes, together: they are shown once."""
    groups: dict[tuple[tuple[str, int, int | None], ...], list[RankPlan]] = {}
    for rank in ranks:
        key = tuple((c.name, c.planned_bytes, c.measured_bytes) for c in rank.components)
        groups.setdefault(key, []).append(rank)
    return list(groups.values())


def _verdict(plan: Plan) -> Text:
    fits = plan.verdict.fits
    words = {
        True: ("fits", "bold green"),
        False: ("does not fit", "bold red"),
        None: ("needs", "bold"),
    }
    word, style = words[fits]
    return Text.assemble((word, style), ": ", plan.verdict.reason)


def _subject(plan: Plan) -> str:
    options = plan.options
    replicas = options.data_parallel_size
    ranks = len(plan.ranks) * (1 if replicas is None else replicas.value)
    device = ""
    if plan.device is not None:
        cpu = plan.device.kind == "cpu"
        device = f" on {ranks} rank{'s' if ranks > 1 else ''} of a " if cpu else f" on {ranks} × "
        device += plan.device.name
    params = plan.model.params
    count = f"{params / 1e9:.2f}B" if params >= 999.5e6 else f"{params / 1e6:.0f}M"
    return escape(
        f"{plan.model.name} ({plan.model.architecture}, {count} parameters) "
        f"with {plan.engine} {plan.engine_version}{device}; "
        f"max_model_len {options.max_model_len.value:,}, "
        f"max_num_seqs {options.max_num_seqs.value:,}, "
        f"max_num_batched_tokens {options.max_num_batched_tokens.value:,}"
    )


def _name(group: Sequence[RankPlan]) -> str:
    first, last = group[0].rank, group[-1].rank
    if first == last:
        return f"rank {first}"
    if len(group) == last - first + 1:
        return f"ranks {first}-{last}"
    return "ranks " + ",".join(str(rank.rank) for rank in group)


def _bar(group: Sequence[RankPlan], width: int) -> Text:
    rank = group[0]
    budget = rank.budget_bytes
    total = max(rank.total_bytes, budget or 0, 1)
    label = f"{_name(group):<10} "
    tail = f" {format_bytes(rank.total_bytes)}"
    if budget is not None:
        tail += f" of {format_bytes(budget)}"
    cells = max(10, width - len(label) - len(tail) - 1)
    bar = Text(label)
    drawn = done = 0
    for component in (c for c in rank.components if c.inside_budget):
        done += component.planned_bytes
        end = round(cells * done / total)
        bar.append("█" * (end - drawn), style=_COLORS.get(component.name, _OTHER))
        drawn = end
    over = budget is not None and rank.total_bytes > budget
    bar.append("░" * (cells - drawn), style="grey35")
    bar.append(tail, style="bold red" if over else "")
    return bar


def _table(group: Sequence[RankPlan], *, measured: bool) -> Table:
    rank = group[0]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), title_justify="left")
    each = " (each)" if len(group) > 1 else ""
    table.add_column(f"{_name(group)}{each}")
    unit, size = ("GiB", GiB) if rank.total_bytes >= 4 * GiB else ("MiB", MiB)
    table.add_column(unit, justify="right")
    table.add_column("share", justify="right")
    if measured:
        table.add_column("measured", justify="right")
        table.add_column("difference", justify="right")
    table.add_column("how computed")
    whole = rank.budget_bytes or rank.total_bytes or 1
    for component in sorted(rank.components, key=lambda c: not c.inside_budget):
        color = _COLORS.get(component.name, _OTHER)
        cells: list[str | Text] = [
            Text.assemble(("■ ", color), component.name),
            f"{component.planned_bytes / size:,.2f}",
            f"{component.planned_bytes / whole:.1%}" if component.inside_budget else "outside",
        ]
        if measured:
            cells += _measured(component.planned_bytes, component.measured_bytes, size)
        table.add_row(*cells, _how(component))
    return table


def _host_table(host: Sequence[Component]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("host, all processes")
    table.add_column("GiB", justify="right")
    table.add_column("how computed")
    for component in host:
        table.add_row(
            f"  {component.name}", f"{component.planned_bytes / GiB:,.2f}", _how(component)
        )
    return table


def _how(component: Component) -> Text:
    """What fits in a line; `--explain` prints the whole."""
    text = f"{component.origin}: {component.formula}"
    return Text(text, style="dim", no_wrap=True, overflow="ellipsis")


def _measured(planned: int, measured: int | None, size: int) -> list[str]:
    if measured is None:
        return ["", ""]
    return [f"{measured / size:,.2f}", f"{(measured - planned) / size:+,.2f}"]


def _notes(plan: Plan, console: Console) -> None:
    kv = plan.kv_cache
    lines = [
        f"KV cache: {kv.bytes_per_token:,} bytes per token and rank ({kv.dtype}), "
        f"blocks of {kv.block_size} tokens"
        + ("" if kv.num_blocks is None else f", {kv.num_blocks:,} blocks")
    ]
    bounds = _bounds(plan)
    if bounds:
        lines.append(bounds)
    driver = max((rank.driver_used_bytes or 0 for rank in plan.ranks), default=0)
    if driver and plan.device is not None:
        lines.append(
            f"The driver will show {format_bytes(driver)} used, of "
            f"{format_bytes(plan.device.total_bytes)}"
        )
    longest = plan.verdict.max_model_len_that_fits
    if longest is not None:
        lines.append(f"Longest context that fits: {longest:,} tokens")
    if plan.verdict.engine_message:
        lines.append(f"{plan.engine} would say: {plan.verdict.engine_message}")
    if plan.not_modelled:
        lines.append("Not modelled yet, so leave room for: " + ", ".join(plan.not_modelled))
    lines += [f"Note: {text}" for text in plan.warnings]
    console.print()
    for line in lines:
        console.print(Text(line))
    console.print(Text("--explain COMPONENT prints a whole formula", style="dim"))


def _bounds(plan: Plan) -> str:
    """What one sequence needs, by three measures, where windows make them differ."""
    kv, length = plan.kv_cache, plan.options.max_model_len.value
    if kv.minimum_bytes >= 0.98 * kv.all_full_bytes and kv.reserved_bytes <= kv.all_full_bytes:
        return ""
    return (
        f"One sequence of {length:,} tokens: {plan.engine} reserves "
        f"{format_bytes(kv.reserved_bytes)}, which decides; attention still sees "
        f"{format_bytes(kv.minimum_bytes)} of it, and all tokens in all layers would be "
        f"{format_bytes(kv.all_full_bytes)}"
    )


def render_findings(found: "Sequence[Finding]", console: Console) -> None:
    """What was demanded beside fitting, and whether it holds."""
    for one in found:
        word = ("fails", "bold red") if one.failed else ("passes", "bold green")
        console.print(Text.assemble(word, f": {one.check}: {one.detail}"))


def render_checks(plan: Plan, checks: Sequence["Check"], console: Console) -> None:
    """Print planned beside measured, per rank and component, with a verdict each."""
    failed = [check for check in checks if not check.ok]
    if failed:
        worst = max(failed, key=lambda check: abs(check.difference_bytes))
        console.print(
            Text.assemble(
                ("differs from the plan", "bold red"),
                f": {worst.component} of rank {worst.rank} by "
                f"{format_bytes(abs(worst.difference_bytes))}",
            )
        )
    else:
        console.print(Text.assemble(("as planned", "bold green"), ": every component of each rank"))
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("rank", justify="right")
    table.add_column("component")
    for name in ("planned MiB", "measured MiB", "difference", "allowed"):
        table.add_column(name, justify="right")
    table.add_column("")
    ranks = {check.rank for check in checks}
    for check in checks:
        color = _COLORS.get(check.component, _OTHER)
        total = check.component == "total"
        table.add_row(
            str(check.rank),
            Text.assemble(("  " if total else "■ ", color), check.component),
            f"{check.planned_bytes / MiB:,.1f}",
            f"{check.measured_bytes / MiB:,.1f}",
            f"{check.difference_bytes / MiB:+,.1f}",
            f"{check.allowed_bytes / MiB:,.1f}",
            _judgement(check),
            style="bold" if total else "",
            end_section=total and len(ranks) > 1,
        )
    console.print(table)


def _judgement(check: "Check") -> Text:
    if not check.judged:
        return Text("not judged: never measured", style="yellow")
    return Text("ok", style="green") if check.ok else Text("differs", style="bold red")
