"""Images and chunks of videos of Kimi K2.5, and images of Kimi-VL and Kimi K3.

Sources: vLLM's `kimi_vl.py`, `kimi_k25.py`, `kimi_k25_vision_fused.py` and
`kimi_k3/common/mm_preprocess.py`. The default settings are those of the published
`preprocessor_config.json`, of the later ones in `media_proc_cfg`.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import sqrt
from typing import Any

from tightfit.model.towers.base import Item, Media, Sizes, scoped, size_limit, whole_number
from tightfit.units import cdiv, round_up

KNOWN_LARGEST = (7041, 1861)
"""Height and width of the largest image of K3, as `search_largest` finds them."""
PROFILED_SIDE = 3000
"""Pixels of the image that vLLM profiles (`kimi_k25.py: MaxImageTokenMeta`)."""
_FIRST_SIDE = 1024
"""The same of Kimi-VL (`kimi_vl.py`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MoonMedia(Media):
    """An image has a bounded number of patches, and so has each of the frames of a chunk.

    The settings are those of the published `preprocessor_config.json`, in `media_proc_cfg`.
    """

    patch_size: int
    merge_size: int
    patch_limit: int
    frame_patch_limit: int
    side_limit: int = 512
    frames: int = 4

    def items(
        self, processor: Mapping[str, Any], max_tokens: int, sizes: Sizes, active: Collection[str]
    ) -> tuple[Item, ...]:
        """The larger of an image and a chunk of a video, of 3000 x 3000 pixels each."""
        given = scoped(processor, "media_proc_cfg")
        limit = whole_number(given, "in_patch_limit", self.patch_limit)
        each = whole_number(given, "in_patch_limit_each_frame", self.frame_patch_limit)
        frames = whole_number(given, "temporal_merge_kernel_size", self.frames)
        if given.get("in_patch_limit_video") is not None:
            total = whole_number(given, "in_patch_limit_video", limit)
            each = max(1, min(each, round(total / frames)))
        side = whole_number(given, "patch_limit_on_one_side", self.side_limit)
        image, frame = self._patches(limit, side), self._patches(each, side)
        merged = self.merge_size**2
        patches, tokens = (frames * frame, frame // merged)
        if tokens < image // merged:
            patches, tokens = image, image // merged
        inputs = patches * 3 * self.patch_size**2
        return (Item(modality="vision_chunk", patches=patches, tokens=tokens, inputs=inputs),)

    def _patches(self, limit: int, side_limit: int) -> int:
        rows, columns = navit_resize(
            PROFILED_SIDE,
            PROFILED_SIDE,
            patch_size=self.patch_size,
            merge_size=self.merge_size,
            limit=limit,
            side_limit=side_limit,
        )
        return rows * columns


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstMoonImages(Media):
    """Images of Kimi-VL, of which vLLM profiles one of 1024 x 1024 pixels.

    The limit is that of the published Kimi-VL-A3B-Instruct.
    """

    patch_size: int
    merge_size: int
    patch_limit: int = 4096

    def items(
        self, processor: Mapping[str, Any], max_tokens: int, sizes: Sizes, active: Collection[str]
    ) -> tuple[Item, ...]:
        """Source: vLLM's `kimi_vl.py: get_num_image_tokens`."""
        limit = whole_number(scoped(processor, "images_kwargs"), "in_token_limit", self.patch_limit)
        sides = [size_limit(sizes, "image", side, _FIRST_SIDE) for side in ("height", "width")]
        inside = (sides[0] // self.patch_size) * (sides[1] // self.patch_size)
        if inside > limit:
            sides = [int(side * sqrt(limit / inside)) for side in sides]
        unit = self.patch_size * self.merge_size
        tokens = max(1, cdiv(sides[0], unit) * cdiv(sides[1], unit))
        patches = tokens * self.merge_size**2
        inputs = patches * 3 * self.patch_size**2
        return (Item(modality="image", patches=patches, tokens=tokens, inputs=inputs),)


@dataclass(frozen=True, slots=True, kw_only=True)
class MoonImages(Media):
    """Images of Kimi K3, which vLLM profiles at the size with the most embeddings."""

    patch_size: int
    merge_size: int
    patch_limit: int = 65_536
    side_limit: int = 512

    def items(
        self, processor: Mapping[str, Any], max_tokens: int, sizes: Sizes, active: Collection[str]
    ) -> tuple[Item, ...]:
        """Source: vLLM's `kimi_k3/common/mm_preprocess.py: get_max_image_size`.

        Limits of the size make images smaller for the budget as well.
        """
        given = scoped(processor, "media_proc_cfg")
        limit = whole_number(given, "in_patch_limit", self.patch_limit)
        side = min(whole_number(given, "patch_limit_on_one_side", self.side_limit), _LONGEST_SIDE)
        height, width = largest_navit(self.patch_size, self.merge_size, limit, side)
        rows, columns = navit_resize(
            size_limit(sizes, "image", "height", height),
            size_limit(sizes, "image", "width", width),
            patch_size=self.patch_size,
            merge_size=self.merge_size,
            limit=limit,
            side_limit=side,
        )
        patches = rows * columns
        return (
            Item(
                modality="image",
                patches=patches,
                tokens=patches // self.merge_size**2,
                inputs=patches * 3 * self.patch_size**2,
            ),
        )


_LONGEST_SIDE = 512


def navit_resize(
    height: int, width: int, *, patch_size: int, merge_size: int, limit: int, side_limit: int
) -> tuple[int, int]:
    """Patches down and across after the resize and its padding (`navit_resize_image`)."""
    longest = side_limit * patch_size
    patches = max(1, width // patch_size) * max(1, height // patch_size)
    scale = min(1.0, sqrt(limit / patches), longest / width, longest / height)
    factor = patch_size * merge_size
    rows, columns = (
        round_up(min(max(1, int(side * scale)), longest), factor) // patch_size
        for side in (height, width)
    )
    return rows, columns


@lru_cache(maxsize=8)
def largest_navit(patch_size: int, merge_size: int, limit: int, side_limit: int) -> tuple[int, int]:
    """Height and width with the most embeddings; the known answer for published settings."""
    if (patch_size, merge_size, limit, side_limit) == (14, 2, 65_536, 512):
        return KNOWN_LARGEST
    return search_largest(patch_size, merge_size, limit, side_limit)


def search_largest(
    patch_size: int, merge_size: int, limit: int, side_limit: int
) -> tuple[int, int]:
    """Try every number of patches, as vLLM does: the first of those with the most embeddings."""
    longest = side_limit * patch_size
    best, found = -1, (longest, longest)
    for across in range(side_limit + 1):
        width = min((across + 1) * patch_size - 1, longest)
        for down in range(across, side_limit + 1):
            height = min((down + 1) * patch_size - 1, longest)
            rows, columns = navit_resize(
                height,
                width,
                patch_size=patch_size,
                merge_size=merge_size,
                limit=limit,
                side_limit=side_limit,
            )
            if rows * columns > best:
                best, found = rows * columns, (height, width)
    return found
