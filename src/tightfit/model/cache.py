"""What a layer keeps of a sequence between steps, apart from how an engine pages it.

`TokenCache` grows with the sequence (keys and values), `StateCache` does not (a recurrent state).
Sizes are those of one rank.
"""

from dataclasses import dataclass
from enum import Enum
from math import prod

from tightfit.units import dtype_bytes


class CacheKind(Enum):
    """What the rows of a token cache are, for engines treat them differently."""

    ATTENTION = "attention"
    """Keys and values of KV heads."""
    LATENT = "latent"
    """The compressed keys and values of MLA, the same on every rank."""
    INDEXER = "indexer"
    """Keys by which sparse attention chooses tokens, one row for all heads."""
    PARTIAL = "partial"
    """Sums of tokens that do not make a row yet, where attention compresses: DeepSeek V4."""
    CROSS = "cross"
    """Keys and values of an encoder's output."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenCache:
    """Rows kept for every token: `slots` of `key_size + value_size` features."""

    kind: CacheKind = CacheKind.ATTENTION
    slots: int
    key_size: int
    value_size: int = 0
    window: int | None = None
    """Tokens that are kept, the current one included; None keeps all."""
    chunk: int | None = None
    """Attention sees only its own chunk of so many tokens: Llama 4."""
    dtype: str | None = None
    """A dtype of its own, whatever the rest of the cache has."""
    tokens_per_row: int = 1
    """Tokens that one row stands for, where attention compresses: DeepSeek V4."""
    block_size: int | None = None
    """Tokens of a block, where the engine leaves no choice."""
    page_alignment: int = 1
    """Bytes of which a block is a multiple, where its kernels want that."""

    @property
    def elements_per_token(self) -> int:
        """Features of one token."""
        return self.slots * (self.key_size + self.value_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """One array of a recurrent state."""

    shape: tuple[int, ...]
    role: str
    """`conv` or `ssm`: engines let the user choose a dtype for each."""
    dtype: str | None = None
    """The config's, or None for the engine's default; a user's choice goes before it."""

    def nbytes(self, dtype: str) -> int:
        """Bytes in a dtype."""
        return dtype_bytes(dtype, prod(self.shape))


@dataclass(frozen=True, slots=True, kw_only=True)
class StateCache:
    """Arrays kept for every sequence, whatever its length."""

    kind: str
    """`mamba1`, `mamba2`, `gdn`, `kda`, `short_conv` or `linear_attention`."""
    states: tuple[State, ...]


Cache = TokenCache | StateCache
