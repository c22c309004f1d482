"""How an engine cuts the KV cache into blocks, and how many a sequence needs.

vLLM gives every layer a page of `block_size` tokens and draws all pages from one pool
(`v1/core/kv_cache_utils.py: get_kv_cache_groups`). Layers of one kind form groups of equal size, so
that a block of the pool holds one page of each layer of any group. A sequence then needs blocks per
group: all its tokens in a full group, the window plus what is in flight in a sliding one, and a
fixed number of states in a recurrent one. Pipeline stages share the groups of the whole model, and
hold their own layers of each.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from tightfit.errors import UnsupportedModelError
from tightfit.model.cache import CacheKind
from tightfit.planner.kv_kinds import LayerKind
from tightfit.planner.kv_packed import packed_groups, padded_groups
from tightfit.units import cdiv, round_up


@dataclass(frozen=True, slots=True, kw_only=True)
class KVLayout:
    """The pool of one rank: what a block costs, and the groups that draw blocks from it."""

    block_size: int
    bytes_per_block: int
    groups: tuple[LayerKind, ...]
    layers: tuple[tuple[LayerKind, int], ...]
    """Each kind, and how many layers of the rank are of it."""
    in_flight_tokens: int = 0
    """Tokens a local group may hold beyond its window, while steps overlap."""
    state_blocks: int = 1
    """Blocks that a recurrent group reserves for a sequence."""
    encoder_tokens: int = 0
    """Tokens of the encoder that cross attention keeps."""
    context_parallel_size: int = 1
    """Ranks over which the tokens of full attention are spread."""

    def blocks(self, tokens: int) -> int:
        """Blocks that the engine reserves for one sequence of that many tokens."""
        return sum(self._group_blocks(kind, tokens) for kind in self.groups)

    def _group_blocks(self, kind: LayerKind, tokens: int) -> int:
        size = kind.block_size or self.block_size
        if kind.is_state:
            return self.state_blocks
        if kind.kind == CacheKind.CROSS.value:
            return cdiv(self.encoder_tokens, size)
        if kind.chunk is not None:
            return cdiv(min(kind.chunk + self.in_flight_tokens, tokens), size)
        if kind.window is not None:
            return cdiv(min(kind.window - 1 + self.in_flight_tokens, tokens), size) + 1
        return cdiv(cdiv(tokens, self.context_parallel_size), size)

    def minimum_bytes(self, tokens: int) -> int:
        """Bytes that the model itself needs: what attention can still see, and the states."""
        return sum(count * self._layer_bytes(kind, tokens) for kind, count in self.layers)

    def _layer_bytes(self, kind: LayerKind, tokens: int) -> int:
        if kind.kind == CacheKind.CROSS.value:
            return kind.rows_bytes(self.encoder_tokens)
        return kind.state_bytes + kind.rows_bytes(kind.held_tokens(tokens))

    def all_full_bytes(self, tokens: int) -> int:
        """Bytes if every attention layer kept every token."""
        rounded = round_up(tokens, self.block_size)
        others = "state", CacheKind.CROSS.value, CacheKind.PARTIAL.value
        return sum(
            count
            * (self._layer_bytes(kind, tokens) if kind.kind in others else kind.rows_bytes(rounded))
            for kind, count in self.layers
        )

    @property
    def bytes_per_token(self) -> int:
        """What one more token costs while it is inside every window."""
        own = (kind for kind in self.layers if kind[0].kind != CacheKind.CROSS.value)
        return sum(cdiv(count * kind.token_bytes, kind.tokens_per_row) for kind, count in own)

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


def kv_layout(
    kinds: Counter[LayerKind],
    *,
    block_size: int,
    in_flight_tokens: int = 0,
    state_blocks: int = 1,
    encoder_tokens: int = 0,
    padding_ratio: float = 1.5,
    context_parallel_size: int = 1,
    latent_multiple: int = 1,
    packs_pages: bool = True,
    stages: Sequence[Counter[LayerKind]] = (),
    stage: int = 0,
) -> KVLayout:
    """Group the layers as vLLM does.

    Args:
        kinds: of the rank's layers, with their number.
        block_size: tokens of a block, before it grows to hold a recurrent state.
        in_flight_tokens: see `KVLayout`.
        state_blocks: see `KVLayout`.
        encoder_tokens: see `KVLayout`.
        padding_ratio: groups are as large as the most frequent kind if that has less than so many
            times the layers of the rarest; else as the rarest, and padded.
        context_parallel_size: see `KVLayout`.
        latent_multiple: of its tokens, a block of latent attention that grows holds a multiple.
        packs_pages: how pages of several sizes share blocks, see `kv_packed`.
        stages: the kinds of all pipeline stages, where there are several.
        stage: which of them the rank is in.

    Raises:
        UnsupportedModelError: no layer of the rank keeps anything.
    """
    if not kinds:
        raise UnsupportedModelError(
            "the layers of a pipeline stage keep nothing of their own: it has no KV cache to plan",
            hint="use fewer pipeline stages",
        )
    stages = stages or (kinds,)
    every = sum(stages, Counter())
    block_size = enlarged(every, block_size, latent_multiple)
    if any(kind.tokens_per_row > 1 for kind in every):
        pages = {kind: kind.page_bytes(block_size) for kind in every}
        shared = packed_groups if packs_pages else padded_groups
        groups, block_bytes = shared(every, stages[stage], pages)
    else:
        groups, block_bytes = _groups(stages, stage, block_size, padding_ratio)
    return KVLayout(
        block_size=block_size,
        bytes_per_block=block_bytes,
        groups=groups,
        layers=tuple(kinds.items()),
        in_flight_tokens=in_flight_tokens,
        state_blocks=state_blocks,
        encoder_tokens=encoder_tokens,
        context_parallel_size=context_parallel_size,
    )


def enlarged(kinds: Counter[LayerKind], block_size: int, latent_multiple: int = 1) -> int:
    """The block size at which a page of attention holds a recurrent state.

    (`platforms/interface.py: update_block_size_for_backend`; a multiple of the kernel's blocks.)
    """
    states = max((kind.state_bytes for kind in kinds if kind.is_state), default=0)
    tokens = max((kind.token_bytes for kind in kinds), default=0)
    if not states or not tokens:
        return block_size
    if any(kind.kind == CacheKind.LATENT.value for kind in kinds):
        block_size = max(block_size, latent_multiple)
    return block_size * cdiv(states, block_size * tokens)


def _groups(
    stages: Sequence[Counter[LayerKind]], stage: int, block_size: int, padding_ratio: float
) -> tuple[tuple[LayerKind, ...], int]:
    """The groups of the whole model, and the bytes of a block in one stage."""
    kinds, here = sum(stages, Counter()), stages[stage]
    pages = {kind: kind.page_bytes(block_size) for kind in kinds}
    if len({(kind.window, kind.chunk, kind.is_state, kind.kind == "cross") for kind in kinds}) == 1:
        # All need slots for the same tokens: one group, whose layers have pages of their own sizes.
        first = max(kinds, key=lambda kind: pages[kind])
        return (first,), sum(pages[kind] * count for kind, count in here.items())
    page, counts = max(pages.values()), kinds.values()
    size = max(counts) if max(counts) < padding_ratio * min(counts) else min(counts)
    groups: list[LayerKind] = []
    most = 0
    for kind, count in kinds.items():
        # Smaller pages take more tokens where that fills them exactly; others are padded.
        ratio = 1 if kind.is_state or page % pages[kind] else page // pages[kind]
        several = cdiv(count, size)
        groups += [kind if ratio == 1 else replace(kind, block_size=block_size * ratio)] * several
        # Layers are dealt to the groups of their kind in turn: of a run of them, the first group
        # that the run reaches gets the most.
        most = max(most, cdiv(here[kind], several))
    return tuple(groups), most * page
