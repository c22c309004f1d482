"""What a plan needs to know of an encoder: its parameters, its width, its tokens per item."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tightfit.model.layout import Weight


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """The largest item of a modality: what the encoder reads, and what the decoder gets."""

    modality: str
    patches: int
    """Positions inside the encoder."""
    tokens: int
    """Embeddings that the decoder receives."""


class Media(ABC):
    """How large items become: the arithmetic of a processor."""

    __slots__ = ()

    @abstractmethod
    def largest(self, processor: Mapping[str, Any], max_tokens: int) -> tuple[Item, ...]:
        """The largest item of each modality.

        Args:
            processor: `mm_processor_kwargs`, which override the checkpoint's processor.
            max_tokens: tokens of the longest context, which bounds videos.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class Tower:
    """One encoder with its projector."""

    modalities: tuple[str, ...]
    """`image`, `video`, `audio`: limits of 0 for all of them leave the tower out."""
    weights: tuple[Weight, ...]
    media: Media
    hidden_size: int
    intermediate_size: int
    num_heads: int
    head_dim: int
    num_layers: int
    output_size: int
    """Features of an embedding that the decoder receives."""
