"""Images and videos of Qwen2-VL, Qwen2.5-VL, Qwen3-VL and Qwen3.5: any size, within bounds.

Sources: vLLM's `Qwen2VLProcessingInfo` and `Qwen3VLProcessingInfo`. The default bounds are those
of the published `preprocessor_config.json` and `video_preprocessor_config.json`; transformers'
classes have much smaller ones.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from tightfit.model.towers.base import Item, Media, Sizes, scoped, size_limit
from tightfit.model.towers.resize import largest_image, pixel_bounds, smart_resize
from tightfit.units import cdiv

MAX_FRAMES = 14
"""Of a profiled video of Qwen2-VL and Qwen2.5-VL (`_MAX_FRAMES_PER_VIDEO`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QwenGrid:
    """How pixels become patches, and patches become embeddings."""

    patch_size: int
    merge_size: int
    temporal_patch_size: int
    channels: int

    @property
    def unit(self) -> int:
        """Pixels of the side of an embedding."""
        return self.patch_size * self.merge_size

    def item(self, modality: str, size: tuple[int, int], frames: int = 1) -> Item:
        """The item of a resized image or video."""
        steps = cdiv(frames, self.temporal_patch_size)
        patches = steps * (size[0] // self.patch_size) * (size[1] // self.patch_size)
        features = self.channels * self.temporal_patch_size * self.patch_size**2
        return Item(
            modality=modality,
            patches=patches,
            tokens=patches // self.merge_size**2,
            inputs=patches * features,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Qwen2Media(Media):
    """A video has so many frames of the size of the largest image as the context holds."""

    grid: QwenGrid
    min_pixels: int = 3136
    max_pixels: int = 12_845_056
    """Of the published Qwen2-VL and Qwen2.5-VL: 16,384 embeddings."""

    def items(
        self, processor: Mapping[str, Any], max_tokens: int, sizes: Sizes, active: Collection[str]
    ) -> tuple[Item, ...]:
        """Videos are bounded by the context and by 14 frames.

        Limits of the size change what is profiled, and not what the budget counts.
        """
        images, videos = scoped(processor, "images_kwargs"), scoped(processor, "videos_kwargs")
        size = largest_image(self._bounds(images)[1], self.grid.unit)
        frames = self._frames(self._resize(size, videos), max_tokens)
        found = []
        for modality, settings, count in (("image", images, 1), ("video", videos, frames)):
            full = self.grid.item(modality, self._resize(size, settings), count)
            height = size_limit(sizes, modality, "height", size[0])
            width = size_limit(sizes, modality, "width", size[1])
            fewer = size_limit(sizes, modality, "num_frames", count)
            shown = self.grid.item(modality, self._resize((height, width), settings), fewer)
            found.append(with_profile(full, shown))
        return tuple(found)

    def _bounds(self, settings: Mapping[str, Any]) -> tuple[int, int]:
        return pixel_bounds(settings, self.min_pixels, self.max_pixels)

    def _resize(self, size: tuple[int, int], settings: Mapping[str, Any]) -> tuple[int, int]:
        smallest, largest = self._bounds(settings)
        return smart_resize(*size, factor=self.grid.unit, min_pixels=smallest, max_pixels=largest)

    def _frames(self, size: tuple[int, int], max_tokens: int) -> int:
        steps = max_tokens // self.grid.item("video", size).tokens
        return max(1, min(steps * self.grid.temporal_patch_size, MAX_FRAMES))


@dataclass(frozen=True, slots=True, kw_only=True)
class Qwen3Media(Media):
    """Videos have bounds of their own, over all frames; two large frames are profiled."""

    grid: QwenGrid
    min_pixels: int = 65_536
    max_pixels: int = 16_777_216
    video_min_pixels: int = 4096
    video_max_pixels: int = 25_165_824
    """Of the published Qwen3-VL and Qwen3.5: 16,384 embeddings of an image, 12,288 of a video."""

    def items(
        self, processor: Mapping[str, Any], max_tokens: int, sizes: Sizes, active: Collection[str]
    ) -> tuple[Item, ...]:
        """The context does not bound videos.

        Limits of the size change what is profiled, and not what the budget counts.
        """
        return (
            self._item("image", scoped(processor, "images_kwargs"), sizes),
            self._item("video", scoped(processor, "videos_kwargs"), sizes),
        )

    def _item(self, modality: str, settings: Mapping[str, Any], sizes: Sizes) -> Item:
        image = modality == "image"
        frames = 1 if image else self.grid.temporal_patch_size
        smallest, largest = (
            pixel_bounds(settings, self.min_pixels, self.max_pixels)
            if image
            else pixel_bounds(settings, self.video_min_pixels, self.video_max_pixels)
        )

        def resized(size: tuple[int, int]) -> Item:
            inside = smart_resize(
                *size,
                factor=self.grid.unit,
                min_pixels=smallest,
                max_pixels=largest,
                frames=frames,
                temporal=frames,
            )
            return self.grid.item(modality, inside, frames)

        height, width = largest_image(largest // frames, self.grid.unit)
        shown = (
            size_limit(sizes, modality, "height", height),
            size_limit(sizes, modality, "width", width),
        )
        return with_profile(resized((height, width)), resized(shown))


def with_profile(full: Item, shown: Item) -> Item:
    """The budget counts the full item, and the one within the user's limits is profiled."""
    return Item(
        modality=full.modality,
        patches=shown.patches,
        tokens=full.tokens,
        inputs=shown.inputs,
        profiled_tokens=shown.tokens,
    )
