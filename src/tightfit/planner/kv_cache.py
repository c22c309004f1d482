"""How an engine cuts the KV cache into blocks, and how many a sequence needs.

vLLM gives every layer a page of `block_size` tokens and draws all pages from one pool
(`v1/core/kv_cache_utils.py: get_kv_cache_groups`). Layers of one kind form groups of equal size, so
that a block of the pool holds one page of each layer of any group. A sequence then needs blocks per
group: all its tokens in a full group, the window plus what is in flight in a sliding one, and a
fixed number of states in a recurrent one. Pipeline stages share the groups of the whole model, and
hold their own layers of each.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from tightfit.errors import UnsupportedModelError
from tightfit.model.cache import Cache, CacheKind, State, StateCache, TokenCache
from tightfit.model.layout import Rank, pipeline_layers
from tightfit.model.spec import ModelSpec
from tightfit.units import DTYPE_BITS, cdiv


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerKind:
    """Layers that store alike: bytes of one token, or of one sequence's state."""

    kind: str = CacheKind.ATTENTION.value
    """A `CacheKind`, or `state`."""
    token_bytes: int = 0
    state_bytes: int = 0
    heads: tuple[int, int, int] | None = None
    """Slots and their key and value sizes: engines tell layers apart whose bytes are the same."""
    window: int | None = None
    chunk: int | None = None
    block_size: int | None = None
    """Tokens of its pages, where they differ from those of the pool."""

    @property
    def is_state(self) -> bool:
        """Whether a sequence needs as much whatever its length."""
        return self.kind == "state"

    @property
    def is_local(self) -> bool:
        """Whether tokens leave the cache while the sequence goes on."""
        return self.window is not None or self.chunk is not None

    def held_tokens(self, tokens: int) -> int:
        """Of a sequence of so many tokens, those that attention can still see."""
        if self.chunk is not None:
            return min(tokens, self.chunk)
        return tokens if self.window is None else min(tokens, self.window)


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
            return kind.token_bytes * self.encoder_tokens
        return kind.state_bytes + kind.token_bytes * kind.held_tokens(tokens)

    def all_full_bytes(self, tokens: int) -> int:
        """Bytes if every attention layer kept every token."""
        rounded = cdiv(tokens, self.block_size) * self.block_size
        return sum(
            count
            * (
                self._layer_bytes(kind, tokens)
                if kind.is_state or kind.kind == CacheKind.CROSS.value
                else kind.token_bytes * rounded
            )
            for kind, count in self.layers
        )

    @property
    def bytes_per_token(self) -> int:
        """What one more token costs while it is inside every window."""
        own = (kind for kind in self.layers if kind[0].kind != CacheKind.CROSS.value)
        return sum(count * kind.token_bytes for kind, count in own)

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


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheDtypes:
    """The dtypes of a cache, in safetensors' spelling or vLLM's own names for packed ones."""

    tokens: str
    conv: str
    ssm: str
    given: frozenset[str] = frozenset()
    """Roles of states whose dtype the user chose, whatever the config says."""

    def of_state(self, state: State) -> str:
        """The dtype of one array of a recurrent state."""
        if state.dtype is not None and state.role not in self.given:
            return state.dtype
        return self.ssm if state.role == "ssm" else self.conv

    @classmethod
    def of(cls, dtype: str) -> "CacheDtypes":
        """One dtype for everything."""
        return cls(tokens=dtype, conv=dtype, ssm=dtype)


_PER_HEAD_SCALES = 8
"""Two float32 scales for each KV head and token, also where keys serve as values
(`TritonAttentionBackend.customize_spec`, `MLACommonBackend.customize_spec`)."""
_MLA_ROWS: Mapping[str, int] = {"fp8_ds_mla": 656, "nvfp4_ds_mla": 352}
"""Bytes of a token in the packed rows of DeepSeek V3.2, whatever the sizes in its config."""


def token_bytes(cache: TokenCache, dtype: str) -> int:
    """Bytes of one token in one layer of a rank (`v1/kv_cache_interface.py`)."""
    if cache.dtype is not None:
        return cache.elements_per_token * DTYPE_BITS[cache.dtype] // 8
    if dtype in _MLA_ROWS:
        return _MLA_ROWS[dtype] * cache.slots
    both = cache.key_size + cache.value_size
    if dtype in ("int8_per_token_head", "fp8_per_token_head"):
        return cache.slots * (both + _PER_HEAD_SCALES)
    if dtype == "int4_per_token_head":
        return cache.slots * (both // 2 + _PER_HEAD_SCALES)
    if dtype == "nvfp4":
        return cache.slots * (both // 2 + both // 16)
    return cache.slots * both * DTYPE_BITS[dtype] // 8


def layer_kinds(
    spec: ModelSpec, rank: Rank, dtypes: CacheDtypes, *, windows: bool = True
) -> Counter[LayerKind]:
    """The kinds of a rank's layers; without `windows` every layer keeps all tokens."""
    stages = rank.parallel.pipeline_parallel_size
    span = pipeline_layers(spec.num_layers, stages, rank.pp_rank)
    mixers = Counter(mixer for i in span for mixer in spec.layers[i].mixers)
    found: Counter[LayerKind] = Counter()
    for mixer, count in mixers.items():
        for cache in mixer.caches(rank):
            found[_kind(cache, dtypes, windows=windows)] += count
    return found


def _kind(cache: Cache, dtypes: CacheDtypes, *, windows: bool) -> LayerKind:
    if isinstance(cache, StateCache):
        size = sum(state.nbytes(dtypes.of_state(state)) for state in cache.states)
        return LayerKind(kind="state", state_bytes=size)
    if cache.tokens_per_row > 1:
        raise UnsupportedModelError(
            "the KV cache of compressed attention (DeepSeek V4) is not planned yet"
        )
    return LayerKind(
        kind=cache.kind.value,
        token_bytes=token_bytes(cache, dtypes.tokens),
        heads=(cache.slots, cache.key_size, cache.value_size),
        window=cache.window if windows else None,
        chunk=cache.chunk if windows else None,
    )


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
    pages = {kind: kind.state_bytes or block_size * kind.token_bytes for kind in kinds}
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
