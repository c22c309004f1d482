"""The quantities that vLLM's formulas are written in, for one rank."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from math import prod
from typing import Any

from tightfit.model.blocks.attention import Attention
from tightfit.model.blocks.base import Mixer, Place
from tightfit.model.blocks.latent_attention import LatentAttention
from tightfit.model.blocks.mlp import MoE
from tightfit.model.layout import Cut, Rank, pipeline_layers
from tightfit.model.parameters import VOCAB_PADDING, loaded_parameters
from tightfit.model.spec import Layer, ModelSpec, mixers_of
from tightfit.planner.devices import Device
from tightfit.planner.engines.vllm_versions import Rules
from tightfit.planner.kv_cache import KVLayout
from tightfit.planner.options import PlanOptions
from tightfit.planner.weights import held
from tightfit.units import dtype_bytes, round_up


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One rank of one model under options that are all known."""

    spec: ModelSpec
    rank: Rank
    rules: Rules
    device: Device | None
    options: PlanOptions
    runner: str
    eager: bool
    cudagraph_mode: str
    capture_sizes: tuple[int, ...]
    element_bytes: int
    max_num_batched_tokens: int
    max_num_seqs: int
    max_model_len: int
    kv: KVLayout

    @property
    def tensor_parallel_size(self) -> int:
        """Ranks that share a layer."""
        return self.rank.parallel.tensor_parallel_size

    @property
    def talks(self) -> bool:
        """Whether NCCL connects the rank with others, of its replica or of others."""
        parallel = self.rank.parallel
        return parallel.world_size > 1 or (parallel.data_parallel_size > 1 and self.has_experts)

    @property
    def first_stage(self) -> bool:
        """Whether the rank holds the embedding."""
        return self.rank.pp_rank == 0

    @property
    def last_stage(self) -> bool:
        """Whether the rank holds the last norm and the output layer."""
        return self.rank.pp_rank == self.rank.parallel.pipeline_parallel_size - 1

    @property
    def samples(self) -> bool:
        """Whether the rank has logits and draws tokens from them."""
        return self.last_stage and not self.spec.pooling

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The layers of the rank's stage."""
        stages = self.rank.parallel.pipeline_parallel_size
        return _stage_layers(self.spec, stages, self.rank.pp_rank)

    @property
    def kinds(self) -> tuple[Layer, ...]:
        """The layers of the stage, one of each kind."""
        stages = self.rank.parallel.pipeline_parallel_size
        return _stage_kinds(self.spec, stages, self.rank.pp_rank)

    @property
    def mixers(self) -> tuple[Mixer, ...]:
        """Those of the stage, one of each kind."""
        return mixers_of(self.kinds)

    @property
    def has_experts(self) -> bool:
        """Whether a layer is a mixture of experts."""
        return any(isinstance(layer.mlp, MoE) for layer in self.kinds)

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

    def widths(self, layer: Layer) -> tuple[int, int]:
        """Features of the rank's queries, and of its keys (or values), in the widest mixer."""
        found = [mixer_widths(mixer, self.rank) for mixer in layer.mixers]
        return max(found, default=(0, 0))

    def inner(self, layer: Layer) -> int:
        """Rows of the rank's share of the MLP, or of one expert."""
        if layer.mlp is None:
            return 0
        if isinstance(layer.mlp, MoE):
            parallel = self.rank.parallel
            shares = 1 if parallel.expert_parallel else parallel.expert_ranks
            return layer.mlp.intermediate_size // shares
        return layer.mlp.intermediate_size // self.tensor_parallel_size

    @property
    def expert_tokens(self) -> int:
        """Tokens of a step that a rank's experts see: those of all replicas, gathered.

        (`distributed/device_communicators/all2all.py: AgRsAll2AllManager`, the default.)
        """
        return self.max_num_batched_tokens * self.rank.parallel.data_parallel_size

    @property
    def times_kernels(self) -> bool:
        """Whether the profile run compiles, and times what it compiles."""
        timed = self.rules.times_kernels and not self.options.warm_compile_cache
        return timed and not self.eager

    @property
    def is_recent(self) -> bool:
        """Hopper or newer, which the constants were measured on; so is a device of unknown kind."""
        capability = None if self.device is None else self.device.capability
        return capability is None or (9, 0) <= capability < (12, 0)

    @property
    def chip(self) -> Mapping[str, int]:
        """L2 cache and multiprocessors of the device."""
        return chip(self.device)

    def tensor_sizes(self) -> Mapping[int, int]:
        """How many parameters of the rank have so many bytes."""
        return _tensor_sizes(self.spec, self.rank, "F32" if self.element_bytes == 4 else "BF16")


@lru_cache(maxsize=256)
def _tensor_sizes(spec: ModelSpec, rank: Rank, dtype: str) -> Counter[int]:
    return Counter(
        dtype_bytes(weight.held_dtype(dtype), elements)
        for weight in held(spec, rank)
        if (elements := prod(weight.rank_shape(rank)))
    )


@lru_cache(maxsize=256)
def _stage_layers(spec: ModelSpec, stages: int, pp_rank: int) -> tuple[Layer, ...]:
    return tuple(spec.layers[i] for i in pipeline_layers(spec.num_layers, stages, pp_rank))


@lru_cache(maxsize=256)
def _stage_kinds(spec: ModelSpec, stages: int, pp_rank: int) -> tuple[Layer, ...]:
    """Layers alike mostly share one object, which is quicker to see than to compare."""
    objects = {id(layer): layer for layer in _stage_layers(spec, stages, pp_rank)}
    return tuple(dict.fromkeys(objects.values()))


@lru_cache(maxsize=256)
def mixer_widths(mixer: Mixer, rank: Rank) -> tuple[int, int]:
    """Features that a mixer's first projection makes on a rank: (queries, keys or values).

    A recurrence has all of its inputs as queries, and what it gives back as values.
    """
    if isinstance(mixer, LatentAttention):
        return mixer.heads(mixer.qk_head_dim).span(rank)[1], mixer.latent_size
    made = given = 0
    for weight in mixer.weights(Place(prefix="", where=0, hidden_size=1)):
        if weight.linear and weight.cut is Cut.OUTPUT:
            made = max(made, weight.rank_shape(rank)[-2])
        if weight.linear and weight.cut is Cut.INPUT:
            given = max(given, weight.rank_shape(rank)[-1])
    if isinstance(mixer, Attention):
        return given, max(made - given, 0) // 2
    return made, given


@lru_cache(maxsize=8)
def arithmetic(spec: ModelSpec) -> str:
    """How most linear layers multiply: `plain`, `fp8`, `fp8_block`, `int8`, or `packed`.

    Packed weights are widened as they are multiplied; the others quantize activations too.
    """
    if spec.quantization is None:
        return "plain"
    matrices = [w for w in loaded_parameters(spec) if w.columns is not None and not w.experts]
    dtypes = {weight.dtype for weight in matrices}
    if "F8_E4M3" in dtypes:
        scales = (w for w in matrices if "_scale" in w.name and w.dtype in ("F32", "F8_E8M0"))
        return "fp8_block" if any((w.columns or 0) > 1 for w in scales) else "fp8"
    if "I8" in dtypes:
        return "int8"
    return "packed" if dtypes & {"I32", "U8", "F4"} else "plain"


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
