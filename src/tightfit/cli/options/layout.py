"""How a model is spread over devices."""

from typing import Annotated

import typer

_PANEL = "Parallel layout"

ShardedTensorParallelSize = Annotated[
    int | None,
    typer.Option(
        "--tensor-parallel-size",
        "-tp",
        rich_help_panel=_PANEL,
        help="Ranks per stage.",
        show_default="as sharded, else 1",
    ),
]
PipelineParallelSize = Annotated[
    int | None,
    typer.Option(
        "--pipeline-parallel-size", "-pp", rich_help_panel=_PANEL, help="Stages.", show_default="1"
    ),
]
DataParallelSize = Annotated[
    int | None,
    typer.Option(
        "--data-parallel-size",
        "-dp",
        rich_help_panel=_PANEL,
        help="Copies of the engine that share the requests.",
        show_default="1",
    ),
]
EnableExpertParallel = Annotated[
    bool | None,
    typer.Option(
        "--enable-expert-parallel/--no-enable-expert-parallel",
        "-ep",
        rich_help_panel=_PANEL,
        help="Whole experts per rank instead of slices of all.",
        show_default=False,
    ),
]
DecodeContextParallelSize = Annotated[
    int | None,
    typer.Option(
        "--decode-context-parallel-size",
        "-dcp",
        rich_help_panel=_PANEL,
        help="Ranks that share the KV cache of a sequence.",
        show_default="1",
    ),
]
