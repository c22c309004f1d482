"""What the layers of a rank keep of a sequence: the sizes that an engine pages."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from tightfit.model.cache import Cache, CacheKind, State, StateCache, TokenCache
from tightfit.model.layout import Rank, pipeline_layers
from tightfit.model.spec import ModelSpec
from tightfit.units import DTYPE_BITS, cdiv, round_up


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
    tokens_per_row: int = 1
    """`token_bytes` is for so many tokens, where attention compresses."""
    page_alignment: int = 1

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

    def rows_bytes(self, tokens: int) -> int:
        """Bytes of so many tokens."""
        return self.token_bytes * cdiv(tokens, self.tokens_per_row)

    def page_bytes(self, block_size: int) -> int:
        """Bytes of a page, where the pool's blocks have so many tokens."""
        if self.is_state:
            return self.state_bytes
        return round_up(self.rows_bytes(self.block_size or block_size), self.page_alignment)


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
    return LayerKind(
        kind=cache.kind.value,
        token_bytes=token_bytes(cache, dtypes.tokens),
        heads=(cache.slots, cache.key_size, cache.value_size),
        window=cache.window if windows else None,
        chunk=cache.chunk if windows else None,
        block_size=cache.block_size,
        tokens_per_row=cache.tokens_per_row,
        page_alignment=cache.page_alignment,
    )
