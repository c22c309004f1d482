"""Towers of LLaVA, Qwen-VL, GLM-4.5V, InternVL, Kimi K2.5, Phi-3-vision and DeepSeek-VL2."""

from math import prod
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.configs import read_config, read_spec
from tightfit.errors import ConfigError, TightfitError, UnsupportedModelError, UsageError
from tightfit.model.families import model_spec
from tightfit.model.layout import Parallel, Rank, Stage, on_rank
from tightfit.model.parameters import parameter_count, parameters
from tightfit.model.sources import source_shapes
from tightfit.model.spec import ModelSpec
from tightfit.model.towers.base import Tower
from tightfit.model.towers.moon_media import KNOWN_LARGEST, navit_resize, search_largest

NAMES = (
    "llava-1.5-7b-hf",
    "Qwen2-VL-7B",
    "Qwen2.5-VL-7B-Instruct",
    "Qwen3-VL-2B-Instruct",
    "Qwen3-VL-30B-A3B-Instruct",
    "Qwen3.5-27B",
    "GLM-4.5V",
    "InternVL3-1B",
    "InternVL3-1B-hf",
    "Kimi-K2.5",
    "Phi-3-vision",
    "deepseek-vl2-tiny",
)


def tower(name: str) -> Tower:
    (only,) = read_spec(name).towers
    return only


def changed(name: str, **changes: Any) -> ModelSpec:
    return model_spec({**read_config(name), **changes})


def tokens(name: str, max_tokens: int, **processor: Any) -> dict[str, int]:
    items = tower(name).media.largest(processor, max_tokens)
    return {item.modality: item.tokens for item in items}


def held(spec: ModelSpec, rank: Rank, fragment: str) -> int:
    return sum(
        prod(weight.rank_shape(rank))
        for weight in parameters(spec)
        if fragment in weight.name and on_rank(weight, rank, spec.num_layers)
    )


def test_counts_of_models_that_transformers_does_not_have() -> None:
    """The Hub's totals of parameters: 938M, 4,146,621,440 and 3.37B."""
    counts = {
        "InternVL3-1B": 938_193_024,
        "Phi-3-vision": 4_146_621_440,
        "deepseek-vl2-tiny": 3_370_501_440,
    }
    assert {name: parameter_count(read_spec(name)) for name in counts} == counts


def test_two_forms_of_internvl_hold_the_same() -> None:
    one, other = read_spec("InternVL3-1B"), read_spec("InternVL3-1B-hf")
    assert parameter_count(one) == parameter_count(other)


def test_shapes_of_convolutions_and_positions() -> None:
    shapes = source_shapes(read_spec("Qwen2.5-VL-7B-Instruct"))
    assert shapes["visual.patch_embed.proj.weight"] == (1280, 3, 2, 14, 14)
    shapes = source_shapes(read_spec("InternVL3-1B"))
    assert shapes["vision_model.embeddings.position_embedding"] == (1, 1025, 1024)
    shapes = source_shapes(read_spec("Kimi-K2.5"))
    assert shapes["vision_tower.patch_embed.pos_emb.weight"] == (64, 64, 1152)
    shapes = source_shapes(read_spec("Qwen3-VL-30B-A3B-Instruct"))
    experts = "model.language_model.layers.0.mlp.experts"
    assert shapes[f"{experts}.gate_up_proj"] == (128, 2048, 1536)
    assert shapes[f"{experts}.down_proj"] == (128, 768, 2048)


# What vLLM 0.32's own `get_mm_max_tokens_per_item` and dummy inputs give for these settings.
@pytest.mark.parametrize(
    ("name", "max_tokens", "processor", "expected"),
    [
        ("llava-1.5-7b-hf", 4096, {}, {"image": 576}),
        ("Qwen2-VL-7B", 32_768, {}, {"image": 16_384, "video": 32_768}),
        ("Qwen2.5-VL-7B-Instruct", 128_000, {}, {"image": 16_384, "video": 114_688}),
        ("Qwen2.5-VL-7B-Instruct", 4096, {}, {"image": 16_384, "video": 16_384}),
        (
            "Qwen2.5-VL-7B-Instruct",
            32_768,
            {"max_pixels": 1_003_520},
            {"image": 1280, "video": 8960},
        ),
        (
            "Qwen2.5-VL-7B-Instruct",
            20_000,
            {"size": {"shortest_edge": 3136, "longest_edge": 602_112}},
            {"image": 768, "video": 5376},
        ),
        ("Qwen3-VL-2B-Instruct", 262_144, {}, {"image": 16_384, "video": 12_288}),
        ("Qwen3.5-27B", 262_144, {}, {"image": 16_384, "video": 12_288}),
        (
            "Qwen3-VL-2B-Instruct",
            262_144,
            {"images_kwargs": {"max_pixels": 655_360}},
            {"image": 640, "video": 12_288},
        ),
        ("GLM-4.5V", 65_536, {}, {"image": 6084, "video": 31_974}),
        ("InternVL3-1B", 32_768, {}, {"image": 3328, "video": 29_440}),
        ("InternVL3-1B", 32_768, {"max_dynamic_patch": 6}, {"image": 1792, "video": 30_976}),
        ("Kimi-K2.5", 262_144, {}, {"vision_chunk": 4225}),
        ("Kimi-K3", 262_144, {}, {"image": 16_817}),
        ("Phi-3-vision", 131_072, {}, {"image": 2653}),
        ("Phi-3-vision", 131_072, {"num_crops": 4}, {"image": 781}),
        ("deepseek-vl2-tiny", 4096, {}, {"image": 2101}),
    ],
)
def test_largest_items(
    name: str, max_tokens: int, processor: dict[str, Any], expected: dict[str, int]
) -> None:
    assert tokens(name, max_tokens, **processor) == expected


