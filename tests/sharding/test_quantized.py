"""Quantized checkpoints in rank files, held against what torch cuts, and back again.

Names, shapes and dtypes are held against vLLM itself in `tests/vllm/test_quantized_state.py`.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from support.make_quantized_data import LLAMA
from support.quantized_models import SECTIONS, make_quantized_model
from support.slicing import read_rank
from support.tiny_models import make_tiny_model
from support.work import write_shards
from tightfit.checkpoint.checkpoint import open_checkpoint
from tightfit.cli.output import NoProgress
from tightfit.errors import LayoutError, UnsupportedModelError
from tightfit.model.families import model_spec
from tightfit.model.layout import Parallel
from tightfit.model.stored.loadable import loading_notes
from tightfit.sharding.merge import merge, prepare_merge
from tightfit.sharding.proof.verify import verify

CASES = [
    *((s, m) for s in SECTIONS if s != "mxfp4" for m in ("dense", "experts")),
    *((s, "latent") for s in ("fp8 block", "INT8", "modelopt NVFP4", "W4A16")),
    ("mxfp4", "gpt_oss"),
    ("mxfp4", "odd_gpt_oss"),
]
QuantizedModel = Callable[..., Path]


@pytest.fixture(scope="module")
def quantized_model(tmp_path_factory: pytest.TempPathFactory) -> QuantizedModel:
    directory = tmp_path_factory.mktemp("quantized")

    def make(scheme: str, model: str) -> Path:
        path = directory / f"{scheme}-{model}".replace(" ", "_")
        return path if path.exists() else make_quantized_model(scheme, model, path)

    return make


def assert_same_bits(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        other = found[name]
        assert (other.dtype, other.shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(_bits(other), _bits(tensor)), name


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def verified(out: Path, source: Path) -> None:
    checkpoint = open_checkpoint(str(out))
    report = verify(out, checkpoint.config, NoProgress(), open_checkpoint(str(source)))
    assert report.problems == ()


@pytest.mark.parametrize(("scheme", "model"), CASES)
def test_there_and_back(
    scheme: str, model: str, quantized_model: QuantizedModel, tmp_path: Path
) -> None:
    source = quantized_model(scheme, model)
    direct = {size: tmp_path / f"tp{size}" for size in (1, 2)}
    for size, out in direct.items():
        write_shards(source, out, size)
        verified(out, source)
    for size, other in ((1, 2), (2, 1)):
        write_shards(direct[other], tmp_path / f"again{size}", size)
        for file in direct[size].iterdir():
            assert (tmp_path / f"again{size}" / file.name).read_bytes() == file.read_bytes()
    job = prepare_merge(open_checkpoint(str(direct[2])), max_shard_bytes=10**9)
    merge(job, tmp_path / "merged", NoProgress())
    found = load_file(tmp_path / "merged" / "model.safetensors")
    assert_same_bits(found, load_file(source / "model.safetensors"))


def cut(source: Path, out: Path) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    write_shards(source, out, 2)
    tensors = load_file(source / "model.safetensors")
    return tensors, [read_rank(out, rank) for rank in range(2)]


def test_scales_of_channels_and_tensors(quantized_model: QuantizedModel, tmp_path: Path) -> None:
    """Scales of channels are cut with them; those of matrices stay side by side."""
    for scheme in ("INT8", "FP8"):
        source, ranks = cut(quantized_model(scheme, "dense"), tmp_path / scheme)
        at = "model.layers.0."
        for rank, found in enumerate(ranks):
            scales = [source[f"{at}self_attn.{x}_proj.weight_scale"] for x in "qkv"]
            o_proj = source[f"{at}self_attn.o_proj.weight_scale"]
            if scheme == "INT8":
                scales = [scale.chunk(2)[rank] for scale in scales]
            qkv = found[f"{at}self_attn.qkv_proj.weight_scale"]
            assert torch.equal(qkv, torch.cat(scales))
            assert torch.equal(found[f"{at}self_attn.o_proj.weight_scale"], o_proj)
            assert found[f"{at}self_attn.attn.k_scale"].tolist() == [1.0]
            assert found[f"{at}self_attn.attn.k_zero_point"].tolist() == [0.0]
            assert found[f"{at}self_attn.attn._k_scale"].tolist() == 1.0


@pytest.mark.parametrize("scheme", ["gptq", "awq"])
def test_transposed_words(scheme: str, quantized_model: QuantizedModel, tmp_path: Path) -> None:
    """Fused along the second dimension, as vLLM holds them."""
    source, ranks = cut(quantized_model(scheme, "dense"), tmp_path / "out")
    at = "model.layers.0."
    for rank, found in enumerate(ranks):
        for kind in ("qweight", "qzeros", "scales"):
            parts = [source[f"{at}self_attn.{x}_proj.{kind}"].chunk(2, dim=1)[rank] for x in "qkv"]
            fused = found[f"{at}self_attn.qkv_proj.{kind}"]
            assert torch.equal(fused, torch.cat(parts, dim=1))
            down = source[f"{at}mlp.down_proj.{kind}"].chunk(2)[rank]
            assert torch.equal(found[f"{at}mlp.down_proj.{kind}"], down)
    source, ranks = cut(quantized_model(scheme, "experts"), tmp_path / "experts")
    old, new = "model.layers.0.mlp.experts.", "model.layers.0.mlp.experts.routed_experts."
    for rank, found in enumerate(ranks):
        for kind in ("qweight", "qzeros", "scales"):
            for expert in range(4):
                at = f"{old}{expert}."
                names = (f"{at}gate_proj.{kind}", f"{at}up_proj.{kind}")
                both = torch.cat([source[name].chunk(2, dim=1)[rank] for name in names], dim=1)
                assert torch.equal(found[f"{new}w13_{kind}"][expert], both)
                down = source[f"{at}down_proj.{kind}"].chunk(2)[rank]
                assert torch.equal(found[f"{new}w2_{kind}"][expert], down)


def test_blocks_and_experts(quantized_model: QuantizedModel, tmp_path: Path) -> None:
    source, ranks = cut(quantized_model("fp8 block", "experts"), tmp_path / "out")
    old, new = "model.layers.0.mlp.experts.", "model.layers.0.mlp.experts.routed_experts."
    for rank, found in enumerate(ranks):
        for expert in range(4):
            for kind in ("weight", "weight_scale_inv"):
                gate, up, down = (
                    source[f"{old}{expert}.{name}_proj.{kind}"] for name in ("gate", "up", "down")
                )
                both = torch.cat([gate.chunk(2)[rank], up.chunk(2)[rank]])
                assert torch.equal(_bits(found[f"{new}w13_{kind}"][expert]), _bits(both))
                mine = down.chunk(2, dim=1)[rank]
                assert torch.equal(_bits(found[f"{new}w2_{kind}"][expert]), _bits(mine))
        assert found["model.layers.0.self_attn.attn.k_scale"].tolist() == -1.0


def test_scalars_of_experts(quantized_model: QuantizedModel, tmp_path: Path) -> None:
    source, ranks = cut(quantized_model("fp8 static", "experts"), tmp_path / "out")
    old, new = "model.layers.0.mlp.experts.", "model.layers.0.mlp.experts.routed_experts."
    for found in ranks:
        assert found[f"{new}w13_weight_scale"].shape == (4, 2)
        for expert in range(4):
            for i, name in enumerate(("gate", "up")):
                scale = source[f"{old}{expert}.{name}_proj.weight_scale"]
                assert found[f"{new}w13_weight_scale"][expert, i] == scale
            scale = source[f"{old}{expert}.down_proj.weight_scale"]
            assert found[f"{new}w2_weight_scale"][expert] == scale


def test_blocks_of_gpt_oss(quantized_model: QuantizedModel, tmp_path: Path) -> None:
    """Sixteen bytes of 32 values are a dimension in the checkpoint alone."""
    source, ranks = cut(quantized_model("mxfp4", "gpt_oss"), tmp_path / "out")
    old, new = "model.layers.0.mlp.experts.", "model.layers.0.mlp.experts.routed_experts."
    for rank, found in enumerate(ranks):
        gate_up = source[f"{old}gate_up_proj_blocks"].flatten(2).chunk(2, dim=1)[rank]
        assert torch.equal(found[f"{new}w13_weight"], gate_up)
        scales = source[f"{old}gate_up_proj_scales"].chunk(2, dim=1)[rank]
        assert torch.equal(found[f"{new}w13_weight_scale"], scales)
        down = source[f"{old}down_proj_blocks"].flatten(2).chunk(2, dim=2)[rank]
        assert torch.equal(found[f"{new}w2_weight"], down)
        # The first rank adds it to the sum of all.
        assert torch.equal(found[f"{new}w2_bias"], source[f"{old}down_proj_bias"] * (rank == 0))
        down = source[f"{old}down_proj_scales"].chunk(2, dim=2)[rank]
        assert torch.equal(found[f"{new}w2_weight_scale"], down)


def test_shares_of_gpt_oss(quantized_model: QuantizedModel, tmp_path: Path) -> None:
    """Eleven blocks of 32 are six and five; kernels want more, and vLLM fills it with zeros."""
    model = quantized_model("mxfp4", "odd_gpt_oss")
    source, ranks = cut(model, tmp_path / "out")
    at = "model.layers.0.mlp.experts."
    for kind, block, name in (("blocks", 16, "weight"), ("scales", 1, "weight_scale")):
        down = source[f"{at}down_proj_{kind}"].flatten(2)
        for found, span in zip(ranks, (slice(6 * block), slice(6 * block, None)), strict=True):
            held = found[f"{at}routed_experts.w2_{name}"]
            assert torch.equal(held[..., : down[..., span].shape[-1]], down[..., span])
            assert held.shape[-1] == 6 * block
            assert not held[..., down[..., span].shape[-1] :].any()
    notes = loading_notes(model_spec(open_checkpoint(str(model)).config), Parallel())
    assert "vLLM makes room for more, fills the rest with zeros" in notes[0]


def test_other_shapes_of_scales(quantized_model: QuantizedModel, tmp_path: Path) -> None:
    """Some producers write `[]` for `[1]`, and `[n]` for `[n, 1]`; it comes back as it was."""
    for scheme in ("FP8", "INT8"):
        tensors = load_file(quantized_model(scheme, "dense") / "model.safetensors")
        model = make_quantized_model(scheme, "dense", tmp_path / scheme)
        flat = {name: t.squeeze() if "scale" in name else t for name, t in tensors.items()}
        save_file(flat, model / "model.safetensors", metadata={"format": "pt"})
        source, ranks = cut(model, tmp_path / f"{scheme}-out")
        verified(tmp_path / f"{scheme}-out", model)
        _, expected = cut(quantized_model(scheme, "dense"), tmp_path / f"{scheme}-expected")
        for found, wanted in zip(ranks, expected, strict=True):
            assert_same_bits(found, wanted)
        again = tmp_path / f"{scheme}-again"
        job = prepare_merge(open_checkpoint(str(tmp_path / f"{scheme}-out")), max_shard_bytes=10**9)
        merge(job, again, NoProgress())
        assert_same_bits(load_file(again / "model.safetensors"), source)


def test_scales_of_a_cache(quantized_model: QuantizedModel, tmp_path: Path) -> None:
    """They are where an attention layer has its placeholders."""
    for scheme, name in (("FP8", "k_scale"), ("fp8 static", "k_proj.output_scale")):
        model = make_quantized_model(scheme, "dense", tmp_path / scheme)
        tensors = load_file(model / "model.safetensors")
        tensors[f"model.layers.0.self_attn.{name}"] = torch.tensor([0.25])
        save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
        _, ranks = cut(model, tmp_path / f"{scheme}-out")
        verified(tmp_path / f"{scheme}-out", model)
        for found in ranks:
            at = "model.layers.0.self_attn.attn."
            assert found[f"{at}k_scale"].reshape(-1).tolist() == [0.25]
            assert found[f"{at}v_scale"].reshape(-1).tolist() in ([1.0], [-1.0])


def test_sizes_that_do_not_divide(quantized_model: QuantizedModel, tmp_path: Path) -> None:
    with pytest.raises(LayoutError) as e:
        write_shards(quantized_model("fp8 block", "experts"), tmp_path / "out", 4)
    assert "tensor parallel size 4" in e.value.message
    assert e.value.hint == "tensor parallel sizes that work: 1, 2"
    assert not (tmp_path / "out").exists()


def test_activation_order_is_refused(tmp_path: Path) -> None:
    section = SECTIONS["gptq"] | {"desc_act": True}
    model = make_quantized_model("gptq", "dense", tmp_path / "model", quantization_config=section)
    with pytest.raises(UnsupportedModelError) as e:
        write_shards(model, tmp_path / "out", 1)
    assert "desc_act" in e.value.message


def test_experts_that_vllm_repacks_are_refused(tmp_path: Path) -> None:
    model = make_quantized_model("awq", "experts", tmp_path / "model", hidden_size=320)
    with pytest.raises(UnsupportedModelError) as e:
        write_shards(model, tmp_path / "out", 1)
    assert "is not supported for a hidden size of 320" in e.value.message


def test_rows_in_another_order(tmp_path: Path) -> None:
    """Llama 4's queries change places, which zero points of eight rows to a word cannot."""
    config = make_tiny_model("llama4", tmp_path / "plain") / "config.json"
    names = {"FP8_DYNAMIC": [], "W4A16_ASYM": ["group_size"]}
    for scheme, smaller in names.items():
        section = json.loads(json.dumps(SECTIONS[scheme]))
        section["ignore"] = ["lm_head", "re:.*router"]
        for group in section["config_groups"].values():
            group["weights"] |= dict.fromkeys(smaller, 32)
        values = json.loads(config.read_bytes()) | {"quantization_config": section}
        model = make_quantized_model(scheme, "dense", tmp_path / scheme, **values)
        out = tmp_path / f"{scheme}-out"
        if smaller:
            with pytest.raises(UnsupportedModelError, match="hold its rows in another order"):
                write_shards(model, out, 1)
            continue
        source, ranks = cut(model, out)
        verified(out, model)
        scale = source["model.layers.0.self_attn.q_proj.weight_scale"].view(4, -1, 2, 1)
        heads = scale.transpose(1, 2).reshape(4, -1, 1)
        fused = ranks[1]["model.layers.0.self_attn.qkv_proj.weight_scale"]
        assert torch.equal(fused[: heads[2:].numel()], heads[2:].reshape(-1, 1))


