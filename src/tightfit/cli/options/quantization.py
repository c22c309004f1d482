"""What becomes of weights: of `quantize`, and of `shard --quantize`."""

from pathlib import Path
from typing import Annotated

import typer

from tightfit.model.quantization.written import FORMATS, GROUP_SIZE

PANEL = "Quantization"

GroupSize = Annotated[
    int | None,
    typer.Option(
        rich_help_panel=PANEL,
        help="Inputs that share a scale; -1 for whole rows.",
        show_default=str(GROUP_SIZE),
    ),
]
FileFormat = Annotated[
    str | None,
    typer.Option(
        "--format",
        metavar="|".join(FORMATS),
        rich_help_panel=PANEL,
        help="As which engines load it.",
        show_default=FORMATS[0],
    ),
]
Recipe = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        rich_help_panel=PANEL,
        help="YAML or JSON: scheme, group_size, format, and rules for modules.",
        show_default=False,
    ),
]
Ignore = Annotated[
    list[str] | None,
    typer.Option(
        metavar="REGEX",
        rich_help_panel=PANEL,
        help="Leave matching modules as they are; repeatable.",
        show_default=False,
    ),
]
