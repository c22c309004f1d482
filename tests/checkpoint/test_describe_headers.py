"""Headers decide: other names, tensors beside the model, and what a processor's files say."""

import json
import time
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import pytest

from support.configs import read_config
from tightfit.checkpoint.checkpoint import open_checkpoint
from tightfit.checkpoint.describe import Description, describe
from tightfit.checkpoint.header import encode_header
from tightfit.checkpoint.processor import read_processor
from tightfit.checkpoint.source import LocalSource
from tightfit.errors import ConfigError, UnsupportedModelError, UsageError
from tightfit.model.families import model_spec
from tightfit.model.sources import source_shapes
from tightfit.model.stored import stored_layout
from tightfit.model.towers.configured import overlaid
from tightfit.planner.api import open_model
from tightfit.planner.devices import device
from tightfit.planner.options import PlanOptions
from tightfit.sharding.shard import prepare

TEXT = {**read_config("Qwen3-30B-A3B"), "num_hidden_layers": 2}
VISION = {**read_config("Qwen2.5-VL-7B-Instruct"), "num_hidden_layers": 2}

FP8 = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False}


def virtual(
    directory: Path, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], **files: Any
) -> Path:
    """A checkpoint of true headers whose bytes are holes."""
    directory.mkdir()
    header = encode_header([(name, "BF16", s, 2 * prod(s)) for name, s in shapes.items()])
    with (directory / "model.safetensors").open("wb") as file:
        file.write(header)
        file.truncate(len(header) + sum(2 * prod(shape) for shape in shapes.values()))
    (directory / "config.json").write_text(json.dumps(config))
    for name, document in files.items():
        (directory / f"{name}.json").write_text(json.dumps(document))
    return directory


