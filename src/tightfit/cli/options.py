"""Options that several commands share, with vLLM's names."""

from typing import Annotated

import typer

from tightfit.errors import UsageError
from tightfit.planner.devices import Device, device, this_machine
from tightfit.planner.options import PlanOptions
from tightfit.units import parse_bytes, parse_tokens

_LAYOUT = "Parallel layout"
_MEMORY = "Memory"
_DEVICE = "Device"
_GRAPHS = "CUDA graphs (vLLM)"

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A directory, a config.json, a Hub id (org/name), or a URL (s3://, https://, ...).",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="No progress, no remarks.")]
Revision = Annotated[
    str | None, typer.Option(help="Branch, tag or commit of a Hub id.", show_default=False)
]
TensorParallelSize = Annotated[
    int,
    typer.Option("--tensor-parallel-size", "-tp", rich_help_panel=_LAYOUT, help="Ranks per stage."),
]
ShardedTensorParallelSize = Annotated[
    int | None,
    typer.Option(
        "--tensor-parallel-size",
        "-tp",
        rich_help_panel=_LAYOUT,
        help="Ranks per stage.",
        show_default="as sharded, else 1",
    ),
]
PipelineParallelSize = Annotated[
    int,
    typer.Option("--pipeline-parallel-size", "-pp", rich_help_panel=_LAYOUT, help="Stages."),
]
Gpu = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=_DEVICE, help="A GPU by name, such as h100-80gb.", show_default=False
    ),
]
GpuMemory = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=_DEVICE,
        help="Total memory of each GPU as its driver reports it, such as 24GiB.",
        show_default=False,
    ),
]
MaxModelLen = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=_MEMORY,
        help="Context length: 8192, 32k (32,000), 32K (32,768), or auto (-1) for the longest "
        "that fits.",
        show_default="the model's",
    ),
]
MaxNumSeqs = Annotated[
    int | None,
    typer.Option(rich_help_panel=_MEMORY, help="Sequences in a batch.", show_default="engine's"),
]
MaxNumBatchedTokens = Annotated[
    str | None,
    typer.Option(rich_help_panel=_MEMORY, help="Tokens in a step.", show_default="engine's"),
]
GpuMemoryUtilization = Annotated[
    float | None,
    typer.Option(
        rich_help_panel=_MEMORY,
        help="Share of the device that the engine may use.",
        show_default="engine's",
    ),
]
KvCacheMemoryBytes = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=_MEMORY,
        help="Size of the KV cache of a rank, such as 8GiB, instead of what is left.",
        show_default=False,
    ),
]
BlockSize = Annotated[
    int | None,
    typer.Option(
        rich_help_panel=_MEMORY, help="Tokens in a block of the KV cache.", show_default="engine's"
    ),
]
Dtype = Annotated[
    str,
    typer.Option(rich_help_panel=_MEMORY, help="auto, bfloat16, float16 or float32."),
]
KvCacheDtype = Annotated[
    str, typer.Option(rich_help_panel=_MEMORY, help="auto, bfloat16, float16, fp8, ...")
]

EnforceEager = Annotated[
    bool, typer.Option("--enforce-eager", rich_help_panel=_GRAPHS, help="No CUDA graphs.")
]
CudagraphCaptureSizes = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=_GRAPHS,
        help="Batch sizes to capture, such as 1,2,4,8.",
        show_default="engine's",
    ),
]
MaxCudagraphCaptureSize = Annotated[
    int | None,
    typer.Option(
        rich_help_panel=_GRAPHS, help="The largest size captured.", show_default="engine's"
    ),
]
UseV2ModelRunner = Annotated[
    bool | None,
    typer.Option(
        rich_help_panel=_GRAPHS,
        help="vLLM's environment variable VLLM_USE_V2_MODEL_RUNNER.",
        show_default="the version's",
    ),
]


def plan_options(
    *,
    engine: str,
    gpu: str | None,
    gpu_memory: str | None,
    max_model_len: str | None,
    max_num_batched_tokens: str | None,
    kv_cache_memory_bytes: str | None,
    entrypoint: str = "server",
    engine_version: str | None = None,
    cudagraph_capture_sizes: str | None = None,
    **plain: int | float | str | None,
) -> PlanOptions:
    """The options of a plan, read from their spellings on the command line.

    Raises:
        UsageError: a value that cannot be read, or is out of range.
    """
    if entrypoint not in ("server", "llm"):
        raise UsageError(f"unknown --entrypoint {entrypoint!r}", hint="server or llm")
    where: Device | None = device(gpu, gpu_memory)
    if where is None and engine == "builtin":
        where = this_machine()
    length = None
    if max_model_len is not None:
        length = -1 if max_model_len.lower() == "auto" else parse_tokens(max_model_len)
    tokens = None if max_num_batched_tokens is None else parse_tokens(max_num_batched_tokens)
    pool = None if kv_cache_memory_bytes is None else parse_bytes(kv_cache_memory_bytes)
    return PlanOptions(
        engine=engine,
        engine_version=engine_version,
        entrypoint=entrypoint,
        device=where,
        max_model_len=length,
        max_num_batched_tokens=tokens,
        kv_cache_memory_bytes=pool,
        cudagraph_capture_sizes=_sizes(cudagraph_capture_sizes),
        **plain,  # type: ignore[arg-type]
    )


def _sizes(text: str | None) -> tuple[int, ...] | None:
    """Numbers between commas or spaces."""
    if text is None:
        return None
    words = text.replace(",", " ").split()
    if not words or not all(word.isascii() and word.isdigit() for word in words):
        raise UsageError(
            f"--cudagraph-capture-sizes {text!r} is not a list of numbers",
            hint="write it as 1,2,4,8",
        )
    return tuple(int(word) for word in words)