def test_limits_of_size_shrink_what_is_profiled() -> None:
    media = tower("Qwen2.5-VL-7B-Instruct").media
    (image,) = media.profiled({}, 32_768, {"image": {"width": 560, "height": 560}}, ("image",))
    # 560 / 28 = 20 embeddings along a side; the budget counts the largest image nevertheless.
    assert (image.tokens, image.embeddings, image.patches) == (16_384, 400, 1600)
    assert image.inputs == 1600 * 3 * 2 * 14 * 14
    media = tower("InternVL3-1B").media
    (image,) = media.profiled({}, 32_768, {"image": {"width": 448}}, ("image",))
    assert (image.tokens, image.patches) == (256, 1025)
    (video,) = media.profiled({}, 32_768, {}, ("video",))
    assert (video.tokens, video.embeddings) == (32_768, 32_768)
    both = media.profiled({}, 32_768, {}, ("image", "video"))
    assert [item.embeddings for item in both] == [3328, 32_768]


@pytest.mark.parametrize(
    ("name", "processor"),
    [
        ("Qwen2.5-VL-7B-Instruct", {"max_pixels": "many"}),
        ("Qwen2.5-VL-7B-Instruct", {"max_pixels": -1}),
        ("Qwen3-VL-2B-Instruct", {"size": {"longest_edge": 2**60}}),
        ("GLM-4.5V", {"max_pixels": True}),
        ("InternVL3-1B", {"max_dynamic_patch": 0}),
        ("Kimi-K2.5", {"media_proc_cfg": {"in_patch_limit": 0.5}}),
        ("Phi-3-vision", {"num_crops": []}),
    ],
)
def test_impossible_settings_are_refused(name: str, processor: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"processor's .* is out of range"):
        tower(name).media.largest(processor, 8192)


settings = st.dictionaries(
    st.sampled_from(
        ("max_pixels", "min_pixels", "size", "max_dynamic_patch", "min_dynamic_patch", "num_crops",
         "use_thumbnail", "images_kwargs", "videos_kwargs", "media_proc_cfg")
    ),
    st.one_of(
        st.none(), st.booleans(), st.integers(-1, 2**24), st.floats(), st.text(max_size=3),
        st.dictionaries(
            st.sampled_from(("longest_edge", "shortest_edge", "max_pixels", "in_patch_limit")),
            st.integers(0, 2**24),
        ),
    ),
)  # fmt: skip
limits = st.dictionaries(
    st.sampled_from(("image", "video", "vision_chunk")),
    st.dictionaries(st.sampled_from(("width", "height", "num_frames")), st.integers(1, 10_000)),
)


@given(
    name=st.sampled_from(NAMES),
    processor=settings,
    sizes=limits,
    max_tokens=st.integers(1, 10**6),
)
def test_any_settings_give_items_or_a_message(
    name: str, processor: dict[str, Any], sizes: dict[str, Any], max_tokens: int
) -> None:
    found = tower(name)
    try:
        items = found.media.profiled(processor, max_tokens, sizes, found.modalities)
    except TightfitError:
        return
    for item in items:
        assert item.modality in found.modalities
        assert min(item.patches, item.tokens, item.embeddings, item.inputs) > 0


@pytest.mark.parametrize("name", NAMES)
def test_sizes_of_a_layer(name: str) -> None:
    found = tower(name)
    hidden, spec = found.hidden_size, read_spec(name)
    assert found.output_size % spec.hidden_size == 0
    assert found.mergers == found.output_size // spec.hidden_size
    assert found.num_heads * found.head_dim == hidden
    linear = 4 * hidden * hidden + (3 if found.gated else 2) * hidden * found.intermediate_size
    counted = sum(sum(p.rows for p in w.parts) * (w.columns or 1) for w in found.weights)
    assert 1.0 < counted / (linear * found.num_layers) < 1.5


@pytest.mark.parametrize("name", NAMES)
def test_every_stage_holds_the_tower(name: str) -> None:
    assert {weight.where for weight in tower(name).weights} == {Stage.EVERY}


