"""Gemma 3n's encoders: MobileNet V5 for images, a conformer for audio (vLLM's `gemma3n_mm.py`)."""

from collections.abc import Iterator

from tightfit.errors import UnsupportedModelError
from tightfit.model.blocks.linear import norm, row_parallel
from tightfit.model.config import Config
from tightfit.model.layout import Axis, Cut, Part, Weight
from tightfit.model.towers.base import Tower
from tightfit.model.towers.conformer import Conformer, channel_pair
from tightfit.model.towers.llava import FixedImages
from tightfit.model.towers.mobilenet import OUTPUT, mobilenet
from tightfit.model.towers.vit import WHERE

IMAGE_TOKENS = 256
AUDIO_TOKENS = 188
"""Of every image, and of every clip: vLLM's constants."""
IMAGE_PIXELS = 3 * 768**2
KERNELS = [[3, 3], [3, 3]]
ARCHITECTURE = "mobilenetv5_300m_enc"


def gemma3n_towers(config: Config, text_hidden_size: int) -> tuple[Tower, ...]:
    """The two towers of a `Gemma3nForConditionalGeneration`.

    Raises:
        UnsupportedModelError: another vision encoder, or convolutions of another size.
    """
    empty = Config({}, name=config.name)
    return (
        _vision(config.section("vision_config") or empty, text_hidden_size),
        _audio(config.section("audio_config") or empty, text_hidden_size),
    )


def _vision(config: Config, text_hidden_size: int) -> Tower:
    kind = config.text("architecture", default=ARCHITECTURE)
    hidden = config.integer("hidden_size", default=OUTPUT)
    if kind != ARCHITECTURE or hidden != OUTPUT or config.has("model_args"):
        raise UnsupportedModelError(
            f"the vision encoder {kind!r} with hidden_size = {hidden} is not modelled",
            hint=f"known: {ARCHITECTURE} with {OUTPUT} and no model_args",
        )
    return Tower(
        modalities=("image",),
        weights=(
            *mobilenet("model.vision_tower.timm_model"),
            *_embedder(config, "model.embed_vision", hidden, text_hidden_size),
        ),
        media=FixedImages(patches=IMAGE_TOKENS, tokens=IMAGE_TOKENS, pixels=IMAGE_PIXELS),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_heads=16,
        head_dim=96,
        num_layers=1,
        output_size=text_hidden_size,
    )


def _audio(config: Config, text_hidden_size: int) -> Tower:
    sides = config.raw("sscp_conv_kernel_size", default=KERNELS)
    if sides != KERNELS:
        raise UnsupportedModelError(f"sscp_conv_kernel_size = {sides!r} is not modelled")
    model = Conformer(
        hidden_size=config.integer("hidden_size", default=1536),
        num_layers=config.integer("conf_num_hidden_layers", default=12, maximum=1000),
        num_heads=config.integer("conf_num_attention_heads", default=8),
        channels=channel_pair(config, "sscp_conv_channel_size"),
        kernel=config.integer("conf_conv_kernel_size", default=5),
        linear="",
    )
    at, size = "model.audio_tower", model.hidden_size

    def weights() -> Iterator[Weight]:
        yield from model.subsampling(f"{at}.subsample_conv_projection", "conv_{}")
        for i in range(model.num_layers):
            layer = f"{at}.conformer.{i}"
            for name in ("ffw_layer_start", "ffw_layer_end"):
                yield from model.feed_forward(f"{layer}.{name}")
            inner = f"{layer}.attention"
            yield from model.attention(f"{inner}.attn", "relative_position_embedding.pos_proj")
            yield from model.matrix(f"{inner}.post", size, size)
            for name in ("pre_attn_norm", "post_norm"):
                yield from norm(f"{inner}.{name}", size, WHERE)
            yield from model.light_convolution(f"{layer}.lconv1d")
            yield from norm(f"{layer}.norm", size, WHERE)
        yield from _embedder(config, "model.embed_audio", size, text_hidden_size)

    return model.tower(weights, AUDIO_TOKENS, text_hidden_size)


def _embedder(config: Config, at: str, size: int, text_hidden_size: int) -> Iterator[Weight]:
    """Embeddings of the modality's own tokens, norms, and a projection cut by its inputs."""
    vocab_size = config.integer("vocab_size", default=128)
    name = f"{at}.embedding.weight"
    vocab = Axis(label=f"vocab_size of {at}", units=-(-vocab_size // 64) * 64)
    yield Weight(
        name=name,
        parts=(Part(source=name, rows=vocab_size, axis=vocab),),
        columns=size,
        cut=Cut.OUTPUT,
        where=WHERE,
    )
    yield from norm(f"{at}.hard_embedding_norm", size, WHERE)
    yield from norm(f"{at}.soft_embedding_norm", size, WHERE)
    yield from row_parallel(
        f"{at}.embedding_projection",
        Axis(label=f"hidden_size of {at}", units=size),
        rows=text_hidden_size,
        where=WHERE,
    )
