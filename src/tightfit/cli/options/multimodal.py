"""Images, video and audio (vLLM)."""

from typing import Annotated

import typer

_PANEL = "Multimodal (vLLM)"

LimitMmPerPrompt = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=_PANEL,
        help='JSON, such as {"image": 2}, or --limit-mm-per-prompt.image=2.',
        show_default=False,
    ),
]
MmProcessorKwargs = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=_PANEL,
        help='JSON for the model\'s processor, such as {"max_pixels": 1003520}.',
        show_default=False,
    ),
]
MmProcessorCacheGb = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=_PANEL,
        help="GiB of host memory for processed inputs, per process.",
        show_default="4",
    ),
]
MmProcessorCacheType = Annotated[
    str | None, typer.Option(rich_help_panel=_PANEL, help="lru or shm.", show_default="lru")
]
MmEncoderTpMode = Annotated[
    str | None,
    typer.Option(rich_help_panel=_PANEL, help="weights or data.", show_default="weights"),
]
SkipMmProfiling = Annotated[
    bool | None,
    typer.Option(
        "--skip-mm-profiling/--no-skip-mm-profiling",
        rich_help_panel=_PANEL,
        help="Reserve nothing for the encoder.",
        show_default=False,
    ),
]
LanguageModelOnly = Annotated[
    bool | None,
    typer.Option(
        "--language-model-only/--no-language-model-only",
        rich_help_panel=_PANEL,
        help="Load no encoder.",
        show_default=False,
    ),
]
