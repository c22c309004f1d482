"""Rank files of multimodal models: towers are cut with their decoders, or whole, or not built."""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from support.slicing import Tensors, read_rank
from support.work import write_shards

TinyModel = Callable[[str], Path]


def shards(model: Path, out: Path) -> tuple[Tensors, list[Tensors]]:
    """The source, and what is in the files of two ranks."""
    write_shards(model, out, 2)
    return load_file(model / "model.safetensors"), [read_rank(out, rank) for rank in range(2)]


def test_a_tower_is_cut_by_its_heads(tiny_model: TinyModel, tmp_path: Path) -> None:
    """Its fused projection has queries, keys and values of a rank, one after the other."""
    source, ranks = shards(tiny_model("qwen2_5_vl"), tmp_path / "out")
    at = "visual.blocks.1."
    for rank, found in enumerate(ranks):
        for kind in ("weight", "bias"):
            members = source[f"{at}attn.qkv.{kind}"].chunk(3)
            expected = torch.cat([member.chunk(2)[rank] for member in members])
            assert torch.equal(found[f"{at}attn.qkv.{kind}"], expected)
        output = source[f"{at}attn.proj.weight"].chunk(2, dim=1)[rank]
        assert torch.equal(found[f"{at}attn.proj.weight"], output)
        gate, up = (source[f"{at}mlp.{name}_proj.weight"].chunk(2)[rank] for name in ("gate", "up"))
        assert torch.equal(found[f"{at}mlp.gate_up_proj.weight"], torch.cat([gate, up]))
        for name in ("patch_embed.proj.weight", "merger.ln_q.weight", "merger.mlp.2.bias"):
            assert torch.equal(found[f"visual.{name}"], source[f"visual.{name}"])
        inner = "language_model.model.layers.1.mlp.down_proj.weight"
        outer = source["model.layers.1.mlp.down_proj.weight"].chunk(2, dim=1)[rank]
        assert torch.equal(found[inner], outer)


def test_layers_that_are_not_built_are_kept(tiny_model: TinyModel, tmp_path: Path) -> None:
    """LLaVA takes the features of its last layer but one."""
    source, ranks = shards(tiny_model("llava"), tmp_path / "out")
    at = "vision_tower.vision_model."
    unused = {n for n in source if n.startswith((f"{at}encoder.layers.2.", f"{at}post_layernorm"))}
    assert len(unused) == 18
    for found in ranks:
        assert f"{at}encoder.layers.1.mlp.fc1.weight" in found
        assert not any(name.startswith(f"{at}encoder.layers.2.") for name in found)
        assert f"{at}post_layernorm.weight" not in found
    with safe_open(tmp_path / "out" / "tightfit-originals.safetensors", "pt") as file:
        assert set(file.keys()) == unused


def test_whole_towers(tiny_model: TinyModel, tmp_path: Path) -> None:
    """InternVL's attention is transformers' own, and on every rank."""
    source, ranks = shards(tiny_model("internvl"), tmp_path / "out")
    at = "vision_tower.encoder.layer.1."
    for rank, found in enumerate(ranks):
        for name in ("q_proj.weight", "v_proj.bias", "projection_layer.weight"):
            assert torch.equal(found[f"{at}attention.{name}"], source[f"{at}attention.{name}"])
        inner = source[f"{at}mlp.fc1.weight"].chunk(2)[rank]
        assert torch.equal(found[f"{at}mlp.fc1.weight"], inner)


def test_keys_without_a_bias(tiny_model: TinyModel, tmp_path: Path) -> None:
    """vLLM holds one bias for Whisper's queries, keys and values, with zeros for the keys."""
    source, ranks = shards(tiny_model("whisper"), tmp_path / "out")
    for side in ("encoder", "decoder"):
        at = f"model.{side}.layers.1.self_attn."
        q, v = source[f"{at}q_proj.bias"], source[f"{at}v_proj.bias"]
        for rank, found in enumerate(ranks):
            expected = torch.cat([q.chunk(2)[rank], torch.zeros_like(q[:64]), v.chunk(2)[rank]])
            assert torch.equal(found[f"{at}qkv_proj.bias"], expected)


def test_rows_that_are_dealt_as_they_are(tiny_model: TinyModel, tmp_path: Path) -> None:
    """vLLM has a plain column parallel layer in Qwen2-VL's tower, whatever the rows are."""
    source, ranks = shards(tiny_model("qwen2_vl"), tmp_path / "out")
    for kind in ("weight", "bias"):
        name = f"visual.blocks.1.attn.qkv.{kind}"
        for rank, found in enumerate(ranks):
            assert torch.equal(found[name], source[name].chunk(2)[rank])
