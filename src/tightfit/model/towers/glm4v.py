"""GLM-4.5V's vision transformer, and its images and videos (vLLM's `glm4_1v.py`)."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tightfit.model.blocks.linear import column_parallel, linear, norm, row_parallel, stack
from tightfit.model.blocks.mlp import DenseMLP
from tightfit.model.config import Config
from tightfit.model.layout import Axis, Cut, Weight
from tightfit.model.towers.base import Item, Media, Sizes, Tower, scoped, size_limit
from tightfit.model.towers.qwen_media import QwenGrid
from tightfit.model.towers.qwen_vl import fused_attention, grid
from tightfit.model.towers.resize import pixel_bounds, smart_resize
from tightfit.model.towers.vit import WHERE, VisionLayers, convolution, parameter

MAX_FRAMES = 600
"""Of a profiled video (`_MAX_FRAMES_PER_VIDEO`)."""
_DEFAULTS = {
    "depth": 24,
    "hidden_size": 1536,
    "intermediate_size": 13_696,
    "out_hidden_size": 4096,
    "num_heads": 12,
    "image_size": 336,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "hidden_act": "silu",
}
"""Of `Glm4vMoeVisionConfig`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GlmMedia(Media):
    """Images and videos share one resize, which counts the pixels of all frames.

    An image counts as two frames. The default bounds are those of the published
    `preprocessor_config.json`, and of transformers' `Glm4vVideoProcessor`.
    """

    grid: QwenGrid
    min_pixels: int = 12_544
    max_pixels: int = 9_633_792
    video_max_pixels: int = 47_040_000

    def items(
        self, processor: Mapping[str, Any], max_tokens: int, sizes: Sizes, active: Collection[str]
    ) -> tuple[Item, ...]:
        """Of a video, the number of frames whose embeddings are the most within the context.

        Limits of the size make items smaller for the budget as well.
        """
        images, videos = scoped(processor, "images_kwargs"), scoped(processor, "videos_kwargs")
        temporal = self.grid.temporal_patch_size
        bounds = pixel_bounds(images, self.min_pixels, self.max_pixels)
        video_bounds = pixel_bounds(videos, self.min_pixels, self.video_max_pixels)

        def resized(
            modality: str, size: tuple[int, int], frames: int, bounds: tuple[int, int]
        ) -> Item:
            inside = smart_resize(
                *size,
                factor=self.grid.unit,
                min_pixels=bounds[0],
                max_pixels=bounds[1],
                frames=max(frames, temporal),
                temporal=temporal,
            )
            return self.grid.item(modality, inside, frames)

        side = smart_resize(
            _HUGE,
            _HUGE,
            factor=self.grid.unit,
            min_pixels=bounds[0],
            max_pixels=bounds[1],
            frames=temporal,
            temporal=temporal,
        )

        def shown(modality: str) -> tuple[int, int]:
            return (
                size_limit(sizes, modality, "height", side[0]),
                size_limit(sizes, modality, "width", side[1]),
            )

        image = resized("image", shown("image"), 1, bounds)
        found = [image] if "image" in active else []
        if "video" in active:
            room = max_tokens - (resized("image", side, 1, bounds).tokens if found else 0)
            candidates = [
                resized("video", side, frames, video_bounds) for frames in range(1, MAX_FRAMES + 1)
            ]
            fitting = [i for i in range(MAX_FRAMES) if candidates[i].tokens <= room]
            best = max(fitting, key=lambda i: candidates[i].tokens, default=0)
            frames = size_limit(sizes, "video", "num_frames", max(best + 1, 2))
            found.append(resized("video", shown("video"), max(frames, 2), video_bounds))
        return tuple(found)


_HUGE = 9_999_999


def glm4v_tower(config: Config, prefix: str = "model.visual") -> Tower:
    """RMSNorms, gated MLPs as wide as the decoder, and a convolution that merges patches."""
    section = config.section("vision_config") or Config({}, name=config.name)
    vision = section.with_defaults(_DEFAULTS)
    hidden, out = vision.integer("hidden_size"), vision.integer("out_hidden_size")
    layers = VisionLayers(
        prefix=f"{prefix}.blocks",
        num_layers=vision.integer("depth", maximum=1000),
        hidden_size=hidden,
        attention=fused_attention(vision, hidden, bias=False),
        mlp=DenseMLP(intermediate_size=out, activation=vision.text("hidden_act")),
        norms=("norm1", "norm2"),
        norm_bias=False,
    )
    return Tower(
        modalities=("image", "video"),
        weights=tuple(_weights(vision, prefix, layers)),
        media=GlmMedia(grid=grid(vision)),
        hidden_size=hidden,
        intermediate_size=out,
        num_heads=layers.attention.num_heads,
        head_dim=layers.attention.head_dim,
        num_layers=layers.num_layers,
        output_size=out,
        gated=True,
        rotary=True,
        copies=1,
        held=hidden,
        most_items={"video": 1},
        data_parallel=True,
    )


def _weights(vision: Config, prefix: str, layers: VisionLayers) -> Iterator[Weight]:
    hidden, out = layers.hidden_size, vision.integer("out_hidden_size")
    shape, side = grid(vision), vision.integer("image_size") // vision.integer("patch_size")
    kernel = (shape.channels, shape.temporal_patch_size, shape.patch_size, shape.patch_size)
    yield from convolution(f"{prefix}.patch_embed.proj", rows=hidden, kernel=kernel, bias=True)
    yield parameter(f"{prefix}.embeddings.position_embedding.weight", side**2, hidden)
    yield from layers.weights()
    yield from norm(f"{prefix}.post_conv_layernorm", hidden, WHERE)
    yield from norm(f"{prefix}.post_layernorm", hidden, WHERE)
    merge = (hidden, shape.merge_size, shape.merge_size)
    yield from convolution(f"{prefix}.downsample", rows=out, kernel=merge, bias=True)
    at = f"{prefix}.merger"
    outputs = Axis(label="out_hidden_size", units=out)
    inner = Axis(label="intermediate_size of the merger", units=vision.integer("intermediate_size"))
    yield from column_parallel(f"{at}.proj", outputs, columns=out, where=WHERE)
    yield from norm(f"{at}.post_projection_norm", out, WHERE, bias=True)
    yield from linear(
        f"{at}.gate_up_proj",
        stack(at, None, (("gate_proj", inner), ("up_proj", inner))),
        columns=out,
        cut=Cut.OUTPUT,
        where=WHERE,
        bias=False,
    )
    yield from row_parallel(f"{at}.down_proj", inner, rows=out, where=WHERE)