def test_scales_of_heads_are_refused(tmp_path: Path) -> None:
    scheme = {"num_bits": 8, "type": "float", "strategy": "attn_head"}
    section = SECTIONS["INT8"] | {"kv_cache_scheme": scheme}
    model = make_quantized_model("INT8", "dense", tmp_path / "model", quantization_config=section)
    with pytest.raises(UnsupportedModelError) as e:
        write_shards(model, tmp_path / "out", 1)
    assert "its cache has a scale for each head" in e.value.message


def test_modelopt_beside_the_config(tmp_path: Path) -> None:
    model = make_quantized_model("modelopt FP8", "dense", tmp_path / "model")
    config = json.loads((model / "config.json").read_bytes())
    section = config.pop("quantization_config")
    nested = {"quant_algo": section["quant_algo"], "exclude_modules": section["ignore"]}
    (model / "config.json").write_text(json.dumps(config))
    (model / "hf_quant_config.json").write_text(json.dumps({"quantization": nested}))
    write_shards(model, tmp_path / "out", 2)
    verified(tmp_path / "out", model)


@pytest.mark.parametrize("scheme", ["modelopt NVFP4", "modelopt W4A16_NVFP4"])
def test_whole_experts_of_modelopt(
    scheme: str, quantized_model: QuantizedModel, tmp_path: Path
) -> None:
    source = quantized_model(scheme, "experts")
    with pytest.raises(LayoutError, match="depends on vLLM's kernel"):
        write_shards(source, tmp_path / "out", 2, expert_parallel=True)
    # A rank that is alone has those of all experts in any case.
    write_shards(source, tmp_path / "one", 1, expert_parallel=True)


