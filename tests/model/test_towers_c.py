"""Kimi-VL, GLM-4.1V, LLaVA-NeXT and OneVision, Idefics 3, PaliGemma, Command A Vision, Qwen2-Audio.

Shapes and dtypes of small ones were compared with vLLM 0.32's own modules on one and two
ranks, and embeddings of hundreds of image sizes with transformers' processors.
"""

from math import prod
from typing import Any

import pytest

from support.configs import read_config, read_spec
from tightfit.errors import ConfigError, TightfitError, UnsupportedModelError
from tightfit.model.blocks.latent_attention import LatentAttention
from tightfit.model.families import model_spec
from tightfit.model.layout import Parallel, Rank
from tightfit.model.parameters import parameter_count, plain_parameters
from tightfit.model.sources import source_shapes
from tightfit.model.spec import ModelSpec
from tightfit.model.towers.anyres import best_resolution
from tightfit.model.towers.base import Item, Sizes
from tightfit.model.towers.cohere2_vision import canvas
from tightfit.model.towers.idefics3 import scaled

SEQUENCE = 32_768


def changed(name: str, **sections: dict[str, Any] | Any) -> ModelSpec:
    """The spec of a config in which keys, or keys of its sections, differ."""
    config = read_config(name)
    for key, value in sections.items():
        merge = isinstance(value, dict) and isinstance(config.get(key), dict)
        config[key] = {**config[key], **value} if merge else value
    return model_spec(config)


def items(
    name: str, processor: dict[str, Any] | None = None, sizes: Sizes | None = None
) -> dict[str, Item]:
    (tower,) = read_spec(name).towers
    found = tower.media.items(processor or {}, SEQUENCE, sizes or {}, tower.modalities)
    return {item.modality: item for item in found}


def test_counts_as_published() -> None:
    """The totals of the Hub."""
    published = {
        "pixtral-12b": 12_682_739_712,
        "llava-v1.6-mistral-7b-hf": 7_566_747_648,
        "SmolVLM-256M-Instruct": 256_484_928,
        "SmolVLM-Instruct": 2_246_272_880,
        "SmolVLM2-2.2B-Instruct": 2_246_784_880,
        "paligemma-3b-pt-224": 2_923_466_480,
        "paligemma2-3b-pt-448": 3_033_127_152,
        "Qwen2-Audio-7B-Instruct": 8_397_094_912,
        "GLM-4.1V-9B-Thinking": 10_292_777_472,
    }
    assert {name: parameter_count(read_spec(name)) for name in published} == published
    assert round(parameter_count(read_spec("Kimi-VL-A3B-Instruct")) / 1e9, 1) == 16.4


@pytest.mark.parametrize(("name", "modality", "patches", "tokens"), [
    # 73 x 73 patches of 1024 pixels shrink to 64 x 64, and 897 pixels are padded to 33 x 28.
    ("Kimi-VL-A3B-Instruct", "image", 66 * 66, 33 * 33),
    # 2 x 2 tiles and the image; 48 lines end.
    ("llava-v1.6-mistral-7b-hf", "image", 5 * 577, 576 + 48 * 48 + 48),
    ("llava-onevision-qwen2-7b-ov-hf", "video", 16 * 27**2, 16 * 14**2 + 1),
    ("SmolVLM-256M-Instruct", "image", 17 * 32**2, 17 * 8**2),
    ("SmolVLM2-2.2B-Instruct", "image", 17 * 27**2, 17 * 9**2),
    ("paligemma-3b-pt-224", "image", 16**2, 16**2),
    ("paligemma2-3b-pt-448", "image", 32**2, 32**2),
    ("synthetic-cohere2-vision", "image", 13 * 32**2, 13 * 16**2),
    ("Qwen2-Audio-7B-Instruct", "audio", 1500, 750),
    ("pixtral-12b", "image", 64**2, 64**2),
])  # fmt: skip
def test_largest_items(name: str, modality: str, patches: int, tokens: int) -> None:
    item = items(name)[modality]
    assert (item.patches, item.tokens) == (patches, tokens)


def test_processors_settings_count() -> None:
    thinking = items("Kimi-VL-A3B-Instruct", {"in_token_limit": 16_384})["image"]
    assert thinking.tokens == 37 * 37
    whole = items("SmolVLM-256M-Instruct", {"do_image_splitting": False})["image"]
    assert whole.tokens == 64
    smaller = items("SmolVLM-256M-Instruct", {"size": {"longest_edge": 1024}})["image"]
    assert smaller.tokens == (2 * 2 + 1) * 64
    fewer = items("synthetic-cohere2-vision", {"max_patches": 6})["image"]
    assert fewer.tokens == 7 * 256


def test_limits_of_the_users() -> None:
    wide = items("SmolVLM-256M-Instruct", None, {"image": {"height": 128}})["image"]
    assert wide.tokens == (4 * 1 + 1) * 64
    (small,) = items(
        "llava-v1.6-mistral-7b-hf", None, {"image": {"height": 336, "width": 336}}
    ).values()
    # The best resolution is the first: the square stands in the middle of two tiles.
    assert small.tokens == 576 + 24 * 24 + 24
    clip = items("llava-onevision-qwen2-7b-ov-hf", None, {"video": {"num_frames": 4}})["video"]
    assert clip.tokens == 4 * 14**2 + 1


def test_the_image_that_vllm_profiles_for_one_vision() -> None:
    """944 x 1153 pixels are 81 x 98 patches of 3 x 4 tiles, few enough not to be shrunk."""
    resolutions = tuple((384 * n, 384 * m) for n in range(1, 7) for m in range(1, 7))
    assert best_resolution((944, 1153), resolutions) == (1152, 1536)
    item = items("llava-onevision-qwen2-7b-ov-hf")["image"]
    assert item.patches == (3 * 4 + 1) * 27**2
    assert item.tokens == 27**2 + 81 * 98 + 81


