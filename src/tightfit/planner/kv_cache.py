"""How an engine cuts the KV cache into blocks, and how many a sequence needs.

vLLM gives every layer a page of `block_size` tokens and draws all pages from one pool
(`v1/core/kv_cache_utils.py: get_kv_cache_groups`). Layers of one kind form groups of equal size, so
that a block of the pool holds one page of each layer of any group. A sequence then needs blocks per
group: all its tokens in a full group, and in a sliding one the window plus what is in flight.
"""

from collections import Counter
from dataclasses import dataclass

from tightfit.model.blocks.attention import Attention, head_axes
from tightfit.model.layout import Rank, pipeline_layers
from tightfit.model.spec import ModelSpec
from tightfit.units import cdiv


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerKind:
    """Layers that store alike: bytes of one token, and the window (None sees everything)."""

    token_bytes: int
    window: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class KVLayout:
    """The pool of one rank: what a block costs, and the groups that draw blocks from it."""

    block_size: int
    bytes_per_block: int
    groups: tuple[LayerKind, ...]
    layers: tuple[tuple[LayerKind, int], ...]
    """Each kind, and how many layers of the rank are of it."""
    in_flight_tokens: int
    """Tokens a sliding group may hold beyond its window, while steps overlap."""

    def blocks(self, tokens: int) -> int:
        """Blocks that the engine reserves for one sequence of that many tokens."""
        return sum(self._group_blocks(kind, tokens) for kind in self.groups)

    def _group_blocks(self, kind: LayerKind, tokens: int) -> int:
        if kind.window is None:
            return cdiv(tokens, self.block_size)
        reach = min(kind.window - 1 + self.in_flight_tokens, tokens)
        return cdiv(reach, self.block_size) + 1

    def minimum_bytes(self, tokens: int) -> int:
        """Bytes of the keys and values that attention can still see, without any rounding."""
        return sum(
            count * kind.token_bytes * min(tokens, kind.window or tokens)
            for kind, count in self.layers
        )

    def all_full_bytes(self, tokens: int) -> int:
        """Bytes if every layer kept every token."""
        blocks = cdiv(tokens, self.block_size)
        return blocks * self.block_size * self.bytes_per_token

    @property
    def bytes_per_token(self) -> int:
        """What one more token costs while it is inside every window."""
        return sum(count * kind.token_bytes for kind, count in self.layers)

    def longest(self, available_blocks: int, limit: int) -> int:
        """The longest sequence, up to `limit`, that fits into so many blocks; 0 if none does."""
        low, high = 0, limit
        while low < high:
            middle = (low + high + 1) // 2
            if self.blocks(middle) <= available_blocks:
                low = middle
            else:
                high = middle - 1
        return low


def layer_kinds(
    spec: ModelSpec, rank: Rank, element_bytes: int, *, windows: bool = True
) -> Counter[LayerKind]:
    """The kinds of a rank's layers; without `windows` every layer keeps all tokens."""
    found: Counter[LayerKind] = Counter()
    stages = rank.parallel.pipeline_parallel_size
    attentions = Counter(
        spec.layers[i].attention for i in pipeline_layers(spec.num_layers, stages, rank.pp_rank)
    )
    for attention, count in attentions.items():
        kind = LayerKind(
            token_bytes=token_bytes(attention, rank, element_bytes),
            window=attention.window if windows else None,
        )
        found[kind] += count
    return found


def token_bytes(attention: Attention, rank: Rank, element_bytes: int) -> int:
    """Bytes of one token's keys and values in one layer of a rank."""
    _, keys = head_axes(attention)
    return 2 * keys.span(rank)[1] * element_bytes


def kv_layout(kinds: Counter[LayerKind], *, block_size: int, in_flight_tokens: int = 0) -> KVLayout:
    """Group the layers as vLLM does when their pages are of one size.

    The group size is the count of the rarest kind, or of the most frequent one if that is less
    than half as many again; groups that a kind does not fill are padded.
    """
    counts = kinds.values()
    size = max(counts) if max(counts) < 1.5 * min(counts) else min(counts)
    if len(kinds) == 1:
        size = max(counts)
    groups: list[LayerKind] = []
    for kind, count in kinds.items():
        groups += [kind] * cdiv(count, size)
    page_bytes = block_size * max(kind.token_bytes for kind in kinds)
    return KVLayout(
        block_size=block_size,
        bytes_per_block=size * page_bytes,
        groups=tuple(groups),
        layers=tuple(kinds.items()),
        in_flight_tokens=in_flight_tokens,
    )
