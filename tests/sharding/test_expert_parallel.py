"""Ranks with whole experts: which ones, the way back, and who can serve them.

Names and shapes are held against vLLM itself in `tests/vllm`.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from support.quantized_media import make_quantized_media
from support.quantized_models import SECTIONS, make_quantized_model
from support.slicing import read_rank
from support.work import merge_shards, write_shards
from tightfit.checkpoint.checkpoint import open_checkpoint
from tightfit.cli.output import NoProgress
from tightfit.cli.shards import require_runnable
from tightfit.errors import LayoutError, UnsupportedModelError, UsageError
from tightfit.sharding.manifest import read_manifest
from tightfit.sharding.proof.verify import verify
from tightfit.sharding.rank_files import open_rank_files

TinyModel = Callable[[str], Path]
SCALED = ("modelopt NVFP4", "modelopt W4A16_NVFP4")
"""vLLM's kernels decide what a rank holds of their scales."""
QUANTIZED = [
    *((scheme, "experts") for scheme in SECTIONS if scheme not in (*SCALED, "mxfp4")),
    *((scheme, "latent") for scheme in ("fp8 block", "INT8", "W4A16")),
    ("fp8 block", "five_experts"),
    ("mxfp4", "gpt_oss"),
    ("mxfp4", "odd_gpt_oss"),
]
FAMILIES = ("mixtral", "qwen3_moe", "gpt_oss", "llama4", "deepseek_v3", "granitemoe", "qwen2_moe")


def bytes_of(directory: Path) -> dict[str, bytes]:
    names = ("*.safetensors", "tightfit-manifest.json")
    return {p.name: p.read_bytes() for name in names for p in directory.glob(name)}


