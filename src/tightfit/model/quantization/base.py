"""What a quantized checkpoint holds in place of a linear layer's weight."""

from abc import ABC, abstractmethod
from collections.abc import Iterator

from tightfit.model.layout import Weight


class Quantization(ABC):
    """The scheme of a checkpoint, or one that an engine applies while it loads."""

    __slots__ = ()

    @abstractmethod
    def apply(self, weight: Weight) -> Iterator[Weight]:
        """The tensors that stand for a weight: packed values and scales, or the weight itself.

        Raises:
            LayoutError: the weight does not divide into the scheme's groups.
        """
