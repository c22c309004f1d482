"""Images of LLaVA-NeXT and LLaVA-OneVision: all of one, and tiles of it at a higher resolution.

Sources: vLLM's `llava_next.py` and `llava_onevision.py`.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from tightfit.model.towers.base import Item, Media, Sizes, size_limit

_LARGEST = (944, 1153)
"""Height and width of the image that vLLM profiles for LLaVA-OneVision."""
_MOST_FRAMES = 16
_FULL_GRIDS = 9
"""Tiles beyond whose number LLaVA-OneVision shrinks the grid of embeddings: `anyres_max_9`."""
_SHRINKING = 1.1
Size = tuple[int, int]
"""Height and width."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AnyResolution(Media):
    """An image is scaled to the best of some resolutions and cut into tiles."""

    image_size: int
    """Pixels of the side of a tile."""
    grid: int
    """Patches along the side of a tile."""
    base: int
    """Embeddings of a whole tile, as they are selected."""
    positions: int
    """Of a tile inside the encoder, a class token included."""
    channels: int
    resolutions: tuple[Size, ...]
    one_vision: bool = False
    """LLaVA-OneVision: videos, and a bound on embeddings."""

    def items(
        self, processor: Mapping[str, Any], max_tokens: int, sizes: Sizes, active: Collection[str]
    ) -> tuple[Item, ...]:
        """The resolution with the most embeddings, and as many frames as the context holds."""
        height, width = _LARGEST
        if not self.one_vision:
            height, width = max(self.resolutions, key=self._tokens)
        size = (
            size_limit(sizes, "image", "height", height),
            size_limit(sizes, "image", "width", width),
        )
        rows, columns = self._tiles(size)
        found = [self._item("image", rows * columns + 1, self._tokens(size))]
        if self.one_vision:
            each = math.ceil(self.grid / 2) ** 2
            most = max(1, min((max_tokens - 1) // each, _MOST_FRAMES))
            frames = size_limit(sizes, "video", "num_frames", most)
            found.append(self._item("video", frames, frames * each + 1))
        return tuple(item for item in found if item.modality in active)

    def _item(self, modality: str, tiles: int, tokens: int) -> Item:
        inputs = tiles * self.channels * self.image_size**2
        return Item(modality=modality, patches=tiles * self.positions, tokens=tokens, inputs=inputs)

    def _tiles(self, size: Size) -> Size:
        """Rows and columns of tiles (transformers' `get_anyres_image_grid_shape`)."""
        height, width = best_resolution(size, self.resolutions)
        return height // self.image_size, width // self.image_size

    def _tokens(self, size: Size) -> int:
        """Embeddings of the tile that shows everything, of the tiles, and of ends of lines."""
        rows, columns = (tiles * self.grid for tiles in self._tiles(size))
        height, width = size
        if width / height > columns / rows:
            rows -= 2 * ((rows - int(round(height * (columns / width), 7))) // 2)
        else:
            columns -= 2 * ((columns - int(round(width * (rows / height), 7))) // 2)
        if self.one_vision:
            ratio = math.sqrt(rows * columns / (_FULL_GRIDS * self.grid**2))
            if ratio > _SHRINKING:
                rows, columns = int(rows // ratio), int(columns // ratio)
        return self.base + rows * columns + rows


def best_resolution(size: Size, resolutions: tuple[Size, ...]) -> Size:
    """The one that keeps the most of an image, and of several the one that wastes the least.

    (transformers' `select_best_resolution`.)
    """
    best, most, least = resolutions[0], 0, math.inf
    for height, width in resolutions:
        scale = min(width / size[1], height / size[0])
        kept = min(int(size[1] * scale) * int(size[0] * scale), size[0] * size[1])
        wasted = height * width - kept
        if kept > most or (kept == most and wasted < least):
            best, most, least = (height, width), kept, wasted
    return best