@pytest.mark.parametrize("name", FAMILIES)
def test_there_across_and_back(name: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    model = tiny_model(name)
    for size in (2, 4):
        out = tmp_path / f"ep{size}"
        manifest = write_shards(model, out, size, expert_parallel=True)
        assert manifest.expert_parallel
        source = open_checkpoint(str(model))
        report = verify(out, open_checkpoint(str(out)).config, NoProgress(), source)
        assert report.problems == ()
    assert merge_shards(tmp_path / "ep4", tmp_path / "back") == merge_shards(
        tmp_path / "ep2", tmp_path / "back2"
    )
    whole = load_file(model / "model.safetensors")
    back = load_file(tmp_path / "back/model.safetensors")
    assert whole.keys() == back.keys()
    assert all(torch.equal(whole[key], back[key]) for key in whole)
    # By width, with whole experts, and by width again: as if each was cut from the model itself.
    write_shards(model, tmp_path / "tp2", 2)
    write_shards(tmp_path / "ep4", tmp_path / "tp2-again", 2)
    write_shards(tmp_path / "tp2", tmp_path / "ep4-again", 4, expert_parallel=True)
    assert bytes_of(tmp_path / "tp2") == bytes_of(tmp_path / "tp2-again")
    assert bytes_of(tmp_path / "ep4") == bytes_of(tmp_path / "ep4-again")


@pytest.mark.parametrize(("scheme", "model"), QUANTIZED)
def test_quantized_there_across_and_back(scheme: str, model: str, tmp_path: Path) -> None:
    source = make_quantized_model(scheme, model, tmp_path / "model")
    by_width, dealt = tmp_path / "tp2", tmp_path / "ep2"
    write_shards(source, by_width, 2)
    assert write_shards(source, dealt, 2, expert_parallel=True).expert_parallel
    checkpoint = open_checkpoint(str(dealt))
    report = verify(dealt, checkpoint.config, NoProgress(), open_checkpoint(str(source)))
    assert report.problems == ()
    write_shards(by_width, tmp_path / "ep2-again", 2, expert_parallel=True)
    write_shards(dealt, tmp_path / "tp2-again", 2)
    assert bytes_of(dealt) == bytes_of(tmp_path / "ep2-again") != bytes_of(by_width)
    assert bytes_of(by_width) == bytes_of(tmp_path / "tp2-again")
    merge_shards(dealt, tmp_path / "back")
    assert same_bits(tmp_path / "back/model.safetensors", source / "model.safetensors")


def same_bits(one: Path, other: Path) -> bool:
    found, expected = load_file(one), load_file(other)
    return found.keys() == expected.keys() and all(
        (found[key].dtype, found[key].shape) == (tensor.dtype, tensor.shape)
        and torch.equal(bits(found[key]), bits(tensor))
        for key, tensor in expected.items()
    )


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def test_blocks_that_narrow_shares_would_not_fill(tmp_path: Path) -> None:
    """Experts of two blocks on four ranks: each has one of them, whole, with its scales."""
    source = make_quantized_model("fp8 block", "experts", tmp_path / "model")
    with pytest.raises(LayoutError, match="whole blocks of 128"):
        write_shards(source, tmp_path / "tp4", 4)
    write_shards(source, tmp_path / "ep4", 4, expert_parallel=True)
    tensors = load_file(source / "model.safetensors")
    for expert in range(4):
        found = read_rank(tmp_path / "ep4", expert)
        for kind in ("weight", "weight_scale_inv"):
            at = f"model.layers.0.mlp.experts.{expert}."
            gate, up, down = (tensors[f"{at}{x}_proj.{kind}"] for x in ("gate", "up", "down"))
            new = "model.layers.0.mlp.experts.routed_experts."
            assert torch.equal(bits(found[f"{new}w13_{kind}"]), bits(torch.cat([gate, up])))
            assert torch.equal(bits(found[f"{new}w2_{kind}"]), bits(down))


@pytest.mark.parametrize("model", ["gpt_oss", "odd_gpt_oss"])
def test_whole_experts_of_gpt_oss(model: str, tmp_path: Path) -> None:
    """Nothing is padded, and each rank has all of its own biases."""
    source = make_quantized_model("mxfp4", model, tmp_path / "model")
    write_shards(source, tmp_path / "out", 2, expert_parallel=True)
    tensors = load_file(source / "model.safetensors")
    at = "model.layers.0.mlp.experts."
    names = {"w13": "gate_up_proj", "w2": "down_proj"}
    kinds = {"weight": "_blocks", "weight_scale": "_scales", "bias": "_bias"}
    for rank in range(2):
        found, mine = read_rank(tmp_path / "out", rank), slice(2 * rank, 2 * rank + 2)
        for name, old in names.items():
            for kind, end in kinds.items():
                expected = tensors[f"{at}{old}{end}"][mine]
                expected = expected.flatten(2) if end == "_blocks" else expected
                held = found[f"{at}routed_experts.{name}_{kind}"]
                assert held.shape == expected.shape
                assert torch.equal(bits(held), bits(expected))


def test_whole_experts_in_order(tiny_model: TinyModel, tmp_path: Path) -> None:
    """Four experts on three ranks: vLLM gives the remainder to the first."""
    from transformers import AutoModelForCausalLM, MixtralConfig

    config = MixtralConfig(
        vocab_size=192,
        hidden_size=96,
        intermediate_size=50,
        num_hidden_layers=1,
        num_attention_heads=3,
        num_key_value_heads=3,
        num_local_experts=4,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    write_shards(tmp_path / "model", tmp_path / "out", 3, expert_parallel=True)
    source = load_file(tmp_path / "model/model.safetensors")
    at = "model.layers.0.block_sparse_moe.experts."
    w13 = torch.stack(
        [torch.cat([source[f"{at}{e}.w1.weight"], source[f"{at}{e}.w3.weight"]]) for e in range(4)]
    )
    ranks = [read_rank(tmp_path / "out", rank) for rank in range(3)]
    for found, experts in zip(ranks, ([0, 1], [2], [3]), strict=True):
        assert torch.equal(found[f"{at}routed_experts.w13_weight"], w13[experts])
    with pytest.raises(LayoutError) as e:
        write_shards(tmp_path / "model", tmp_path / "six", 6, expert_parallel=True)
    assert e.value.hint == "tensor parallel sizes that work: 1, 3"


def test_without_a_manifest(tiny_model: TinyModel, tmp_path: Path) -> None:
    """Shapes say that experts are whole."""
    model = tiny_model("qwen3_moe")
    write_shards(model, tmp_path / "out", 2, expert_parallel=True)
    (tmp_path / "out/tightfit-manifest.json").unlink()
    found = open_rank_files(open_checkpoint(str(tmp_path / "out")))
    assert found.parallel.expert_parallel
    merge_shards(tmp_path / "out", tmp_path / "back")
    whole = load_file(model / "model.safetensors")
    back = load_file(tmp_path / "back/model.safetensors")
    assert all(torch.equal(whole[key], back[key]) for key in whole)


def test_refusals(tiny_model: TinyModel, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="LlamaForCausalLM has no experts"):
        write_shards(tiny_model("llama"), tmp_path / "out", 2, expert_parallel=True)
    model = tiny_model("mixtral")
    with pytest.raises(UsageError, match="the built-in runtime gives every rank a slice"):
        write_shards(model, tmp_path / "out", 2, expert_parallel=True, layout="builtin")
    make_quantized_model("modelopt NVFP4", "experts", tmp_path / "nvfp4")
    with pytest.raises(LayoutError, match="depends on vLLM's kernel for modelopt"):
        write_shards(tmp_path / "nvfp4", tmp_path / "out", 2, expert_parallel=True)
    towers = make_quantized_media("qwen3_vl_moe", "fp8 block", tmp_path / "towers")
    with pytest.raises(UnsupportedModelError, match="beside towers has not been verified"):
        write_shards(towers, tmp_path / "out", 2, expert_parallel=True)
    assert not (tmp_path / "out").exists()
    one = write_shards(model, tmp_path / "one", 1, expert_parallel=True)
    assert not one.expert_parallel


def test_the_runtime_says_who_serves_them(tiny_model: TinyModel, tmp_path: Path) -> None:
    model, out = tiny_model("mixtral"), tmp_path / "out"
    with pytest.raises(UnsupportedModelError) as e:
        require_runnable(write_shards(model, out, 2, expert_parallel=True), "OUT")
    assert "whole experts" in e.value.message
    assert "`tightfit shard OUT OUT2 --tensor-parallel-size 2`" in (e.value.hint or "")
    assert "--enable-expert-parallel" in (e.value.hint or "")
    require_runnable(write_shards(model, tmp_path / "plain", 2), "OUT")


def test_manifests_of_before(tiny_model: TinyModel, tmp_path: Path) -> None:
    """They do not speak of experts."""
    write_shards(tiny_model("mixtral"), tmp_path / "out", 2)
    path = tmp_path / "out/tightfit-manifest.json"
    document = json.loads(path.read_bytes())
    del document["expert_parallel"]
    path.write_text(json.dumps(document))
    assert not read_manifest(tmp_path / "out").expert_parallel