def test_tiles_of_idefics() -> None:
    assert scaled(512, 512, 2048) == (2048, 2048)
    assert scaled(100, 300, 2048) == (682, 2048)
    assert scaled(300, 100, 5000) == (4096, 1364)


def test_canvases_of_cohere() -> None:
    assert canvas(6144, 512, 512, 12) == (1, 12)
    assert canvas(512, 512, 512, 12) == (1, 1)
    assert canvas(700, 1500, 512, 12) == (3, 2)
    assert canvas(99_999, 99_999, 512, 12) == (3, 3)


def test_vllm_builds_no_more_of_llava_than_it_uses() -> None:
    (next_tower,) = read_spec("llava-v1.6-mistral-7b-hf").towers
    assert next_tower.num_layers == 23
    assert "vision_tower.vision_model.encoder.layers.23.mlp.fc1.weight" in next_tower.unbuilt
    (one_vision,) = read_spec("llava-onevision-qwen2-7b-ov-hf").towers
    assert one_vision.num_layers == 26
    last = "vision_tower.vision_model.post_layernorm"
    assert one_vision.unbuilt == {f"{last}.weight", f"{last}.bias"}


def test_features_of_several_layers() -> None:
    """Granite Vision reads four layers of SigLIP."""
    vision = {"model_type": "siglip_vision_model", "image_size": 384}
    spec = changed(
        "llava-v1.6-mistral-7b-hf",
        vision_config=vision,
        vision_feature_layer=[-24, -20, -12, -1],
        vision_feature_select_strategy="full",
    )
    assert source_shapes(spec)["multi_modal_projector.linear_1.weight"] == (4096, 4 * 1024)
    assert spec.towers[0].num_layers == 24


def test_llava_with_siglip() -> None:
    """vLLM leaves out the first of its patches by default, as if it were a class token."""
    vision = {"model_type": "siglip_vision_model", "image_size": 384, "vision_use_head": False}
    spec = changed("llava-1.5-7b-hf", vision_config=vision)
    assert spec.towers[0].media.largest({}, SEQUENCE)[0].tokens == 27**2 - 1
    assert not spec.verified_for_sharding
    assert read_spec("llava-1.5-7b-hf").verified_for_sharding


def test_intern_s1_is_internvl() -> None:
    """vLLM's registry has one class for both."""
    name = "InternVL3-1B-hf"
    spec = changed(name, architectures=["InternS1ForConditionalGeneration"])
    assert parameter_count(spec) == parameter_count(read_spec(name))
    assert not spec.verified_for_sharding


def test_kimi_vl_is_latent() -> None:
    spec = read_spec("Kimi-VL-A3B-Instruct")
    mixers = [layer.mixers[0] for layer in spec.layers]
    assert all(isinstance(mixer, LatentAttention) for mixer in mixers)
    caches = [cache for mixer in mixers for cache in mixer.caches(Rank())]
    assert sum(cache.elements_per_token for cache in caches) == 27 * (512 + 64)
    names = {weight.name for weight in plain_parameters(spec)}
    assert "language_model.model.layers.1.mlp.gate.e_score_correction_bias" in names
    assert "multi_modal_projector.linear_2.bias" in names


def test_vllm_cuts_nothing_of_the_encoder_of_qwen2_audio() -> None:
    (tower,) = read_spec("Qwen2-Audio-7B-Instruct").towers
    for rank in Parallel(tensor_parallel_size=4).ranks():
        assert all(prod(w.rank_shape(rank)) == prod(w.rank_shape(Rank())) for w in tower.weights)
    biases = {w.name for w in tower.weights if ".0.self_attn." in w.name and "bias" in w.name}
    assert biases == {f"audio_tower.layers.0.self_attn.{n}.bias" for n in _BIASED}


_BIASED = ("q_proj", "v_proj", "out_proj")


def test_the_first_configs_of_glm_4_1v_are_flat() -> None:
    config = read_config("GLM-4.1V-9B-Thinking")
    flat = {**config.pop("text_config"), **config}
    spec = model_spec(flat)
    assert parameter_count(spec) == parameter_count(read_spec("GLM-4.1V-9B-Thinking"))


@pytest.mark.parametrize(
    ("name", "changes", "error"),
    [
        ("llava-v1.6-mistral-7b-hf", {"image_grid_pinpoints": [[336]]}, ConfigError),
        ("llava-v1.6-mistral-7b-hf", {"text_config": {"model_type": "x"}}, UnsupportedModelError),
        ("llava-v1.6-mistral-7b-hf", {"vision_config": {"model_type": "x"}}, UnsupportedModelError),
        ("llava-onevision-qwen2-7b-ov-hf", {"vision_aspect_ratio": "pad"}, UnsupportedModelError),
        ("pixtral-12b", {"vision_feature_select_strategy": "default"}, UnsupportedModelError),
        ("SmolVLM-256M-Instruct", {"text_config": {"model_type": "x"}}, UnsupportedModelError),
        ("paligemma-3b-pt-224", {"projection_dim": 2304}, ConfigError),
        ("paligemma-3b-pt-224", {"text_config": {"model_type": "x"}}, UnsupportedModelError),
        ("synthetic-cohere2-vision", {"alignment_intermediate_size": 3}, ConfigError),
        (
            "Kimi-VL-A3B-Instruct",
            {"vision_config": {"merge_kernel_size": [2, 1]}},
            UnsupportedModelError,
        ),
    ],
)
def test_refused(name: str, changes: dict[str, Any], error: type[TightfitError]) -> None:
    with pytest.raises(error):
        changed(name, **changes)