def test_for_our_own_runtime(quantized_model: QuantizedModel, tmp_path: Path) -> None:
    source = quantized_model("INT8", "dense")
    write_shards(source, tmp_path / "out", 2, layout="builtin")
    verified(tmp_path / "out", source)


def test_without_a_manifest(quantized_model: QuantizedModel, tmp_path: Path) -> None:
    """vLLM's script saves what kernels have made of quantized weights."""
    write_shards(quantized_model("INT8", "dense"), tmp_path / "out", 1)
    (tmp_path / "out" / "tightfit-manifest.json").unlink()
    with pytest.raises(LayoutError, match="kernels may have rearranged"):
        prepare_merge(open_checkpoint(str(tmp_path / "out")), max_shard_bytes=10**9)


def test_heads_and_groups(tmp_path: Path) -> None:
    """A group that two ranks would share is refused, and the sizes that work are named."""
    model = make_quantized_model(
        "gptq",
        "dense",
        tmp_path / "model",
        **(LLAMA | {"intermediate_size": 384}) | {"quantization_config": SECTIONS["gptq"]},
    )
    with pytest.raises(LayoutError) as e:
        write_shards(model, tmp_path / "out", 2)
    assert "the 384 inputs of mlp.down_proj" in e.value.message
    assert e.value.hint == "tensor parallel sizes that work: 1"
