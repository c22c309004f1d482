"""Arguments and options of several commands."""

from typing import Annotated

import typer

_HELP = "A directory, a config.json, a Hub id (org/name), or a URL (s3://, https://, ...)."

Model = Annotated[str, typer.Argument(metavar="MODEL", help=_HELP, show_default=False)]
OptionalModel = Annotated[
    str | None, typer.Argument(metavar="MODEL", help=_HELP, show_default=False)
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Quiet = Annotated[
    bool, typer.Option("-q", "--quiet", help="No progress or remarks; warnings stay.")
]
Revision = Annotated[
    str | None, typer.Option(help="Branch, tag or commit of a Hub id.", show_default=False)
]
TensorParallelSize = Annotated[
    int,
    typer.Option(
        "--tensor-parallel-size",
        "-tp",
        rich_help_panel="Parallel layout",
        help="Ranks per stage.",
    ),
]
