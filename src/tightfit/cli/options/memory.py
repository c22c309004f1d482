"""What decides how memory is shared out."""

from typing import Annotated

import typer

_PANEL = "Memory"

MaxModelLen = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=_PANEL,
        help="Context length: 8192, 32k (32,000), 32K (32,768), or auto (-1): what fits.",
        show_default="the model's",
    ),
]
AllowLongMaxModelLen = Annotated[
    bool | None,
    typer.Option(
        "--allow-long-max-model-len/--no-allow-long-max-model-len",
        rich_help_panel=_PANEL,
        help="vLLM's environment variable VLLM_ALLOW_LONG_MAX_MODEL_LEN.",
        show_default=False,
    ),
]
HfOverrides = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=_PANEL,
        help='JSON for keys of config.json, such as {"max_position_embeddings": 65536}.',
        show_default=False,
    ),
]
MaxNumSeqs = Annotated[
    int | None,
    typer.Option(rich_help_panel=_PANEL, help="Sequences in a batch.", show_default="engine's"),
]
MaxNumBatchedTokens = Annotated[
    str | None,
    typer.Option(rich_help_panel=_PANEL, help="Tokens in a step.", show_default="engine's"),
]
GpuMemoryUtilization = Annotated[
    float | None,
    typer.Option(
        rich_help_panel=_PANEL,
        help="Share of the device that the engine may use.",
        show_default="engine's",
    ),
]
KvCacheMemoryBytes = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=_PANEL,
        help="Size of the KV cache of a rank, such as 8GiB, instead of what is left.",
        show_default=False,
    ),
]
NumGpuBlocksOverride = Annotated[
    int | None,
    typer.Option(
        rich_help_panel=_PANEL,
        help="Blocks of the KV cache, instead of what fits.",
        show_default=False,
    ),
]
BlockSize = Annotated[
    int | None,
    typer.Option(
        rich_help_panel=_PANEL, help="Tokens in a block of the KV cache.", show_default="engine's"
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=_PANEL, help="auto, bfloat16, float16 or float32.", show_default="auto"
    ),
]
Quantization = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=_PANEL,
        help="Quantize while loading (fp8), or plan what `quantize` writes, such as w4a16.",
        show_default=False,
    ),
]
QuantizationGroupSize = Annotated[
    int | None,
    typer.Option(
        rich_help_panel=_PANEL,
        help="Of what `quantize` writes: inputs that share a scale; -1 for whole rows.",
        show_default="128",
    ),
]
QuantizationFormat = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=_PANEL,
        help="Of its files: compressed-tensors, fp8, gptq or awq.",
        show_default="compressed-tensors",
    ),
]
KvCacheDtype = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=_PANEL, help="auto, bfloat16, float16, fp8, ...", show_default="auto"
    ),
]
MambaCacheDtype = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=_PANEL, help="Of the states of state-space layers.", show_default="auto"
    ),
]
MambaSsmCacheDtype = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=_PANEL, help="Of the recurrent part of those states.", show_default="auto"
    ),
]
LoadFormat = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=_PANEL,
        help="auto, safetensors, sharded_state, dummy, ...",
        show_default="auto",
    ),
]
AssumeFullAttention = Annotated[
    bool | None,
    typer.Option(
        "--assume-full-attention/--no-assume-full-attention",
        rich_help_panel=_PANEL,
        help="Plan layers of an unknown kind as full attention instead of refusing.",
        show_default=False,
    ),
]
