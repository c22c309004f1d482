"""How requests are batched and their keys and values kept (vLLM)."""

from typing import Annotated

import typer

_PANEL = "Scheduling (vLLM)"

EnablePrefixCaching = Annotated[
    bool | None,
    typer.Option(
        "--enable-prefix-caching/--no-enable-prefix-caching",
        rich_help_panel=_PANEL,
        help="Keep blocks for prompts that begin alike.",
        show_default="engine's",
    ),
]
EnableChunkedPrefill = Annotated[
    bool | None,
    typer.Option(
        "--enable-chunked-prefill/--no-enable-chunked-prefill",
        rich_help_panel=_PANEL,
        help="Split long prompts over steps.",
        show_default="engine's",
    ),
]
AsyncScheduling = Annotated[
    bool | None,
    typer.Option(
        "--async-scheduling/--no-async-scheduling",
        rich_help_panel=_PANEL,
        help="Prepare a step while another runs.",
        show_default="engine's",
    ),
]
DisableHybridKvCacheManager = Annotated[
    bool | None,
    typer.Option(
        "--disable-hybrid-kv-cache-manager/--no-disable-hybrid-kv-cache-manager",
        rich_help_panel=_PANEL,
        help="Keep every token in windowed layers too.",
        show_default=False,
    ),
]
EnableLora = Annotated[
    bool | None,
    typer.Option(
        "--enable-lora/--no-enable-lora",
        rich_help_panel=_PANEL,
        help="Room for LoRA adapters.",
        show_default=False,
    ),
]
MaxLoras = Annotated[
    int | None, typer.Option(rich_help_panel=_PANEL, help="Adapters in a batch.", show_default="1")
]
MaxLoraRank = Annotated[
    int | None, typer.Option(rich_help_panel=_PANEL, help="Their largest rank.", show_default="16")
]
MaxCpuLoras = Annotated[
    int | None,
    typer.Option(
        rich_help_panel=_PANEL, help="Adapters kept in host memory.", show_default="max_loras"
    ),
]
