"""`--help` on terminals that are too narrow for typer's tables, which would cut the names."""

import shutil
from typing import Any

from typer.core import TyperCommand

_TABLE_COLUMNS = 124
"""The tables of `plan` and `run` are whole from here on."""


class Command(TyperCommand):
    """A command whose help names every option in full, whatever the width."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Draw tables where there is room, and lists under the same headings elsewhere."""
        if shutil.get_terminal_size().columns < _TABLE_COLUMNS:
            self.rich_markup_mode = None
        super().format_help(ctx, formatter)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """List the parameters, grouped as in the tables."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                kind = "Arguments" if parameter.param_type_name == "argument" else "Options"
                panel = getattr(parameter, "rich_help_panel", None) or kind
                groups.setdefault(panel, []).append(record)
        for panel, records in groups.items():
            with formatter.section(panel):
                formatter.write_dl(records)
