"""What differs between engines, as one small interface."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from tightfit.model.layout import Parallel, Rank
from tightfit.model.spec import ModelSpec
from tightfit.planner.devices import Device
from tightfit.planner.kv_cache import KVLayout
from tightfit.planner.options import PlanOptions, Resolved
from tightfit.planner.plan import Component
from tightfit.planner.resolve import model_max_len


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployed:
    """The ranks of a replica, as the memory of their host sees them."""

    weights_by_rank: Sequence[int]
    """Bytes of the weights of each rank, offloaded ones included."""
    checkpoint_bytes: int
    """Of the plain checkpoint."""
    offloaded_by_rank: Sequence[int] = ()
    """Bytes of the weights that stay on the host."""
    pool_bytes: int = 0
    """A rank's KV cache; it is the host's only on the CPU backend."""
    kv: KVLayout | None = None
    """The blocks of a rank, for the block tables of the V1 runner."""


class Engine(ABC):
    """The memory model of one inference engine."""

    name: str
    version: str
    not_modelled: tuple[str, ...]
    """What this model leaves out, so that nobody takes it for zero."""
    warnings: tuple[str, ...] = ()
    """What the user should know of plans for this engine, such as an unknown version."""
    models_driver: bool = False
    """Whether the components add up to what the driver of the device will show."""
    held_back_blocks: int = 0
    """Blocks of the pool that no sequence can have."""
    out_of_memory: str = "out of memory"
    """What the engine prints when an allocation fails."""

    @abstractmethod
    def parallel(self, options: PlanOptions) -> Parallel:
        """The layout that the options ask for."""

    def longest(self, spec: ModelSpec) -> int:
        """The longest context that the config allows."""
        return model_max_len(spec)

    def adapt(self, spec: ModelSpec, options: PlanOptions) -> ModelSpec:
        """The model as the engine builds it: without what is switched off, quantized if asked.

        Raises:
            UsageError: a quantization that the engine or the checkpoint does not allow.
        """
        del options
        return spec

    def offloaded_bytes(self, spec: ModelSpec, rank: Rank, options: PlanOptions, dtype: str) -> int:
        """Bytes of a rank's weights that live in the memory of the host."""
        del spec, rank, options, dtype
        return 0

    def host(
        self, spec: ModelSpec, resolved: Resolved, deployed: Deployed
    ) -> tuple[Component, ...]:
        """What all processes together take of the host's memory; nothing if it is not modelled."""
        del spec, resolved, deployed
        return ()

    @abstractmethod
    def resolve(self, spec: ModelSpec, options: PlanOptions) -> Resolved:
        """Every option that matters to memory, with its default filled in."""

    def check(self, spec: ModelSpec, resolved: Resolved) -> None:
        """Refuse what the engine would not start with, as its own first checks do.

        Raises:
            UsageError: options, or a device, that do not go with the model.
            UnsupportedModelError: options that are not modelled.
        """
        del spec, resolved

    @abstractmethod
    def components(self, spec: ModelSpec, rank: Rank, resolved: Resolved) -> tuple[Component, ...]:
        """Everything that a rank holds beside weights and KV cache."""

    @abstractmethod
    def kv_layout(self, spec: ModelSpec, rank: Rank, resolved: Resolved) -> KVLayout:
        """The blocks of a rank's KV cache."""

    @abstractmethod
    def budget_bytes(self, device: Device, parallel: Parallel, resolved: Resolved) -> int:
        """What a rank may use of its device."""

    def free_bytes(self, device: Device, components: Sequence[Component]) -> int:
        """What of a device is free when the engine first looks, and its budget has to be."""
        del components
        return device.total_bytes

    def not_free(self, free_bytes: int, device: Device, resolved: Resolved) -> str:
        """The error that the engine prints when that is less than its budget."""
        share = resolved.gpu_memory_utilization.value
        return f"{free_bytes} of {device.total_bytes} bytes are free, and {share} of all are wanted"

    def pool_blocks(self, available_blocks: int, layout: KVLayout, resolved: Resolved) -> int:
        """Blocks that the engine takes when so many are available."""
        del layout, resolved
        return available_blocks

    def cache_tokens(self, blocks: int, layout: KVLayout, length: int) -> int:
        """The size of a pool in tokens, in sequences of `length`, as the engine prints it."""
        return int(blocks / layout.blocks(length) * length)

    def refusal(self, needed_bytes: int, available_bytes: int, longest: int, length: int) -> str:
        """The error that the engine prints when a sequence of `length` does not fit."""
        return (
            f"one sequence of {length} tokens needs {needed_bytes} bytes of KV cache, and "
            f"{available_bytes} are available; {longest} tokens would fit"
        )
