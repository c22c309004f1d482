"""Gemma 4's encoders, which vLLM takes from transformers: whole on every rank.

Images and videos share one (`models/gemma4_mm.py`); some sizes have a conformer for audio as well.
"""

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from tightfit.model.blocks.attention import Projections, QKNorm
from tightfit.model.blocks.linear import replicated, vector
from tightfit.model.config import Config
from tightfit.model.layout import Weight
from tightfit.model.towers.base import Item, Media, Sizes, Tower, scoped, size_limit
from tightfit.model.towers.conformer import conformer4
from tightfit.model.towers.vit import (
    WHERE,
    VisionLayers,
    apart,
    parameter,
    vision_attention,
    vision_mlp,
)

SOFT_TOKENS = (70, 140, 280, 560, 1120)
"""Values of `max_soft_tokens` that there are; vLLM ignores others."""
FRAME_TOKENS = 70
MOST_FRAMES = 32
FRAME_TEXT_TOKENS = 8
"""Of a video: soft tokens of a frame, frames, and tokens around a frame that vLLM counts."""
DUMMY_SIDE = 224

_DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 16,
    "num_attention_heads": 12,
    "head_dim": 64,
    "patch_size": 16,
    "pooling_kernel_size": 3,
    "position_embedding_size": 10_240,
    "default_output_length": 280,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Gemma4Images(Media):
    """Images keep their aspect ratio and fill `max_soft_tokens`; the encoder reads padding too."""

    tokens: int
    patch_size: int
    pool: int

    def items(
        self, processor: Mapping[str, Any], max_tokens: int, sizes: Sizes, active: Collection[str]
    ) -> tuple[Item, ...]:
        """What the budget counts; the image and the frames that are profiled are smaller.

        Dummies of 224 x 224 pixels, or of fewer where a limit says so.
        """
        wanted = scoped(processor, "images_kwargs").get("max_soft_tokens")
        image = wanted if wanted in SOFT_TOKENS else self.tokens
        frames = size_limit(sizes, "video", "num_frames", MOST_FRAMES)
        most = {"image": (1, image, 0), "video": (frames, FRAME_TOKENS, FRAME_TEXT_TOKENS)}
        return tuple(
            Item(
                modality=modality,
                patches=count * soft * self.pool**2,
                tokens=count * (soft + text),
                inputs=count * soft * self.pool**2 * 3 * self.patch_size**2,
                profiled_tokens=count * self._soft_tokens(soft, sizes, modality),
            )
            for modality, (count, soft, text) in most.items()
        )

    def _soft_tokens(self, most: int, sizes: Sizes, modality: str) -> int:
        """Of the dummy image (vLLM's `_compute_num_soft_tokens`)."""
        width = size_limit(sizes, modality, "width", DUMMY_SIDE)
        height = size_limit(sizes, modality, "height", DUMMY_SIDE)
        unit, size = self.patch_size * self.pool, self.patch_size
        scale = math.sqrt(most * self.pool**2 / (height / size * width / size))
        sides = [max(1, math.floor(side * scale / unit)) for side in (height, width)]
        return min(sides[0] * sides[1], most)


def gemma4_towers(config: Config, text_hidden_size: int) -> tuple[Tower, ...]:
    """The towers of a `Gemma4ForConditionalGeneration`: those whose configs are there."""
    vision, audio = config.section("vision_config"), config.section("audio_config")
    text = config.section("text_config")
    both_ways = text is not None and text.raw("use_bidirectional_attention") == "vision"
    found: tuple[Tower, ...] = ()
    if vision is not None:
        tower = _vision(vision.with_defaults(_DEFAULTS), text_hidden_size)
        found = (replace(tower, whole_items=both_ways),)
    return found if audio is None else (*found, conformer4(audio, text_hidden_size))


def _vision(vision: Config, text_hidden_size: int) -> Tower:
    hidden, heads = vision.integer("hidden_size"), vision.integer("num_attention_heads")
    head_dim, patch = vision.integer("head_dim"), vision.integer("patch_size")
    layers = VisionLayers(
        prefix="model.vision_tower.encoder.layers",
        num_layers=vision.integer("num_hidden_layers", maximum=1000),
        hidden_size=hidden,
        attention=vision_attention(
            heads,
            head_dim,
            num_kv_heads=vision.integer("num_key_value_heads", default=heads),
            qkv_bias=False,
            output_bias=False,
            qk_norm=QKNorm.HEAD,
            names=Projections(
                query="q_proj.linear",
                key="k_proj.linear",
                value="v_proj.linear",
                output="o_proj.linear",
            ),
        ),
        mlp=vision_mlp(
            vision.integer("intermediate_size"),
            vision.text("hidden_activation", default="gelu_pytorch_tanh"),
            gated=True,
            bias=False,
            gate="gate_proj.linear",
            up="up_proj.linear",
            down="down_proj.linear",
        ),
        norms=(
            "input_layernorm",
            "post_attention_layernorm",
            "pre_feedforward_layernorm",
            "post_feedforward_layernorm",
        ),
        norm_bias=False,
    )
    at = "model.vision_tower.patch_embedder"

    def weights() -> Iterator[Weight]:
        positions = vision.integer("position_embedding_size")
        yield parameter(f"{at}.position_embedding_table", 2, positions, hidden)
        yield from replicated(f"{at}.input_proj", rows=hidden, columns=3 * patch**2, where=WHERE)
        for weight in layers.weights():
            yield from apart(weight)
        if vision.boolean("standardize"):
            for name in ("std_bias", "std_scale"):
                yield vector(f"model.vision_tower.{name}", hidden, WHERE)
        yield from replicated(
            "model.embed_vision.embedding_projection",
            rows=text_hidden_size,
            columns=hidden,
            where=WHERE,
        )

    return Tower(
        modalities=("image", "video"),
        weights=tuple(weights()),
        media=Gemma4Images(
            tokens=vision.integer("default_output_length"),
            patch_size=patch,
            pool=vision.integer("pooling_kernel_size"),
        ),
        hidden_size=hidden,
        intermediate_size=vision.integer("intermediate_size"),
        num_heads=heads,
        head_dim=head_dim,
        num_layers=vision.integer("num_hidden_layers", maximum=1000),
        output_size=text_hidden_size,
        gated=True,
        rotary=True,
    )
