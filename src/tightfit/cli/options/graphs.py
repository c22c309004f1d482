"""What vLLM compiles and captures."""

from typing import Annotated

import typer

_PANEL = "CUDA graphs (vLLM)"

EnforceEager = Annotated[
    bool | None,
    typer.Option(
        "--enforce-eager/--no-enforce-eager",
        rich_help_panel=_PANEL,
        help="No CUDA graphs.",
        show_default=False,
    ),
]
CudagraphCaptureSizes = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=_PANEL,
        help="Batch sizes to capture, such as 1,2,4,8.",
        show_default="engine's",
    ),
]
MaxCudagraphCaptureSize = Annotated[
    int | None,
    typer.Option(
        rich_help_panel=_PANEL, help="The largest size captured.", show_default="engine's"
    ),
]
CompilationConfig = Annotated[
    str | None,
    typer.Option(
        "--compilation-config",
        "-cc",
        rich_help_panel=_PANEL,
        help="JSON, or -cc.cudagraph_mode=PIECEWISE.",
        show_default=False,
    ),
]
OptimizationLevel = Annotated[
    int | None,
    typer.Option(
        "--optimization-level",
        "-O",
        rich_help_panel=_PANEL,
        help="0 to 3.",
        show_default="engine's",
    ),
]
UseV2ModelRunner = Annotated[
    bool | None,
    typer.Option(
        "--use-v2-model-runner/--no-use-v2-model-runner",
        rich_help_panel=_PANEL,
        help="vLLM's environment variable VLLM_USE_V2_MODEL_RUNNER.",
        show_default="the version's",
    ),
]
UseFlashinferSampler = Annotated[
    bool | None,
    typer.Option(
        "--use-flashinfer-sampler/--no-use-flashinfer-sampler",
        rich_help_panel=_PANEL,
        help="vLLM's environment variable VLLM_USE_FLASHINFER_SAMPLER.",
        show_default="the version's",
    ),
]
WarmCompileCache = Annotated[
    bool | None,
    typer.Option(
        "--warm-compile-cache/--no-warm-compile-cache",
        rich_help_panel=_PANEL,
        help="Not the first start of this model: nothing is compiled or timed again.",
        show_default=False,
    ),
]
