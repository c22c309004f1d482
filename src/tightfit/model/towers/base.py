"""What a plan needs to know of an encoder: its parameters, its width, its tokens per item."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from tightfit.errors import UsageError
from tightfit.model.layout import Weight

_LARGEST = 2**40
MODALITIES = ("image", "video", "audio", "vision_chunk")
Sizes = Mapping[str, Mapping[str, int]]
"""Per modality, the `width`, `height`, `num_frames` or `length` of `limit_mm_per_prompt`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """The largest item of a modality: what the encoder reads, and what the decoder gets."""

    modality: str
    patches: int
    """Positions inside the encoder."""
    tokens: int
    """Embeddings that the decoder receives, which is what an encoder budget counts."""
    inputs: int = 0
    """Elements of the item's tensors on the device, such as pixels."""
    profiled_tokens: int | None = None
    """Embeddings of the item that an engine profiles, where the budget counts a larger one."""

    @property
    def embeddings(self) -> int:
        """Embeddings that come out when the item is profiled."""
        return self.tokens if self.profiled_tokens is None else self.profiled_tokens


class Media(ABC):
    """How large items become: the arithmetic of a processor.

    A `processor` holds the keys of `preprocessor_config.json`, overridden by those of
    `mm_processor_kwargs`; those of one modality may be nested in `images_kwargs` or
    `videos_kwargs`, which is also where a `video_preprocessor_config.json` belongs.
    """

    __slots__ = ()

    @abstractmethod
    def items(
        self, processor: Mapping[str, Any], max_tokens: int, sizes: Sizes, active: Collection[str]
    ) -> tuple[Item, ...]:
        """The largest item of each modality.

        Args:
            processor: the processor's settings; absent ones are those of the published model.
            max_tokens: tokens of the longest context, which bounds videos.
            sizes: the user's limits of width, height, or number of frames; media whose items have
                one size only ignore them.
            active: modalities that share the context, which matters to some models: InternVL.
        """

    def largest(self, processor: Mapping[str, Any], max_tokens: int) -> tuple[Item, ...]:
        """The largest items if nothing limits them."""
        return self.items(processor, max_tokens, {}, MODALITIES)

    def profiled(
        self, processor: Mapping[str, Any], max_tokens: int, sizes: Sizes, active: Collection[str]
    ) -> tuple[Item, ...]:
        """The largest items of the modalities that are active."""
        items = self.items(processor, max_tokens, sizes, active)
        return tuple(item for item in items if item.modality in active)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tower:
    """One encoder with its projector.

    The sizes are those of a layer, from which an engine's activations are derived.
    """

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
    """Features of an embedding that the decoder receives, deepstack features included."""
    gated: bool = False
    """Its MLPs have a gate."""
    rotary: bool = False
    """Queries and keys are rotated, which needs copies of both."""
    copies: int = 0
    """More copies of all heads' features that vLLM's code makes during attention."""
    held: int = 0
    """Features per position that stay beside the layers: the first layer's input, which a caller
    still refers to, and positions that were added to it."""
    mergers: int = 1
    """Projectors whose outputs lie side by side in `output_size`: deepstack."""
    unbuilt: frozenset[str] = frozenset()
    """Names of weights that checkpoints hold and vLLM leaves out, such as unused last layers."""
    most_items: Mapping[str, int] = field(default_factory=dict)
    """Items per prompt beyond which the model does not go; absent where there is no bound."""
    data_parallel: bool = False
    """vLLM can replicate it and deal the items to ranks: `mm_encoder_tp_mode="data"`."""
    whole_items: bool = False
    """Tokens of an item see each other both ways, so that a step has to take it whole."""
    profiled: bool = True
    """vLLM runs it to measure its memory; encoders of speech models run as part of a step."""


def scoped(processor: Mapping[str, Any], scope: str) -> dict[str, Any]:
    """Settings for one modality: those of its `scope` (`images_kwargs`) come first."""
    nested = processor.get(scope)
    return {**processor, **nested} if isinstance(nested, Mapping) else dict(processor)


def whole_number(settings: Mapping[str, Any], key: str, default: int, minimum: int = 1) -> int:
    """A setting of a processor.

    Raises:
        UsageError: it is not a whole number of a possible size.
    """
    value = settings.get(key)
    if value is None:
        return default
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if isinstance(value, bool) or not whole or not minimum <= value < _LARGEST:
        raise UsageError(
            f"the processor's {key} = {str(value)[:40]!r} is out of range",
            hint=f"a whole number of at least {minimum}; see --mm-processor-kwargs",
        )
    return int(value)


def size_limit(sizes: Sizes, modality: str, name: str, largest: int) -> int:
    """The user's limit of a width, a height or a number, which only makes items smaller."""
    given = sizes.get(modality, {}).get(name)
    return largest if given is None else max(1, min(largest, given))
