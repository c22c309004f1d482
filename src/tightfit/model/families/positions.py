"""Learned positions: a table with a row for every position, whole on every rank."""

from tightfit.model.layout import Part, Stage, Weight


def learned_positions(name: str, rows: int, hidden_size: int, where: Stage) -> Weight:
    """The table `[rows, hidden_size]` of the module `name`."""
    part = Part(source=f"{name}.weight", rows=rows)
    return Weight(name=f"{name}.weight", parts=(part,), columns=hidden_size, where=where)
