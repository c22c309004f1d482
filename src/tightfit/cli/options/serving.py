"""Of `run --serve`."""

from typing import Annotated

import typer

_PANEL = "With --serve"

Host = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=_PANEL,
        help="Address; one that others can reach needs an API key.",
        show_default="127.0.0.1",
    ),
]
Port = Annotated[
    int | None,
    typer.Option(
        rich_help_panel=_PANEL, help="0 takes a free one.", show_default="8000", min=0, max=65535
    ),
]
ApiKey = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=_PANEL,
        help="What clients must send; better given as TIGHTFIT_API_KEY, as others see arguments.",
        show_default=False,
    ),
]
ServedModelName = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=_PANEL, help="What clients call it.", show_default="the model's name"
    ),
]
MaxConcurrentRequests = Annotated[
    int | None,
    typer.Option(
        rich_help_panel=_PANEL,
        help="Running and waiting; more are told 429.",
        show_default="256",
        min=1,
    ),
]
MaxBodyBytes = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=_PANEL, help="Largest body of a request, such as 1MiB.", show_default="4MiB"
    ),
]
DrainSeconds = Annotated[
    int | None,
    typer.Option(
        rich_help_panel=_PANEL,
        help="How long requests may go on after Ctrl-C or SIGTERM.",
        show_default="30",
        min=0,
    ),
]
