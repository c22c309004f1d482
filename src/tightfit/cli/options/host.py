"""What lies in the memory of the host."""

from typing import Annotated

import typer

_PANEL = "Host memory"

CpuOffloadGb = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=_PANEL,
        help="GiB of the weights of a rank that stay in host memory.",
        show_default="0",
    ),
]
KvOffloadingSize = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=_PANEL,
        help="GiB of host memory for evicted KV blocks, over all ranks.",
        show_default=False,
    ),
]
CpuKvcacheSpace = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=_PANEL,
        help="GiB of KV cache on vLLM's CPU backend (VLLM_CPU_KVCACHE_SPACE).",
        show_default=False,
    ),
]
ApiServerCount = Annotated[
    int | None,
    typer.Option(rich_help_panel=_PANEL, help="API server processes.", show_default="engine's"),
]
