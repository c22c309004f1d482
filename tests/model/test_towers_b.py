"""Gemma 3, 3n and 4, Mistral 3, Llama 4, Llama 3.2 Vision, Whisper, Muse Glimmer."""

import re
from math import prod
from typing import Any

import pytest

from support.configs import read_config, read_spec
from tightfit.errors import ConfigError, UnsupportedModelError
from tightfit.model.cache import TokenCache
from tightfit.model.families import model_spec
from tightfit.model.layout import Parallel, Rank
from tightfit.model.parameters import parameter_count, parameters
from tightfit.model.spec import ModelSpec
from tightfit.model.towers.base import Item, Sizes
from tightfit.model.towers.llama4 import best_tiles
from tightfit.model.towers.muse import grid_tokens
from tightfit.planner.weights import checkpoint_bytes

SEQUENCE = 32_768


def changed(name: str, **sections: dict[str, Any] | Any) -> ModelSpec:
    """The spec of a config in which keys, or keys of its sections, differ."""
    config = read_config(name)
    for key, value in sections.items():
        merge = isinstance(value, dict) and isinstance(config.get(key), dict)
        config[key] = {**config[key], **value} if merge else value
    return model_spec(config)


def sequence_bytes(spec: ModelSpec, kind: str = "attention") -> int:
    """Of one sequence in two-byte elements, at the architectural minimum."""
    found = 0
    for layer in spec.layers:
        for mixer in layer.mixers:
            for cache in mixer.caches(Rank()):
                assert isinstance(cache, TokenCache)
                tokens = spec.encoder_tokens if kind == "cross" else SEQUENCE
                if cache.kind.value == kind:
                    found += 2 * cache.elements_per_token * min(tokens, cache.window or tokens)
    return found


def items(
    name: str, processor: dict[str, Any] | None = None, sizes: Sizes | None = None
) -> dict[str, Item]:
    found = {}
    for tower in read_spec(name).towers:
        media, given = tower.media, processor or {}
        if sizes is None:
            largest = media.largest(given, SEQUENCE)
        else:
            largest = media.profiled(given, SEQUENCE, sizes, tower.modalities)
        found |= {item.modality: item for item in largest}
    return found


def elements(spec: ModelSpec, pattern: str, ranks: int) -> set[int]:
    """Elements of the weights whose names match, on each rank of a layout."""
    parallel = Parallel(tensor_parallel_size=ranks)
    return {
        sum(prod(w.rank_shape(rank)) for w in parameters(spec) if re.search(pattern, w.name))
        for rank in parallel.ranks()
    }


def test_counts_as_published() -> None:
    """The totals of the Hub; whisper's include the positions that transformers does not train."""
    published = {
        "gemma-3-4b-it": 4_300_079_472,
        "gemma-3-12b-it": 12_187_325_040,
        "gemma-3-27b-it": 27_432_406_640,
        "Mistral-Small-3.1-24B": 24_011_361_280,
        "Ministral-3-3B-2512": 3_849_090_048,
        "Llama-4-Scout-17B-16E-Instruct": 108_641_793_536,
        "Llama-4-Maverick-17B-128E-Instruct": 401_583_781_376,
        "Llama-3.2-11B-Vision": 10_670_220_835,
        "whisper-tiny": 37_760_640,
        "whisper-large-v3": 1_543_490_560,
    }
    assert {name: parameter_count(read_spec(name)) for name in published} == published
    assert checkpoint_bytes(read_spec("gemma-3-27b-it")) == 54_864_813_280


def test_the_first_files_of_gemma_3n_hold_keys_that_nobody_reads() -> None:
    """The Hub's 7,849,978,192 parameters are ours and those of 15 layers that share a cache."""
    spec = read_spec("gemma-3n-E4B-it")
    unused = 15 * (2 * 512 * 2048 + 256)
    assert parameter_count(spec) + unused == 7_849_978_192
    (pattern,) = spec.ignored_sources
    prefix = "model.language_model.layers"
    assert re.search(pattern, f"{prefix}.20.self_attn.k_proj.weight")
    assert re.search(pattern, f"{prefix}.34.self_attn.k_norm.weight")
    assert not re.search(pattern, f"{prefix}.19.self_attn.k_proj.weight")


