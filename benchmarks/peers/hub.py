"""The nine probes on a loopback Hub: true configs and true headers, with nothing behind them."""

import json
from collections import Counter
from collections.abc import Mapping
from math import prod
from typing import Any, SupportsIndex

from support.configs import read_config
from support.hub_server import HubServer
from support.probes import PROBES, TOKENS, header_of

REPOS: Mapping[str, str] = {
    "Llama-3.1-8B": "meta-llama/Llama-3.1-8B",
    "Qwen3-30B-A3B": "Qwen/Qwen3-30B-A3B",
    "DeepSeek-V3": "deepseek-ai/DeepSeek-V3",
    "gemma-3-27b-it": "google/gemma-3-27b-it",
    "gpt-oss-120b": "openai/gpt-oss-120b",
    "Qwen2.5-VL-7B-Instruct": "Qwen/Qwen2.5-VL-7B-Instruct",
    "Nemotron-H-8B-Base-8K": "nvidia/Nemotron-H-8B-Base-8K",
    "granite-4.0-h-small": "ibm-granite/granite-4.0-h-small",
    "mamba2-780m": "state-spaces/mamba2-780m",
}
"""Their published names, by which some tools know them."""


class VirtualFile(bytes):
    """The head of a file that goes on in zeros, as `bytes` to whoever measures and slices it."""

    total: int

    def __new__(cls, head: bytes, total: int) -> "VirtualFile":
        made = super().__new__(cls, head)
        made.total = total
        return made

    def __len__(self) -> int:
        return self.total

    def __getitem__(self, key: SupportsIndex | slice) -> Any:
        if not isinstance(key, slice):
            return super().__getitem__(key)
        start, stop, _ = key.indices(self.total)
        head = bytes.__getitem__(self, slice(start, stop))
        return head + bytes(stop - start - len(head))


def config_of(probe: str) -> dict[str, Any]:
    """The config, with room for `TOKENS` tokens: Nemotron-H allows 8192."""
    config = read_config(probe)
    if config.get("max_position_embeddings", TOKENS) < TOKENS:
        config["max_position_embeddings"] = TOKENS
    return config


def serve_probes(hub: HubServer) -> None:
    """Add a repository for every probe."""
    for probe in PROBES:
        config = config_of(probe)
        head, data_bytes = header_of(config)
        tensors = json.loads(head[8:])
        del tensors["__metadata__"]
        elements: Counter[str] = Counter()
        for tensor in tensors.values():
            elements[tensor["dtype"]] += prod(tensor["shape"])
        index = {
            "metadata": {"total_size": data_bytes},
            "weight_map": dict.fromkeys(sorted(tensors), "model.safetensors"),
        }
        hub.add(
            REPOS[probe],
            {
                "config.json": json.dumps(config, indent=1).encode(),
                "model.safetensors": VirtualFile(head, len(head) + data_bytes),
                "model.safetensors.index.json": json.dumps(index).encode(),
            },
            info={"safetensors": {"parameters": dict(elements), "total": elements.total()}},
        )
