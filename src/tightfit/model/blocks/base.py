"""What every block of a model is: a description that knows its parameters and its cache.

A kind of block is one frozen dataclass in a file of this package. Adding a kind needs no change
elsewhere, except where an engine's own formulas treat it specially.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

from tightfit.model.cache import Cache, StateCache, TokenCache
from tightfit.model.layout import Rank, Stage, Weight


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a block sits: its module, its layer or pipeline stage, and the hidden size there."""

    prefix: str
    where: int | Stage
    hidden_size: int

    def inside(self, module: str) -> "Place":
        """The place of a submodule; an empty name is the module itself."""
        prefix = f"{self.prefix}.{module}" if module else self.prefix
        return Place(prefix=prefix, where=self.where, hidden_size=self.hidden_size)


class Block(ABC):
    """Something with parameters."""

    __slots__ = ()

    @abstractmethod
    def weights(self, place: Place) -> Iterator[Weight]:
        """Its parameters, named for the module of `place` (the layer's own, for a mixer or MLP)."""


class Mixer(Block):
    """A block through which tokens see each other: attention of some kind, or a recurrence."""

    __slots__ = ()

    @property
    def is_recurrent(self) -> bool:
        """Whether it keeps a state of fixed size, and nothing for each token."""
        return any(isinstance(cache, StateCache) for cache in self.caches(Rank()))

    @property
    def is_windowed(self) -> bool:
        """Whether it sees only the last tokens."""
        return any(isinstance(c, TokenCache) and c.window is not None for c in self.caches(Rank()))

    @property
    def is_chunked(self) -> bool:
        """Whether it sees only a token's own chunk."""
        return any(isinstance(c, TokenCache) and c.chunk is not None for c in self.caches(Rank()))

    @abstractmethod
    def caches(self, rank: Rank) -> tuple[Cache, ...]:
        """What it keeps of a sequence on a rank.

        Raises:
            LayoutError: its heads cannot be dealt to that many ranks.
        """