def test_the_vision_encoder_of_gemma_3n_has_the_size_of_timms() -> None:
    """timm 1.0.31 gives `mobilenetv5_300m_enc` 294,126,912 parameters in 548 tensors."""
    spec = read_spec("gemma-3n-E4B-it")
    encoder = [w for w in parameters(spec) if ".timm_model." in w.name]
    assert len(encoder) == 548
    assert elements(spec, r"\.timm_model\.", 1) == {294_126_912}


def test_gemma_4_with_audio() -> None:
    """E2B is published with its conformer: transformers counts 5,104,297,504 parameters."""
    spec = changed("gemma-4-E2B", audio_config={"model_type": "gemma4_audio"})
    scalars_of_layers = 35  # buffers there
    assert parameter_count(spec) == 5_104_297_504 + scalars_of_layers
    assert [tower.modalities for tower in spec.towers] == [("image", "video"), ("audio",)]
    audio = spec.towers[1].media.largest({}, SEQUENCE)[0]
    assert (audio.modality, audio.tokens) == ("audio", 750)


@pytest.mark.parametrize(("name", "expected"), [
    # 10 global layers of 16 heads of 128, 52 windows of 1024.
    ("gemma-3-27b-it", 2 * 2 * 16 * 128 * (10 * SEQUENCE + 52 * 1024)),
    # 4 of 20 layers are global; the other 15 of 35 read their caches.
    ("gemma-3n-E4B-it", 2 * 2 * 2 * 256 * (4 * SEQUENCE + 16 * 512)),
    # 5 global layers of 2 heads of 512 and 25 windows of 8 heads of 256.
    ("gemma-4-26B-A4B", 2 * 2 * (5 * 2 * 512 * SEQUENCE + 25 * 8 * 256 * 1024)),
    # 3 global layers of one head of 512 and 12 windows of one of 256; 20 layers keep nothing.
    ("gemma-4-E2B", 2 * 2 * (3 * 512 * SEQUENCE + 12 * 256 * 512)),
    ("Mistral-Small-3.1-24B", 2 * 2 * 40 * 8 * 128 * SEQUENCE),
    # 32 layers attend to the text, 8 to the images.
    ("Llama-3.2-11B-Vision", 2 * 2 * 32 * 8 * 128 * SEQUENCE),
    # 13 whole layers and 39 windows of 2 heads of 128.
    ("Muse-Glimmer-30B", 2 * 2 * 2 * 128 * (13 * SEQUENCE + 39 * 2048)),
])  # fmt: skip
def test_a_sequence_of_32k(name: str, expected: int) -> None:
    assert sequence_bytes(read_spec(name)) == expected


def test_caches_of_encoders() -> None:
    whisper, llama = read_spec("whisper-large-v3"), read_spec("Llama-3.2-11B-Vision")
    assert (whisper.encoder_tokens, whisper.max_position_embeddings) == (1500, 448)
    assert sequence_bytes(whisper, "cross") == 2 * 2 * 32 * 1280 * 1500
    assert llama.encoder_tokens == 4 * (40 * 40 + 1)
    assert sequence_bytes(llama, "cross") == 2 * 2 * 8 * 8 * 128 * 6404


def test_items_that_have_one_size() -> None:
    assert items("Llama-3.2-11B-Vision")["image"].tokens == 6404
    assert items("Llama-3.2-11B-Vision")["image"].patches == 4 * 1608
    assert items("whisper-tiny")["audio"].tokens == 1500
    assert items("whisper-tiny")["audio"].inputs == 80 * 3000
    assert {k: v.tokens for k, v in items("gemma-3n-E4B-it").items()} == {
        "image": 256,
        "audio": 188,
    }


def test_gemma_3_crops_only_when_asked() -> None:
    def tokens(sizes: Sizes | None = None, **processor: Any) -> int:
        return items("gemma-3-27b-it", processor, sizes)["image"].tokens

    assert tokens() == 256
    assert tokens(do_pan_and_scan=True) == 5 * 256
    assert tokens(images_kwargs={"do_pan_and_scan": True}) == 5 * 256
    assert tokens(do_pan_and_scan=True, pan_and_scan_max_num_crops=2) == 3 * 256
    square = {"image": {"width": 896, "height": 896}}
    assert tokens(square, do_pan_and_scan=True) == 256
    assert tokens({"image": {"height": 1792}}, do_pan_and_scan=True) == 3 * 256
    assert tokens(do_pan_and_scan=True, pan_and_scan_min_crop_size=2000) == 256
    assert items("gemma-3-27b-it", {"do_pan_and_scan": True})["image"].patches == 5 * 64**2


