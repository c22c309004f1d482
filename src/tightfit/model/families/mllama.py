"""Llama 3.2 Vision: Llama with layers that attend to images and to nothing else."""

from dataclasses import replace

from tightfit.errors import ConfigError
from tightfit.model.blocks.attention import QKNorm
from tightfit.model.blocks.cross_attention import GatedCrossAttention
from tightfit.model.config import Config
from tightfit.model.families import text_spec
from tightfit.model.families.nested import nested
from tightfit.model.spec import Layer, ModelSpec
from tightfit.model.towers.mllama import mllama_tower

ARCHITECTURES = ("MllamaForConditionalGeneration",)

_TEXT = {
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 40,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
}
LAST_ENGINE = (
    "vLLM serves MllamaForConditionalGeneration up to 0.10.2 only; later versions refuse to load it"
)
CROSS_LAYERS = (3, 8, 13, 18, 23, 28, 33, 38)
ADDED_EMBEDDINGS = 8
"""Rows of the embedding for tokens that are only read, such as that of an image."""


def spec(config: Config) -> ModelSpec:
    """A cross layer keeps the keys and values of image features, one image at most tiles.

    Raises:
        ConfigError: a cross layer is none of the layers.
    """
    text = text_spec(config, "LlamaForCausalLM", defaults=_TEXT)
    section = config.section("text_config") or Config({}, name=config.name)
    crossing = section.integers("cross_attention_layers") or CROSS_LAYERS
    if not all(0 <= i < text.num_layers for i in crossing):
        raise ConfigError(
            f"{section.name} has cross_attention_layers = {crossing!r}, and there are "
            f"{text.num_layers} layers",
            hint="correct the config.json",
        )
    plain = text.layers[0]
    attention = replace(plain.attention, module="cross_attn", rope=None, qk_norm=QKNorm.HEAD)
    cross = Layer(mixers=(GatedCrossAttention(attention=attention),), mlp=plain.mlp)
    tower = mllama_tower(config, text.hidden_size)
    model = nested(text, "language_model.model", "language_model.lm_head", (tower,))
    return replace(
        model,
        layers=tuple(cross if i in crossing else plain for i in range(text.num_layers)),
        added_embeddings=ADDED_EMBEDDINGS,
        encoder_tokens=tower.media.largest({}, 0)[0].tokens,
        notes=(*model.notes, LAST_ENGINE),
    )
