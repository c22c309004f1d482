"""Where a model is to be served."""

from typing import Annotated

import typer

_PANEL = "Device"

Gpu = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=_PANEL,
        help="A GPU of the catalogue by any clear name: h100, rtx4090; `list` lists them.",
        show_default=False,
    ),
]
GpuMemory = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=_PANEL,
        help="Total memory of each GPU as its driver reports it, such as 24GiB.",
        show_default=False,
    ),
]
Engine = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=_PANEL, help="vllm, or tightfit's builtin runtime.", show_default="vllm"
    ),
]
EngineVersion = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=_PANEL, help="Version of the engine.", show_default="newest modelled"
    ),
]
Entrypoint = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=_PANEL,
        help="vLLM's defaults depend on it: server or llm.",
        show_default="server",
    ),
]