def test_llava_builds_what_it_uses() -> None:
    found = tower("llava-1.5-7b-hf")
    assert found.num_layers == 23
    hidden, inner = 1024, 4096
    layer = 4 * hidden * (hidden + 1) + 2 * hidden * inner + hidden + inner + 4 * hidden
    left_out = sum(
        sum(part.rows for part in weight.parts) * (weight.columns or 1)
        for weight in found.weights
        if weight.name in found.unbuilt
    )
    assert left_out == layer + 2 * hidden
    (all_layers,) = changed("llava-1.5-7b-hf", vision_feature_layer=-1).towers
    last = "vision_tower.vision_model.post_layernorm"
    assert all_layers.unbuilt == {f"{last}.weight", f"{last}.bias"}
    (several,) = changed("llava-1.5-7b-hf", vision_feature_layer=[-2, 5]).towers
    assert several.num_layers == 23
    projector = {w.name: w.columns for w in several.weights}
    assert projector["multi_modal_projector.linear_1.weight"] == 2048


def test_heads_that_cannot_be_dealt() -> None:
    """MoonViT's 16 heads: its layers are whole on 32 ranks, and half on 2."""
    spec = read_spec("Kimi-K2.5")
    whole, two, many = (
        held(spec, Rank(parallel=Parallel(tensor_parallel_size=size)), "encoder.blocks.0.mlp.fc0.w")
        for size in (1, 2, 32)
    )
    assert (two, many) == (whole // 2, whole)
    vision = {**read_config("InternVL3-1B")["vision_config"], "num_attention_heads": 25}
    odd = changed("InternVL3-1B", vision_config={**vision, "hidden_size": 3200})
    rank = Rank(parallel=Parallel(tensor_parallel_size=2))
    assert held(odd, rank, "layers.0.attn.qkv.w") == held(odd, Rank(), "layers.0.attn.qkv.w")
    assert 2 * held(odd, rank, "layers.0.mlp.fc1.w") == held(odd, Rank(), "layers.0.mlp.fc1.w")


def test_largest_image_of_kimi_k3() -> None:
    """The sizes that vLLM's `KimiK3ProcessingInfo.get_max_image_size` gives."""
    assert search_largest(14, 2, 4096, 128) == (1777, 489)
    rows, columns = navit_resize(
        *KNOWN_LARGEST, patch_size=14, merge_size=2, limit=65_536, side_limit=512
    )
    assert (rows, columns) == (502, 134)


def test_internvl_uses_an_inner_layer() -> None:
    (found,) = changed("InternVL3-1B", select_layer=-4).towers
    assert found.num_layers == 21
    assert {name.split(".")[3] for name in found.unbuilt} == {"21", "22", "23"}


def test_video_needs_a_token() -> None:
    config = read_config("InternVL3-1B")
    old = changed("InternVL3-1B", llm_config={**config["llm_config"], "vocab_size": 151_655})
    items = old.towers[0].media.largest({}, 32_768)
    assert [item.modality for item in items] == ["image"]


def test_architecture_of_a_config_that_names_none() -> None:
    config = read_config("deepseek-vl2-tiny")
    del config["architectures"]
    assert model_spec(config).architecture == "DeepseekVLV2ForCausalLM"


def test_tables_of_ropes_for_images() -> None:
    """vLLM makes them four times as long as the context."""
    rope = read_spec("Qwen2.5-VL-7B-Instruct").layers[0].attention.rope
    assert rope is not None
    assert rope.max_position_embeddings == 4 * 128_000


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llava-1.5-7b-hf", {"vision_config": {"model_type": "dino"}}, "an encoder 'dino'"),
        ("llava-1.5-7b-hf", {"text_config": {"model_type": "bloom"}}, "a decoder 'bloom'"),
        ("llava-1.5-7b-hf", {"vision_feature_select_strategy": "odd"}, "'odd' is not modelled"),
        ("InternVL3-1B", {"llm_config": {"model_type": "internlm2"}}, "a decoder 'internlm2'"),
        ("Kimi-K2.5", {"vision_config": {"merge_kernel_size": [2, 1]}}, "is no square"),
        ("Kimi-K2.5", {"vision_config": {"mm_projector_type": "x"}}, "'x' is not modelled"),
        ("Phi-3-vision", {"embd_layer": {}}, "without hd_transform"),
        ("deepseek-vl2-tiny", {"tile_tag": "1D"}, "'1D' is not modelled"),
    ],
)
def test_unknown_features_are_refused(name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        changed(name, **changes)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llava-1.5-7b-hf", {"vision_feature_layer": -99}, "the encoder has 24 layers"),
        ("llava-1.5-7b-hf", {"vision_feature_layer": []}, "the encoder has 24 layers"),
        ("Qwen2-VL-7B", {"vision_config": {"num_heads": 7}}, "num_heads = 7"),
        ("GLM-4.5V", {"vision_config": {"depth": "deep"}}, "depth = 'deep'"),
        ("InternVL3-1B", {"downsample_ratio": 3.0}, "downsample_ratio = 3.0"),
        ("InternVL3-1B", {"downsample_ratio": 0.001}, "makes no embeddings"),
        ("deepseek-vl2-tiny", {"candidate_resolutions": [[384]]}, "no height and width"),
        ("deepseek-vl2-tiny", {"projector_config": {"n_embed": 7}}, "n_embed = 7"),
    ],
)
def test_malformed_configs(name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        changed(name, **changes)