def shapes_of(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return dict(source_shapes(model_spec(config)))


def stacked() -> dict[str, tuple[int, ...]]:
    shapes = {n: s for n, s in shapes_of(TEXT).items() if ".experts." not in n}
    for i in range(2):
        shapes[f"model.layers.{i}.mlp.experts.gate_up_proj"] = (128, 1536, 2048)
        shapes[f"model.layers.{i}.mlp.experts.down_proj"] = (128, 2048, 768)
    return shapes


def described(path: Path) -> Description:
    return describe(open_checkpoint(str(path)))


def test_other_names_make_the_same_plan(tmp_path: Path) -> None:
    options = PlanOptions(device=device("h200-141gb", None))
    other = open_model(str(virtual(tmp_path / "other", TEXT, stacked()))).plan(options)
    same = open_model(str(virtual(tmp_path / "same", TEXT, shapes_of(TEXT)))).plan(options)
    assert other.model.weights_origin == same.model.weights_origin == "headers"
    assert other.ranks == same.ranks
    assert same.warnings == ()
    (warning,) = other.warnings
    assert warning == (
        "tensors such as 'model.layers.0.mlp.experts.gate_up_proj' have other names than in "
        "published checkpoints"
    )


def test_only_plans_read_other_names(tmp_path: Path) -> None:
    path = virtual(tmp_path / "other", TEXT, stacked())
    with pytest.raises(UnsupportedModelError, match="has other names, such as"):
        prepare(
            open_checkpoint(str(path)),
            stored_layout("builtin"),
            tensor_parallel_size=2,
            max_shard_bytes=2**30,
        )
    with pytest.raises(UnsupportedModelError, match="has other names, such as"):
        open_model(str(path)).plan(PlanOptions(engine="builtin", device=device("cpu", None)))


def test_a_nested_head_of_a_tied_model(tmp_path: Path) -> None:
    config = {**read_config("gemma-3-4b-it")}
    config["text_config"] = {**config["text_config"], "num_hidden_layers": 1, "vocab_size": 1024}
    config["vision_config"] = {**config["vision_config"], "num_hidden_layers": 1}
    shapes = shapes_of(config)
    spec = described(virtual(tmp_path / "tied", config, shapes)).spec
    assert spec.tie_word_embeddings
    table = shapes[f"{spec.names.embedding}.weight"]
    # One byte is enough for a head of its own.
    path = virtual(tmp_path / "own", config, {**shapes, f"{spec.names.head}.weight": table})
    with (path / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\1")
    assert not described(path).spec.tie_word_embeddings


def test_layers_that_are_not_loaded_are_named(tmp_path: Path) -> None:
    config = {**read_config("MiMo-7B-Base"), "num_hidden_layers": 1}
    name = "model.mtp_layers.0.mlp.up_proj.weight"
    shapes = {
        **shapes_of(config),
        name: (11008, 4096),
        "model.layers.0.self_attn.rotary_emb.inv_freq": (64,),
    }
    (warning,) = described(virtual(tmp_path / "mtp", config, shapes)).warnings
    assert warning == (
        f"86.0 MiB of the checkpoint are not loaded: {name!r}, which MiMoForCausalLM does not use"
    )


def test_encoders_of_a_text_model(tmp_path: Path) -> None:
    config = {**read_config("gemma-4-E2B-text")}
    name = "model.vision_tower.encoder.layers.0.mlp.up_proj.weight"
    shapes = {**shapes_of(config), name: (3072, 768)}
    (warning,) = described(virtual(tmp_path / "text", config, shapes)).warnings
    assert f"not loaded: {name!r}" in warning


def test_buffers_that_were_left_out(tmp_path: Path) -> None:
    config = {**read_config("GLM-4.7-Flash"), "num_hidden_layers": 2}
    shapes = shapes_of(config)
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    del shapes[name]
    (warning,) = described(virtual(tmp_path / "it", config, shapes)).warnings
    assert warning == (
        f"it lacks {name!r}, which some tools do not save: planned as if they were there"
    )


def test_a_hundred_thousand_names(tmp_path: Path) -> None:
    """Half a second where nothing else runs, with ever so many ignored modules."""
    ignore = [f"model.layers.{i}.mlp.experts.{j}.x" for i in range(190) for j in range(128)]
    section = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "ignore": ["re:.*", *ignore],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": FP8}},
    }
    config = {
        **read_config("Qwen3-235B-A22B"),
        "num_hidden_layers": 250,
        "quantization_config": section,
    }
    shapes = shapes_of(config)
    assert len(shapes) > 95_000
    path = virtual(tmp_path / "large", config, shapes)
    checkpoint = open_checkpoint(str(path))
    checkpoint.tensors()
    start = time.process_time()
    assert describe(checkpoint).warnings == ()
    assert time.process_time() - start < 3


def image_tokens(path: Path, **given: Any) -> int:
    spec = open_model(str(path)).spec
    items = spec.towers[0].media.largest(given, 32_768)
    return next(item.tokens for item in items if item.modality == "image")


def only(tmp_path: Path, config: Mapping[str, Any], **files: Any) -> Path:
    path = tmp_path / f"model{len(list(tmp_path.iterdir()))}"
    path.mkdir()
    for name, document in {"config": config, **files}.items():
        (path / f"{name}.json").write_text(json.dumps(document))
    return path


def test_sizes_of_the_checkpoint(tmp_path: Path) -> None:
    pixels = 28 * 28
    assert image_tokens(only(tmp_path, VISION)) == 16_384
    bounds = {"min_pixels": 4 * pixels, "max_pixels": 1024 * pixels}
    old = only(tmp_path, VISION, preprocessor_config=bounds)
    size = {"shortest_edge": 4 * pixels, "longest_edge": 1024 * pixels}
    new = only(tmp_path, VISION, preprocessor_config={"size": size, "max_pixels": None})
    whole = only(tmp_path, VISION, processor_config={"image_processor": {"size": size}})
    both = only(
        tmp_path,
        VISION,
        preprocessor_config={"max_pixels": 4096 * pixels},
        processor_config={"image_processor": {"size": size}, "video_processor": {"fps": 2}},
    )
    for path in (old, new, whole, both):
        assert image_tokens(path) == 1024
        assert image_tokens(path, max_pixels=256 * pixels) == 256
        assert image_tokens(path, size={"longest_edge": 256 * pixels}) == 256
        assert image_tokens(path, images_kwargs={"max_pixels": 256 * pixels}) == 256


def test_videos_have_their_own_file(tmp_path: Path) -> None:
    config = read_config("Qwen3-VL-2B-Instruct")
    images = {"size": {"shortest_edge": 65_536, "longest_edge": 2**20}}
    videos = {"size": {"shortest_edge": 4096, "longest_edge": 2**22}}

    def tokens(path: Path, **given: Any) -> dict[str, int]:
        media = open_model(str(path)).spec.towers[0].media
        return {item.modality: item.tokens for item in media.largest(given, 32_768)}

    path = only(tmp_path, config, preprocessor_config=images, video_preprocessor_config=videos)
    before, after = tokens(only(tmp_path, config)), tokens(path)
    assert before["image"] == 16 * after["image"] == 16_384
    assert before["video"] > after["video"] > tokens(path, max_pixels=2**20)["video"]
    path = only(tmp_path, config, preprocessor_config=images, video_preprocessor_config={"fps": 2})
    assert tokens(path) == {**before, "image": 1024}


@pytest.mark.parametrize(
    ("name", "settings", "fewer"),
    [
        ("Phi-3-vision", {"num_crops": 4}, True),
        ("Llama-4-Scout-17B-16E-Instruct", {"max_patches": 4, "resize_to_max_canvas": False}, True),
        ("Mistral-Small-3.1-24B", {"size": {"longest_edge": 770}}, True),
        ("gemma-3-4b-it", {"do_pan_and_scan": None, "image_seq_length": 256}, False),
        ("llava-1.5-7b-hf", {"size": {"shortest_edge": 336}, "crop_size": 336}, False),
        ("InternVL3-1B", {"size": 448, "crop_size": 448}, False),
    ],
)
def test_files_of_other_processors(
    tmp_path: Path, name: str, settings: dict[str, Any], fewer: bool
) -> None:
    config = read_config(name)
    before = image_tokens(only(tmp_path, config))
    after = image_tokens(only(tmp_path, config, preprocessor_config=settings))
    assert (after < before) is fewer
    assert (after == before) is not fewer


def test_pan_and_scan_of_the_checkpoint(tmp_path: Path) -> None:
    config = read_config("gemma-3-4b-it")
    before = image_tokens(only(tmp_path, config))
    path = only(tmp_path, config, preprocessor_config={"do_pan_and_scan": True})
    assert image_tokens(path) > before
    assert image_tokens(path, do_pan_and_scan=False) == before


def test_wrong_files_of_processors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"preprocessor_config.json of .* is not a JSON object"):
        open_model(str(only(tmp_path, VISION, preprocessor_config=[])))
    path = only(tmp_path, VISION)
    (path / "processor_config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"processor_config.json of .* is not JSON"):
        open_model(str(path))
    # Nobody reads them of a model without encoders.
    path = only(tmp_path, TEXT, preprocessor_config=[])
    assert open_model(str(path)).spec.towers == ()
    strange = only(tmp_path, VISION, processor_config={"image_processor": 3, "video_processor": []})
    assert read_processor(LocalSource(strange)) == {}
    with pytest.raises(UsageError):
        image_tokens(only(tmp_path, VISION, preprocessor_config={"max_pixels": "many"}))


def test_the_user_wins() -> None:
    settings = {"a": 1, "size": {"x": 1, "y": 2}, "videos_kwargs": {"a": 3, "b": 4}}
    assert overlaid(settings, {}) == settings
    assert overlaid(settings, {"a": 5, "size": {"y": 6}}) == {
        "a": 5,
        "size": {"x": 1, "y": 6},
        "videos_kwargs": {"a": 5, "b": 4},
    }
    assert overlaid(settings, {"videos_kwargs": {"a": 7}})["videos_kwargs"] == {"a": 7, "b": 4}
    assert overlaid(settings, {"videos_kwargs": 8})["videos_kwargs"] == 8
