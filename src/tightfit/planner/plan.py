"""`Plan`: what an engine will allocate on every rank, and whether it fits.

`plan` fills in `planned_bytes`, `run` fills in `measured_bytes`; both print the same document
(schema 1). Keys may be added to the schema, never renamed.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from tightfit import __version__
from tightfit.planner.devices import Device
from tightfit.planner.options import Resolved

SCHEMA = 1

Origin = Literal["exact", "derived", "calibrated"]
"""Exact from shapes; derived by a formula over the options; calibrated by a measured constant."""

COMPONENTS = (
    "weights",
    "weights_after_load",
    "kv_cache",
    "activations",
    "logits_and_sampler",
    "persistent_buffers",
    "moe_workspace",
    "cuda_graphs",
    "vision_encoder",
    "encoder_cache",
    "non_torch",
    "cuda_context",
    "nccl",
    "block_tables",
    "allocator_cache",
    "lora",
    "process_baseline",
)
"""Names of a rank's components, in the order in which they are shown."""

HOST_COMPONENTS = (
    "loading_peak",
    "process_baseline",
    "mm_processor_cache",
    "pinned_buffers",
    "cpu_offload",
    "kv_offload",
    "cpu_kv_cache",
)
"""Names of the host's components, likewise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Component:
    """One line of the budget: how many bytes, and how they were computed."""

    name: str
    planned_bytes: int
    origin: Origin
    formula: str
    """The formula with the numbers in it, for `--explain`."""
    measured_bytes: int | None = None
    detail: Mapping[str, int] = field(default_factory=dict)
    """Parts of the whole that a reader may ask for, such as padding."""
    inside_budget: bool = True
    """Whether the engine takes it from its budget, and hence from the KV cache."""

    @property
    def resident_bytes(self) -> int:
        """What of it the device still holds once the engine has started."""
        return self.detail.get("resident_bytes", self.planned_bytes)

    def to_json(self) -> dict[str, Any]:
        """The component in schema 1."""
        document: dict[str, Any] = {
            "name": self.name,
            "planned_bytes": self.planned_bytes,
            "origin": self.origin,
            "formula": self.formula,
        }
        if self.measured_bytes is not None:
            document["measured_bytes"] = self.measured_bytes
        if self.detail:
            document["detail"] = dict(self.detail)
        if not self.inside_budget:
            document["inside_budget"] = False
        return document


@dataclass(frozen=True, slots=True, kw_only=True)
class RankPlan:
    """The memory of one rank. Without a device there is no budget."""

    rank: int
    pp_rank: int
    tp_rank: int
    components: tuple[Component, ...]
    budget_bytes: int | None
    driver_used_bytes: int | None = None
    """What the device's own tool will show as used once the engine has started."""

    @property
    def total_bytes(self) -> int:
        """Everything that the budget pays for."""
        return sum(c.planned_bytes for c in self.components if c.inside_budget)

    @property
    def headroom_bytes(self) -> int | None:
        """What the budget leaves; negative if it does not fit."""
        return None if self.budget_bytes is None else self.budget_bytes - self.total_bytes

    def component(self, name: str) -> Component:
        """The component of that name."""
        return next(c for c in self.components if c.name == name)

    def to_json(self) -> dict[str, Any]:
        """The rank in schema 1."""
        return {
            "rank": self.rank,
            "pp_rank": self.pp_rank,
            "tp_rank": self.tp_rank,
            "components": [component.to_json() for component in self.components],
            "budget_bytes": self.budget_bytes,
            "total_bytes": self.total_bytes,
            "headroom_bytes": self.headroom_bytes,
            "driver_used_bytes": self.driver_used_bytes,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class KVPlan:
    """The KV cache, in the terms of the engine; the worst rank decides.

    `available_bytes`, `num_blocks`, `tokens` and `max_concurrency` are None without a device.
    """

    dtype: str
    block_size: int
    bytes_per_block: int
    bytes_per_token: int
    available_bytes: int | None
    num_blocks: int | None
    tokens: int | None
    max_concurrency: float | None
    minimum_bytes: int
    reserved_bytes: int
    all_full_bytes: int

    def to_json(self) -> dict[str, Any]:
        """The KV cache in schema 1."""
        return {
            "dtype": self.dtype,
            "block_size": self.block_size,
            "bytes_per_block": self.bytes_per_block,
            "bytes_per_token": self.bytes_per_token,
            "available_bytes": self.available_bytes,
            "num_blocks": self.num_blocks,
            "tokens": self.tokens,
            "max_concurrency": self.max_concurrency,
            "one_sequence": {
                "minimum_bytes": self.minimum_bytes,
                "reserved_bytes": self.reserved_bytes,
                "all_full_bytes": self.all_full_bytes,
            },
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Whether one sequence of `max_model_len` fits; None when no device was named."""

    fits: bool | None
    reason: str
    engine_message: str | None = None
    """The very error that the engine would print."""
    max_model_len_that_fits: int | None = None

    def to_json(self) -> dict[str, Any]:
        """The verdict in schema 1."""
        return {
            "fits": self.fits,
            "reason": self.reason,
            "engine_message": self.engine_message,
            "max_model_len_that_fits": self.max_model_len_that_fits,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSummary:
    """The model of a plan."""

    name: str
    architecture: str
    params: int
    checkpoint_bytes: int
    weights_origin: str
    """`headers` if the checkpoint's own headers were read and agree, else `shapes`."""
    is_encoder_decoder: bool = False
    """Nothing works without its encoder: Whisper."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """One remedy: what to change, what it gains on the tightest rank, and what it costs."""

    change: str
    """As one would type it: `--max-num-seqs 256`."""
    saves_bytes: int
    costs: str
    fits: bool | None = None
    """Whether the plan fits with this change alone."""

    def to_json(self) -> dict[str, Any]:
        """The advice in schema 1."""
        return {
            "change": self.change,
            "saves_bytes": self.saves_bytes,
            "costs": self.costs,
            "fits": self.fits,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The whole answer of `tightfit plan`, and the promise that `tightfit run` checks."""

    model: ModelSummary
    engine: str
    engine_version: str
    entrypoint: str
    device: Device | None
    options: Resolved
    ranks: tuple[RankPlan, ...]
    kv_cache: KVPlan
    verdict: Verdict
    not_modelled: tuple[str, ...]
    host: tuple[Component, ...] = ()
    """What all processes of the engine together take of the host's memory."""
    advice: tuple[Advice, ...] = ()
    warnings: tuple[str, ...] = ()
    """What the user should know, such as an assumption that was made."""

    def to_json(self) -> dict[str, Any]:
        """The document of schema 1."""
        return {
            "schema": SCHEMA,
            "tightfit": __version__,
            "model": {
                "name": self.model.name,
                "architecture": self.model.architecture,
                "params": self.model.params,
                "checkpoint_bytes": self.model.checkpoint_bytes,
                "weights_origin": self.model.weights_origin,
            },
            "engine": {
                "name": self.engine,
                "version": self.engine_version,
                "entrypoint": self.entrypoint,
            },
            "device": None if self.device is None else self._device_json(self.device),
            "options": self.options.to_json(),
            "ranks": [rank.to_json() for rank in self.ranks],
            "kv_cache": self.kv_cache.to_json(),
            "host": {
                "components": [component.to_json() for component in self.host],
                "total_bytes": sum(component.planned_bytes for component in self.host),
            },
            "verdict": self.verdict.to_json(),
            "advice": [advice.to_json() for advice in self.advice],
            "not_modelled": list(self.not_modelled),
            "warnings": list(self.warnings),
        }

    def _device_json(self, device: Device) -> dict[str, Any]:
        return {
            "name": device.name,
            "total_bytes": device.total_bytes,
            "usable_bytes": self.ranks[0].budget_bytes,
        }
