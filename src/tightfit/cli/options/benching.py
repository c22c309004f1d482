"""Of `run --bench`."""

from pathlib import Path
from typing import Annotated

import typer

_PANEL = "With --bench"

NumPrompts = Annotated[
    int | None, typer.Option(rich_help_panel=_PANEL, help="Requests.", show_default="256", min=1)
]
InputLen = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=_PANEL,
        metavar="N|N-M",
        help="Tokens of a prompt, one length or drawn from a range.",
        show_default="100-1024",
    ),
]
OutputLen = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=_PANEL,
        metavar="N|N-M",
        help="Tokens of an answer, likewise.",
        show_default="100-1024",
    ),
]
RequestRate = Annotated[
    float | None,
    typer.Option(
        rich_help_panel=_PANEL,
        help="Requests per second that arrive at random (Poisson).",
        show_default="all at once",
    ),
]
Concurrency = Annotated[
    int | None,
    typer.Option(
        rich_help_panel=_PANEL,
        help="Requests under way at most.",
        show_default="no bound",
        min=1,
    ),
]
Report = Annotated[
    Path | None,
    typer.Option(
        rich_help_panel=_PANEL,
        help="Also write a page (.html) or a picture of it (.png).",
        show_default=False,
    ),
]
