"""Of `run --engine vllm`."""

from pathlib import Path
from typing import Annotated

import typer

PANEL = "With --engine vllm"

VllmPython = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=PANEL,
        metavar="PATH",
        help="Interpreter of vLLM's environment; else TIGHTFIT_VLLM_PYTHON, or this one.",
        show_default=False,
    ),
]
VllmLog = Annotated[
    Path | None,
    typer.Option(rich_help_panel=PANEL, help="Keep what vLLM prints.", show_default=False),
]
StartupTimeout = Annotated[
    float | None,
    typer.Option(
        rich_help_panel=PANEL,
        help="Seconds until vLLM must be ready.",
        show_default="1800",
        min=1,
    ),
]
StoreCalibration = Annotated[
    bool | None,
    typer.Option(
        "--store-calibration",
        rich_help_panel=PANEL,
        help="Keep what the log teaches for later plans of such start-ups.",
        show_default=False,
    ),
]