def test_pixtral_counts_merged_patches() -> None:
    def image(sizes: Sizes | None = None, **processor: Any) -> Item:
        return items("Mistral-Small-3.1-24B", processor, sizes)["image"]

    assert image() == Item(modality="image", patches=110**2, tokens=55**2, inputs=3 * 1540**2)
    assert image(size={"longest_edge": 896}).tokens == 32**2
    assert image({"image": {"width": 512, "height": 256}}).tokens == 19 * 10


def test_llama_4_adds_the_whole_image_to_several_tiles() -> None:
    def tokens(sizes: Sizes | None = None, **processor: Any) -> int:
        return items("Llama-4-Scout-17B-16E-Instruct", processor, sizes)["image"].tokens

    assert tokens() == 17 * 144
    assert tokens(max_patches=4) == 5 * 144
    assert tokens(max_patches=1) == 144
    assert tokens({"image": {"height": 336}}) == 144
    assert items("Llama-4-Scout-17B-16E-Instruct")["image"].patches == 17 * 577


def test_the_canvas_of_transformers() -> None:
    """Its docstrings' example, and the largest one for an image that may grow."""
    assert best_tiles(300, 200, 224, 3, largest=False) == 2
    assert best_tiles(224, 224, 224, 16, largest=False) == 1
    assert best_tiles(224, 224, 224, 16, largest=True) == 16
    assert best_tiles(5000, 5000, 224, 16, largest=False) == 16


def test_gemma_4_profiles_less_than_it_counts() -> None:
    found = items("gemma-4-E2B")
    assert (found["image"].tokens, found["image"].embeddings) == (280, 16 * 16)
    assert (found["video"].tokens, found["video"].embeddings) == (32 * 78, 32 * 8 * 8)
    assert items("gemma-4-E2B", {"max_soft_tokens": 1120})["image"].tokens == 1120
    assert items("gemma-4-E2B", {"max_soft_tokens": 1000})["image"].tokens == 280
    assert items("gemma-4-E2B", sizes={"video": {"num_frames": 4}})["video"].tokens == 4 * 78


def test_muse_glimmer_fills_the_context_with_frames() -> None:
    found = items("Muse-Glimmer-30B")
    assert (found["image"].tokens, found["image"].patches) == (4096, 4 * 4096)
    assert found["video"].tokens == 48 * 144
    (tower,) = read_spec("Muse-Glimmer-30B").towers
    short = {item.modality: item.tokens for item in tower.media.largest({}, 1000)}
    assert short == {"image": 4096, "video": 6 * 144}
    limited = items("Muse-Glimmer-30B", sizes={"image": {"width": 280, "height": 140}})
    assert (limited["image"].tokens, limited["image"].embeddings) == (4096, 50)
    assert grid_tokens(10_000, 10, 28, 4096) <= 4096


