"""InternVL's tiles: an image is cut into a grid of squares, and a frame of a video is one.

Sources: vLLM's `internvl.py` and `transformers_utils/processors/internvl.py`.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from tightfit.model.towers.base import Item, Media, Sizes, size_limit, whole_number

MOST_TILES = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class TileNames:
    """What a processor calls its settings."""

    smallest: str = "min_dynamic_patch"
    largest: str = "max_dynamic_patch"
    thumbnail: str = "use_thumbnail"


@dataclass(frozen=True, slots=True, kw_only=True)
class InternVLMedia(Media):
    """An image is cut into tiles, with a thumbnail if there are several; a frame is one tile."""

    image_size: int
    patches: int
    """Positions of a tile inside the encoder."""
    tokens: int
    """Embeddings of a tile."""
    channels: int
    has_video: bool
    min_tiles: int
    max_tiles: int
    thumbnail: bool
    names: TileNames = TileNames()

    def items(
        self, processor: Mapping[str, Any], max_tokens: int, sizes: Sizes, active: Collection[str]
    ) -> tuple[Item, ...]:
        """A video fills what one image leaves of the context.

        When a video is profiled, there is no image beside it, so it may be longer.
        """
        most = self._tiles(processor, None)
        limited = "height" in sizes.get("image", {}) or "width" in sizes.get("image", {})
        found = []
        if "image" in active:
            tiles = self._tiles(processor, sizes) if limited else most
            found.append(self._item("image", tiles))
        if "video" in active and self.has_video:
            room = max_tokens - (most * self.tokens if "image" in active else 0)
            counted = self._frames(room, sizes)
            shown = self._item("video", self._frames(max_tokens, sizes))
            found.append(replace(shown, tokens=counted * self.tokens, profiled_tokens=shown.tokens))
        return tuple(found)

    def _frames(self, room: int, sizes: Sizes) -> int:
        return size_limit(sizes, "video", "num_frames", max(1, room // self.tokens))

    def _item(self, modality: str, tiles: int) -> Item:
        return Item(
            modality=modality,
            patches=tiles * self.patches,
            tokens=tiles * self.tokens,
            inputs=tiles * self.channels * self.image_size**2,
        )

    def _tiles(self, processor: Mapping[str, Any], sizes: Sizes | None) -> int:
        """Tiles of the largest image, or of one that the user's limits make smaller."""
        least = min(whole_number(processor, self.names.smallest, self.min_tiles), MOST_TILES)
        most = min(whole_number(processor, self.names.largest, self.max_tiles), MOST_TILES)
        most = 1 if processor.get("dynamic_image_size") is False else max(most, least)
        thumbnail = bool(processor.get(self.names.thumbnail, self.thumbnail))
        best = most
        if sizes is not None:
            # vLLM profiles the first of the grids with the most tiles, in the order of its set.
            wider = grids(least, most + 1 if thumbnail and most > 1 else most)
            widest = next(grid for grid in wider if grid[0] * grid[1] == most)
            width = size_limit(sizes, "image", "width", widest[0] * self.image_size)
            height = size_limit(sizes, "image", "height", widest[1] * self.image_size)
            columns, rows = self._grid(grids(least, most), width, height)
            best = columns * rows
        return best + (1 if thumbnail and best > 1 else 0)

    def _grid(self, choice: list[tuple[int, int]], width: int, height: int) -> tuple[int, int]:
        """The grid of nearest aspect ratio; of several the largest that the pixels justify."""
        ratio, area = width / height, width * height
        best, nearest = (1, 1), float("inf")
        for columns, rows in choice:
            difference = abs(ratio - columns / rows)
            if difference < nearest:
                best, nearest = (columns, rows), difference
            elif difference == nearest and area > 0.5 * self.image_size**2 * columns * rows:
                best = (columns, rows)
        return best


def grids(least: int, most: int) -> list[tuple[int, int]]:
    """Columns and rows of every grid of `least` to `most` tiles, those with fewest tiles first.

    Among as many tiles the order is that of a set of pairs, which decides what vLLM profiles; it
    depends on how the set was made (`get_internvl_target_ratios`).
    """
    found = {
        (columns, rows)
        for count in range(least, most + 1)
        for columns in range(1, count + 1)
        for rows in range(-(-least // columns), min(count, most // columns) + 1)
    }
    return sorted(found, key=lambda grid: grid[0] * grid[1])
