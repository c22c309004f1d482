"""The quantities that vLLM's formulas are written in, for one rank."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from math import prod
from typing import Any

from tightfit.model.blocks.attention import head_axes
from tightfit.model.blocks.mlp import MoE
from tightfit.model.layout import Rank, pipeline_layers
from tightfit.model.parameters import VOCAB_PADDING, parameters
from tightfit.model.spec import Layer, ModelSpec
from tightfit.planner.devices import Device
from tightfit.planner.engines.vllm_versions import Rules
from tightfit.planner.weights import held
from tightfit.units import dtype_bytes, round_up


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One rank of one model under options that are all known."""

    spec: ModelSpec
    rank: Rank
    rules: Rules
    device: Device | None
    runner: str
    eager: bool
    capture_sizes: tuple[int, ...]
    element_bytes: int
    max_num_batched_tokens: int
    max_num_seqs: int
    max_model_len: int
    block_size: int
    kv_groups: int

    @property
    def tensor_parallel_size(self) -> int:
        """Ranks that share a layer."""
        return self.rank.parallel.tensor_parallel_size

    @property
    def first_stage(self) -> bool:
        """Whether the rank holds the embedding."""
        return self.rank.pp_rank == 0

    @property
    def last_stage(self) -> bool:
        """Whether the rank samples."""
        return self.rank.pp_rank == self.rank.parallel.pipeline_parallel_size - 1

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The layers of the rank's stage."""
        stages = self.rank.parallel.pipeline_parallel_size
        span = pipeline_layers(self.spec.num_layers, stages, self.rank.pp_rank)
        return tuple(self.spec.layers[i] for i in span)

    @property
    def has_experts(self) -> bool:
        """Whether a layer is a mixture of experts."""
        return any(isinstance(layer.mlp, MoE) for layer in self.spec.layers)

    @property
    def vocab(self) -> int:
        """Columns of the logits, which are padded."""
        return round_up(self.spec.vocab_size, VOCAB_PADDING)

    @property
    def rows(self) -> int:
        """Sequences of the profile run: one token each at least."""
        return min(self.max_num_seqs, self.max_num_batched_tokens)

    @property
    def hidden_bytes(self) -> int:
        """One tensor of hidden states, M x H x b."""
        return self.max_num_batched_tokens * self.spec.hidden_size * self.element_bytes

    def heads(self, layer: Layer) -> tuple[int, int]:
        """Features of the rank's query and KV heads."""
        queries, keys = head_axes(layer.attention)
        return queries.span(self.rank)[1], keys.span(self.rank)[1]

    def inner(self, layer: Layer) -> int:
        """Rows of the rank's share of the MLP, or of one expert."""
        size = 0 if layer.mlp is None else layer.mlp.intermediate_size
        return size // self.tensor_parallel_size

    @property
    def chip(self) -> Mapping[str, int]:
        """L2 cache and multiprocessors of the device."""
        return chip(self.device)

    def tensor_sizes(self) -> list[int]:
        """Bytes of each parameter of the rank."""
        return [
            dtype_bytes(weight.dtype, elements) if weight.dtype else elements * self.element_bytes
            for weight in held(self.spec, self.rank)
            if (elements := prod(weight.rank_shape(self.rank)))
        ]


def quantized(spec: ModelSpec) -> bool:
    """Whether linear layers multiply in fp8."""
    return spec.quantization is not None and any(
        weight.dtype == "F8_E4M3" for weight in parameters(spec)
    )


@lru_cache(maxsize=1)
def calibration() -> dict[str, Any]:
    """The measured constants."""
    text = files(__package__).joinpath("vllm_calibration.json").read_text(encoding="utf-8")
    data: dict[str, Any] = json.loads(text)
    return data


def chip(device: Device | None) -> Mapping[str, int]:
    """The entry of a device by the first part of its name."""
    chips: Mapping[str, Mapping[str, int]] = calibration()["devices"]
    name = "h100" if device is None else device.name.split("-")[0]
    return chips.get(name, chips["other"])
