"""Rank files of multimodal checkpoints whose decoders are quantized, and back again.

Names, shapes and dtypes are held against vLLM itself in `tests/vllm/test_quantized_media_state.py`.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from support.quantized_media import CASES, make_quantized_media, quantized_media_config
from support.quantized_models import write_quantized
from support.slicing import read_rank
from support.work import merged, stored, write_shards
from tightfit.checkpoint.checkpoint import open_checkpoint
from tightfit.cli.output import NoProgress
from tightfit.errors import UnsupportedModelError
from tightfit.sharding.proof.verify import verify


@pytest.mark.parametrize(("model", "scheme"), CASES)
def test_there_and_back(model: str, scheme: str, tmp_path: Path) -> None:
    source = make_quantized_media(model, scheme, tmp_path / "source")
    write_shards(source, tmp_path / "tp2", 2)
    checkpoint = open_checkpoint(str(tmp_path / "tp2"))
    against = open_checkpoint(str(source))
    assert verify(tmp_path / "tp2", checkpoint.config, NoProgress(), against).problems == ()
    assert merged(tmp_path / "tp2", tmp_path / "merged") == stored(source)


def test_the_decoder_is_quantized_and_the_tower_is_not(tmp_path: Path) -> None:
    """As the lists say, by whichever of a module's names."""
    for scheme in ("FP8_DYNAMIC", "W4A16"):
        source = make_quantized_media("qwen2_5_vl", scheme, tmp_path / scheme)
        write_shards(source, tmp_path / f"{scheme}-tp2", 2)
        tensors = load_file(source / "model.safetensors")
        values = "weight" if scheme == "FP8_DYNAMIC" else "weight_packed"
        for rank in range(2):
            found = read_rank(tmp_path / f"{scheme}-tp2", rank)
            tower = tensors["visual.blocks.1.mlp.down_proj.weight"].chunk(2, dim=1)[rank]
            assert torch.equal(found["visual.blocks.1.mlp.down_proj.weight"], tower)
            assert not any("scale" in name for name in found if name.startswith("visual."))
            for kind in (values, "weight_scale"):
                names = [f"model.layers.1.mlp.{name}_proj.{kind}" for name in ("gate", "up")]
                both = torch.cat([tensors[name].chunk(2)[rank] for name in names])
                fused = found[f"language_model.model.layers.1.mlp.gate_up_proj.{kind}"]
                assert torch.equal(fused.view(torch.uint8), both.view(torch.uint8))


@pytest.mark.parametrize("model", ["qwen2_5_vl", "internvl_chat"])
def test_towers_that_no_list_names(model: str, tmp_path: Path) -> None:
    """vLLM would look for them among the tensors, whose names are others in rank files."""
    config = quantized_media_config(model, "awq", [])
    write_quantized(config, tmp_path / "source")
    with pytest.raises(UnsupportedModelError) as e:
        write_shards(tmp_path / "source", tmp_path / "out", 1)
    assert "does not list" in e.value.message
    assert not (tmp_path / "out").exists()


def test_towers_that_are_quantized(tmp_path: Path) -> None:
    config = quantized_media_config("qwen3_vl", "FP8_DYNAMIC", ["lm_head"])
    source = write_quantized(config, tmp_path / "qwen3_vl")
    write_shards(source, tmp_path / "out", 2)
    tensors = load_file(source / "model.safetensors")
    for rank in range(2):
        found = read_rank(tmp_path / "out", rank)
        for kind in ("weight", "weight_scale"):
            members = tensors[f"model.visual.blocks.1.attn.qkv.{kind}"].chunk(3)
            expected = torch.cat([member.chunk(2)[rank] for member in members])
            held = found[f"visual.blocks.1.attn.qkv.{kind}"]
            assert torch.equal(held.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize(
    ("model", "scheme"), [("gemma3_mm", "FP8_DYNAMIC"), ("qwen3_vl", "fp8 dynamic")]
)
def test_towers_that_vllm_may_not_load(model: str, scheme: str, tmp_path: Path) -> None:
    config = quantized_media_config(model, scheme, ["lm_head"])
    write_quantized(config, tmp_path / "source")
    with pytest.raises(UnsupportedModelError) as e:
        write_shards(tmp_path / "source", tmp_path / "out", 1)
    assert "its quantized tower has not been verified" in e.value.message


def test_models_that_nobody_has_verified(tmp_path: Path) -> None:
    config = quantized_media_config("glm4v_moe", "FP8_DYNAMIC", ["re:.*visual.*"])
    write_quantized(config, tmp_path / "source")
    with pytest.raises(UnsupportedModelError) as e:
        write_shards(tmp_path / "source", tmp_path / "out", 1)
    assert "Glm4vMoeForConditionalGeneration is not supported" in e.value.message
