"""How a quantization says what stands for a weight: in its checkpoint, and in an engine."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator

from tightfit.model.layout import Parallel, Weight


class Quantization(ABC):
    """The scheme of a checkpoint, or one that an engine applies while it loads.

    The two views of a weight differ by little: an engine has placeholders for scales that a
    checkpoint may lack, and no use for some that it holds.
    """

    __slots__ = ()

    @property
    @abstractmethod
    def name(self) -> str:
        """vLLM's name of the method, and the scheme: `compressed-tensors (w4a16 group 128)`."""

    @abstractmethod
    def apply(self, weight: Weight) -> Iterator[Weight]:
        """What a checkpoint holds for a weight: packed values and scales, or the weight itself.

        Raises:
            LayoutError: the weight does not divide into the scheme's groups.
            UnsupportedModelError: an engine holds parts as one that are quantized differently.
        """

    def loaded(self, weight: Weight) -> Iterator[Weight]:
        """What an engine holds for a weight before its kernels rearrange it.

        Raises:
            LayoutError, UnsupportedModelError: as `apply`.
        """
        return self.apply(weight)

    def fitted(self, weights: Iterable[Weight], parallel: Parallel) -> "Quantization":
        """As an engine adapts it to a layout.

        Args:
            weights: of the model, before they are quantized.
            parallel: the layout.
        """
        return self

    @property
    def optional_sources(self) -> tuple[str, ...]:
        """Regular expressions of tensors that such checkpoints may hold beside the expected."""
        return ()

    def refusal(self, version: tuple[int, int]) -> str | None:
        """Why vLLM of a version, such as (0, 32), does not load it; None if it does."""
        return None