@pytest.mark.parametrize(("name", "pattern", "share"), [
    ("gemma-3-27b-it", r"^vision_tower.*(qkv_proj|fc1)\.weight", 4),
    ("gemma-3-27b-it", r"embedding|mm_input_projection", 1),
    ("gemma-4-E2B", r"vision_tower|embed_vision", 1),
    ("Mistral-Small-3.1-24B", r"^vision_tower.*_proj\.", 4),
    ("Mistral-Small-3.1-24B", r"patch_merger|patch_conv", 1),
    ("Llama-4-Scout-17B-16E-Instruct", r"vision_adapter|patch_embedding", 4),
    ("Llama-3.2-11B-Vision", r"cross_attn\.(qkv_proj|o_proj)", 4),
    ("Llama-3.2-11B-Vision", r"tile_embedding|positional", 1),
    ("Muse-Glimmer-30B", r"vision_tower.*mlp|vision_adapter", 1),
    ("Muse-Glimmer-30B", r"vision_tower.*proj\.weight|self_attn\.gate_proj", 4),
    ("gemma-3n-E4B-it", r"vision_tower|audio_tower|altup\.", 1),
    ("gemma-3n-E4B-it", r"embed_tokens_per_layer|laurel.linear", 2),
])  # fmt: skip
def test_cuts_of_vllm(name: str, pattern: str, share: int) -> None:
    """Every rank holds the same, and `share` ranks hold the whole."""
    spec = read_spec(name)
    (whole,) = elements(spec, pattern, 1)
    ranks = max(share, 2)
    assert whole > 0
    assert elements(spec, pattern, ranks) == {whole // share}


def test_heads_that_cannot_be_dealt_leave_an_encoder_whole() -> None:
    """Muse Glimmer has 32 query heads, and here 20 in its encoder."""
    spec = changed(
        "Muse-Glimmer-30B", vision_config={"hidden_size": 1600, "num_attention_heads": 20}
    )
    pattern = r"vision_tower.*attn"
    (whole,) = elements(spec, pattern, 1)
    assert max(elements(spec, pattern, 4)) < whole / 3
    assert elements(spec, pattern, 8) == {whole}


def test_whisper_holds_its_table_whole_and_zeros_for_keys() -> None:
    spec = read_spec("whisper-large-v3")
    assert elements(spec, r"embed_tokens", 4) == {51_866 * 1280}
    census = [weight.census(Rank()) for weight in parameters(spec)]
    assert sum(c.padding for c in census) == 1280 * (32 + 2 * 32)
    assert sum(c.elements - c.padding for c in census) == parameter_count(spec)


def test_gemma_4_keeps_its_keys_twice_where_they_are_values() -> None:
    """5 global layers of 26B-A4B: 2 heads of 512 features, from a hidden size of 2816."""
    spec = read_spec("gemma-4-26B-A4B")
    assert sum(w.census(Rank()).copies for w in parameters(spec)) == 5 * 2 * 512 * 2816


def test_layers_of_an_encoder_that_vllm_does_not_build() -> None:
    spec = changed("Mistral-Small-3.1-24B", vision_feature_layer=-2)
    (tower,) = spec.towers
    assert tower.num_layers == 23
    assert {name.split(".")[3] for name in tower.unbuilt} == {"23"}


@pytest.mark.parametrize(("name", "changes", "complaint"), [
    ("gemma-4-E2B", {"text_config": {"use_bidirectional_attention": "all"}}, "bidirectional"),
    ("Mistral-Small-3.1-24B", {"text_config": {"model_type": "qwen2"}}, "qwen2"),
    ("gemma-3n-E4B-it", {"vision_config": {"architecture": "mobilenetv5_base"}}, "base"),
    ("gemma-3n-E4B-it", {"audio_config": {"sscp_conv_kernel_size": [[5, 5], [3, 3]]}}, "sscp"),
    ("Muse-Glimmer-30B", {"text_config": {"layer_rope_theta": [1.0] * 52}}, "rotate"),
])  # fmt: skip
def test_what_is_unknown_is_refused(name: str, changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UnsupportedModelError, match=complaint):
        changed(name, **changes)


@pytest.mark.parametrize(("name", "changes", "complaint"), [
    ("gemma-3-27b-it", {"vision_config": {"num_attention_heads": 7}}, "num_attention_heads = 7"),
    ("gemma-3n-E4B-text", {"intermediate_size": [1, 2]}, "2 values of intermediate_size"),
    ("gemma-3n-E4B-text", {"num_kv_shared_layers": 35}, "num_kv_shared_layers = 35"),
    ("gemma-4-E2B", {"text_config": {"num_key_value_heads": 3}}, "3 KV heads"),
    ("gemma-4-E2B", {"audio_config": {"subsampling_conv_channels": [1]}}, "subsampling"),
    ("Llama-3.2-11B-Vision", {"text_config": {"cross_attention_layers": [99]}}, "99"),
    ("Llama-4-Scout-17B-16E-Instruct", {"vision_config": {"patch_size": 13}}, "336"),
    ("Mistral-Small-3.1-24B", {"vision_feature_layer": 77}, "77"),
    ("whisper-tiny", {"decoder_attention_heads": 7}, "7 heads"),
])  # fmt: skip
def test_what_is_wrong_is_named(name: str, changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        changed(name, **changes)


def test_old_and_new_gemma_3_configs_say_the_same() -> None:
    """The first configs leave out what the class fills in."""
    bare = read_config("gemma-3-4b-it")
    kept = ("hidden_size", "intermediate_size", "model_type", "num_hidden_layers", "sliding_window")
    bare["text_config"] = {key: bare["text_config"][key] for key in kept}
    spec = model_spec(bare)
    assert parameter_count(spec) == 4_300_079_472
    assert sequence_bytes(spec) == sequence_bytes(read_spec("gemma-3-4b-it"))


def test_a_plan_says_that_vllm_dropped_a_model() -> None:
    """`models/registry.py` of 0.32 has it among those that it supported before."""
    (note,) = read_spec("Llama-3.2-11B-Vision").notes
    assert "up to 0.10.2" in note
