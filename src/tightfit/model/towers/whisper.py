"""Whisper's encoder: two convolutions over mel frames, and a transformer (`models/whisper.py`).

Qwen2-Audio has the same, and averages its output in pairs (`models/qwen2_audio.py`).
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from tightfit.errors import ConfigError
from tightfit.model.blocks.attention import Projections
from tightfit.model.blocks.cross_attention import KeysWithoutBias
from tightfit.model.blocks.linear import norm
from tightfit.model.config import Config
from tightfit.model.layout import Weight
from tightfit.model.towers.base import Item, Media, Sizes, Tower
from tightfit.model.towers.vit import (
    WHERE,
    VisionLayers,
    apart,
    convolution,
    parameter,
    plain_linear,
    vision_mlp,
)

FRAMES_PER_POSITION = 2
"""The second convolution halves the frames."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PaddedClips(Media):
    """Every clip is padded to the longest, 30 seconds."""

    positions: int
    mel_bins: int
    averaged: int = 1
    """Positions that make one embedding."""

    def items(
        self, processor: Mapping[str, Any], max_tokens: int, sizes: Sizes, active: Collection[str]
    ) -> tuple[Item, ...]:
        """The clip."""
        inputs = self.positions * FRAMES_PER_POSITION * self.mel_bins
        tokens = max(1, self.positions // self.averaged)
        return (Item(modality="audio", patches=self.positions, tokens=tokens, inputs=inputs),)


def head_dim(config: Config, heads: int) -> int:
    """Features of a head.

    Raises:
        ConfigError: the heads do not divide `d_model`.
    """
    hidden = config.integer("d_model")
    if hidden % heads:
        raise ConfigError(
            f"{config.name} has d_model = {hidden}, which is not a multiple of {heads} heads",
            hint="correct the config.json",
        )
    return hidden // heads


def whisper_tower(config: Config) -> Tower:
    """The encoder of a `WhisperForConditionalGeneration`."""
    positions, mel_bins = config.integer("max_source_positions"), config.integer("num_mel_bins")
    media = PaddedClips(positions=positions, mel_bins=mel_bins)
    return _tower(config, "model.encoder", media)


_QWEN2_AUDIO = {
    "num_mel_bins": 128,
    "encoder_layers": 32,
    "encoder_attention_heads": 20,
    "encoder_ffn_dim": 5120,
    "d_model": 1280,
    "activation_function": "gelu",
    "max_source_positions": 1500,
}
"""Of `Qwen2AudioEncoderConfig`."""


def qwen2_audio_tower(config: Config, text_hidden_size: int) -> Tower:
    """The encoder of a Qwen2-Audio, of which vLLM cuts nothing: it is transformers' own."""
    section = config.section("audio_config") or Config({}, name=config.name)
    audio = section.with_defaults(_QWEN2_AUDIO)
    positions, mel_bins = audio.integer("max_source_positions"), audio.integer("num_mel_bins")
    media = PaddedClips(positions=positions, mel_bins=mel_bins, averaged=2)
    tower = _tower(audio, "audio_tower", media)
    projector = plain_linear(
        "multi_modal_projector.linear", rows=text_hidden_size, columns=tower.hidden_size
    )
    return replace(
        tower,
        weights=(*(one for weight in tower.weights for one in apart(weight)), *projector),
        output_size=text_hidden_size,
        most_items={},
    )


def _tower(config: Config, at: str, media: PaddedClips) -> Tower:
    hidden, heads = config.integer("d_model"), config.integer("encoder_attention_heads")
    size = head_dim(config, heads)
    count = config.integer("encoder_layers", maximum=1000)
    width = config.integer("encoder_ffn_dim")
    layers = VisionLayers(
        prefix=f"{at}.layers",
        num_layers=count,
        hidden_size=hidden,
        attention=KeysWithoutBias(
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=size,
            rope=None,
            scale=size**-0.5,
            qkv_bias=True,
            output_bias=True,
            names=Projections(output="out_proj"),
        ),
        mlp=vision_mlp(width, config.text("activation_function"), module=""),
        norms=("self_attn_layer_norm", "final_layer_norm"),
    )

    def weights() -> Iterator[Weight]:
        yield from convolution(f"{at}.conv1", rows=hidden, kernel=(media.mel_bins, 3), bias=True)
        yield from convolution(f"{at}.conv2", rows=hidden, kernel=(hidden, 3), bias=True)
        yield parameter(f"{at}.embed_positions.weight", media.positions, hidden)
        yield from layers.weights()
        yield from norm(f"{at}.layer_norm", hidden, WHERE, bias=True)

    return Tower(
        modalities=("audio",),
        weights=tuple(weights()),
        media=media,
        hidden_size=hidden,
        intermediate_size=width,
        num_heads=heads,
        head_dim=size,
        num_layers=count,
        output_size=hidden,
        most_items={"audio": 1},
    )
