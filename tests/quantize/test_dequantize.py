import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from support.seeded_models import LLAMA, QWEN3_MOE, write_seeded_model
from support.tiny_families import FAMILIES
from support.tiny_media import MEDIA
from support.tiny_models import NAMES
from support.wishes import WISHES
from tightfit.checkpoint.checkpoint import Checkpoint, open_checkpoint
from tightfit.checkpoint.describe import describe
from tightfit.cli.output import NoProgress
from tightfit.codecs import codec
from tightfit.errors import UnsupportedModelError
from tightfit.model.families import model_spec
from tightfit.model.quantization.written import Choice, Wish
from tightfit.model.sources import expected_sources
from tightfit.quantize import dequantize
from tightfit.quantize.decoding import read_stored
from tightfit.quantize.dequantize import open_dequantized
from tightfit.quantize.job import QuantizeJob, prepare
from tightfit.quantize.quality import measure
from tightfit.quantize.write import write, write_job
from tightfit.units import MiB

NVFP4_LEVELS = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
STORED_OTHERWISE = ("dbrx", "gpt2", "gpt_oss", "mamba", "mamba2")
QUANTIZED = [name for name in (*NAMES, *FAMILIES, *MEDIA) if name not in STORED_OTHERWISE]
TORCH = {"F8_E4M3": torch.float8_e4m3fn, "U8": torch.uint8, "I8": torch.int8, "F32": torch.float32}
TORCH |= {"I32": torch.int32, "I64": torch.int64, None: torch.bfloat16}
LLAMA4 = {
    **QWEN3_MOE,
    "architectures": ["Llama4ForCausalLM"],
    "model_type": "llama4_text",
    "intermediate_size": 128,
    "intermediate_size_mlp": 384,
    "num_local_experts": 4,
    "interleave_moe_layer_step": 1,
    "attention_chunk_size": 128,
}
QKV = "model.layers.1.self_attn.q_proj"


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_seeded_model(QWEN3_MOE, tmp_path_factory.mktemp("moe") / "model")


def job(model: Path, scheme: str, format: str = "compressed-tensors") -> QuantizeJob:
    size = 64 if scheme.startswith(("w4", "w8")) else None
    wish = Wish(default=Choice(scheme=scheme, group_size=size, format=format))
    return prepare(open_checkpoint(str(model)), wish)


def tensor(checkpoint: Checkpoint, name: str) -> Tensor:
    return read_stored({"": checkpoint.tensors()[name]}, checkpoint.source)[""]


@pytest.mark.parametrize(
    ("scheme", "format"),
    [
        ("fp8-block", "fp8"),
        ("w4a16", "gptq"),
        ("w8a16", "gptq"),
        ("w4a16-asym", "awq"),
        *((scheme, "compressed-tensors") for scheme in ("fp8-channel", "fp8-block")),
        *((scheme, "compressed-tensors") for scheme in ("int8", "w8a16", "w4a16", "w4a16-asym")),
        *((scheme, "compressed-tensors") for scheme in ("nvfp4a16", "mxfp4", "mxfp8")),
    ],
)
def test_what_is_written_is_decoded(
    moe: Path, scheme: str, format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dequantize, "_CHUNK_ELEMENTS", 256 * 32)
    this = job(moe, scheme, format)
    found = open_dequantized(this.virtual)
    assert describe(found).spec.quantization is None
    assert {n: (i.dtype, i.shape) for n, i in found.tensors().items()} == {
        n: (i.dtype, i.shape) for n, i in this.checkpoint.tensors().items()
    }
    stored = this.virtual.tensors()
    for matrix in this.matrices[::5]:
        held = {kind: stored[one.name] for kind, one in matrix.outputs.items()}
        coder = codec(matrix.choice, torch.bfloat16)
        expected = coder.decode(read_stored(held, this.virtual.source)).bfloat16()
        assert torch.equal(tensor(found, f"{matrix.module}.weight"), expected)
    for name in ("model.embed_tokens.weight", "model.layers.0.mlp.gate.weight", "lm_head.weight"):
        assert torch.equal(tensor(found, name), tensor(this.checkpoint, name))


def test_fp8_becomes_int4(moe: Path, tmp_path: Path) -> None:
    eight = tmp_path / "fp8"
    write(write_job(job(moe, "fp8-block", "fp8"), max_shard_bytes=MiB), str(eight), NoProgress())
    (eight / "tokenizer.json").write_text("{}")
    (eight / "quantize_config.json").write_text("{}")
    plain = open_dequantized(open_checkpoint(str(eight)))
    this = prepare(plain, Wish(default=Choice(scheme="w4a16", group_size=64)))
    four = tmp_path / "w4a16"
    write(write_job(this, max_shard_bytes=MiB), str(four), NoProgress())
    config = json.loads((four / "config.json").read_text())
    assert config["quantization_config"]["format"] == "pack-quantized"
    assert (four / "tokenizer.json").exists()
    assert not (four / "quantize_config.json").exists()

    written = open_checkpoint(str(four))
    assert "w4" in describe(written).spec.quantization.name  # type: ignore[union-attr]
    name = "model.layers.0.mlp.experts.3.down_proj"
    matrix = next(one for one in this.matrices if one.module == name)
    coder = codec(matrix.choice, torch.bfloat16)
    held = {kind: written.tensors()[one.name] for kind, one in matrix.outputs.items()}
    stored = read_stored(held, written.source)
    expected = coder.encode(tensor(plain, f"{name}.weight").float())
    assert all(torch.equal(stored[kind], expected[kind]) for kind in expected)
    assert measure(this, written).total.relative_error == pytest.approx(0.228, abs=0.01)


def test_dequantizing_survives_pickling(moe: Path) -> None:
    source = open_dequantized(job(moe, "mxfp8").virtual).source
    again = pickle.loads(pickle.dumps(source))
    assert again.read("model.safetensors") == source.read("model.safetensors")
    assert again.state("model.safetensors") == source.state("model.safetensors")


def test_an_unquantized_checkpoint_stays(moe: Path) -> None:
    checkpoint = open_checkpoint(str(moe))
    assert open_dequantized(checkpoint) is checkpoint


def write_stored(
    directory: Path, section: dict[str, Any], config: dict[str, Any] = LLAMA, **more: Tensor
) -> dict[str, Tensor]:
    """A checkpoint of random codes and scales, of any format that specs can say."""
    generator = torch.Generator().manual_seed(3)
    config = {**config, "quantization_config": section}
    tensors: dict[str, Tensor] = {}
    for name, one in expected_sources(model_spec(config)).items():
        dtype = TORCH.get(one.dtype, torch.bfloat16)
        if name.endswith("g_idx"):
            continue
        if name.endswith(("scale", "scales", "scale_inv", "scale_2")) and one.dtype != "U8":
            values = torch.rand(one.shape, generator=generator) / 64 + 2**-9
        elif name.endswith("scale"):
            values = torch.randint(118, 124, one.shape, generator=generator)
        elif dtype.is_floating_point:
            values = torch.randn(one.shape, generator=generator)
        else:
            info = torch.iinfo(dtype)
            low, high = max(info.min, -(2**31)), min(info.max, 2**31 - 1)
            values = torch.randint(low, high + 1, one.shape, generator=generator)
        tensors[name] = values.to(dtype)
    tensors |= more
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return tensors


def groups(weights: dict[str, Any], inputs: object, format: str) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


INT8: dict[str, Any] = {"num_bits": 8, "type": "int", "symmetric": True}
STATIC: dict[str, Any] = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}
Naive = Callable[[dict[str, Tensor]], Tensor]


def scaled(held: dict[str, Tensor]) -> Tensor:
    scale = held["weight_scale"].float()
    weight = held["weight"].float()
    groups = 1 if scale.numel() == 1 else scale.numel() // len(weight)
    return (weight.unflatten(1, (groups, -1)) * scale.reshape(-1, groups, 1)).flatten(1)


def modelopt_fp4(held: dict[str, Tensor]) -> Tensor:
    codes = torch.stack((held["weight"] & 15, held["weight"] >> 4), dim=-1).flatten(1).long()
    values = NVFP4_LEVELS[codes % 8] * torch.where(codes > 7, -1, 1)
    scale = held["weight_scale"].float() * held["weight_scale_2"]
    return values * scale.repeat_interleave(16, dim=1)


FOREIGN: dict[str, tuple[dict[str, Any], Naive]] = {
    "static fp8": (groups(STATIC, STATIC, "float-quantized"), scaled),
    "autofp8": ({"quant_method": "fp8", "activation_scheme": "static"}, scaled),
    "fbgemm": ({"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}, scaled),
    "modelopt fp8": ({"quant_method": "modelopt", "quant_algo": "FP8"}, scaled),
    "modelopt nvfp4": ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, modelopt_fp4),
    "int8 tensor": (groups({**INT8, "strategy": "tensor"}, None, "int-quantized"), scaled),
    "int8 groups": (
        groups({**INT8, "strategy": "group", "group_size": 32}, None, "int-quantized"),
        scaled,
    ),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_other_origins(tmp_path: Path, name: str) -> None:
    section, naive = FOREIGN[name]
    beside = f"{QKV}.input_scale_ub" if name == "fbgemm" else "model.layers.0.self_attn.k_scale"
    stored = write_stored(tmp_path / "m", section, **{beside: torch.ones(1)})
    found = open_dequantized(open_checkpoint(str(tmp_path / "m")))
    assert set(found.tensors()) == set(expected_sources(model_spec(LLAMA)))
    held = {n.rpartition(".")[2]: t for n, t in stored.items() if n.startswith(f"{QKV}.")}
    assert torch.equal(tensor(found, f"{QKV}.weight"), naive(held).bfloat16())
    assert "quantization_config" not in found.config


def test_modelopt_tells_beside_the_config(tmp_path: Path) -> None:
    section = {"quant_method": "modelopt", "quant_algo": "FP8"}
    write_stored(tmp_path / "m", section)
    (tmp_path / "m" / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "m" / "hf_quant_config.json").write_text(json.dumps({"quantization": section}))
    found = open_dequantized(open_checkpoint(str(tmp_path / "m")))
    assert not found.source.exists("hf_quant_config.json")
    assert describe(found).spec.quantization is None


def test_layers_that_no_engine_loads_are_decoded_too(tmp_path: Path) -> None:
    config = {
        **QWEN3_MOE,
        "architectures": ["Glm4MoeForCausalLM"],
        "model_type": "glm4_moe",
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "num_nextn_predict_layers": 1,
    }
    section = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    module = "model.layers.2.eh_proj"
    weight = torch.randn(128, 256).to(torch.float8_e4m3fn)
    more = {f"{module}.weight": weight, f"{module}.weight_scale_inv": torch.tensor([[2.0, 0.5]])}
    write_stored(tmp_path / "m", section, config, **more)
    found = open_dequantized(open_checkpoint(str(tmp_path / "m")))
    expected = weight.float() * torch.tensor([2.0] * 128 + [0.5] * 128)
    assert torch.equal(tensor(found, f"{module}.weight"), expected.bfloat16())
    assert not [name for name in found.tensors() if name.endswith("scale_inv")]


@pytest.mark.parametrize(
    ("section", "reason"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": True}, "desc_act"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_v2"}, "gptq_v2"),
        ({"quant_method": "gptq", "bits": 2, "group_size": 64}, "no codec decodes"),
        ({"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": False}, "no codec"),
    ],
)
def test_what_is_not_decoded_is_refused(
    tmp_path: Path, section: dict[str, Any], reason: str
) -> None:
    write_stored(tmp_path / "m", section)
    with pytest.raises(UnsupportedModelError, match=reason):
        open_dequantized(open_checkpoint(str(tmp_path / "m")))


def test_sorted_inputs_are_refused_also_where_no_config_tells(moe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(write_job(job(moe, "w4a16", "gptq"), max_shard_bytes=2**30), str(out), NoProgress())
    (file,) = out.glob("*.safetensors")
    tensors = load_file(file)
    name = f"{QKV}.g_idx"
    tensors[name] = tensors[name].flip(0)
    save_file(tensors, file)
    found = open_dequantized(open_checkpoint(str(out)))
    with pytest.raises(UnsupportedModelError, match=f"{name} sorts inputs"):
        tensor(found, f"{QKV}.weight")


def test_stacked_experts_are_stacked_again(tmp_path: Path) -> None:
    model = write_seeded_model(LLAMA4, tmp_path / "model")
    this = job(model, "int8")
    found = open_dequantized(this.virtual)
    assert set(found.tensors()) == set(this.checkpoint.tensors())
    name = "model.layers.1.feed_forward.experts.gate_up_proj"
    original, decoded = tensor(this.checkpoint, name), tensor(found, name)
    assert decoded.shape == original.shape
    error = (decoded.float() - original.float()).norm() / original.float().norm()
    assert 0 < error < 0.03


def test_experts_of_which_one_is_missing_stay_apart(tmp_path: Path) -> None:
    this = job(write_seeded_model(LLAMA4, tmp_path / "model"), "int8")
    assert this.quantized_spec.quantization is not None
    decoded = dequantize._decoded(this.quantized_spec.quantization, this.virtual.tensors())
    experts = "model.layers.1.feed_forward.experts"
    del decoded[f"{experts}.3.up_proj"]
    made = dequantize._made(this.quantized_spec, decoded)
    names = {output.name for one in made for output in one.outputs.values()}
    assert {f"{experts}.{i}.gate_proj.weight" for i in range(4)} <= names
    assert f"{experts}.gate_up_proj" not in names


@pytest.mark.parametrize("name", QUANTIZED)
def test_every_family_comes_back(name: str, tiny_model: Callable[[str], Path]) -> None:
    this = prepare(open_checkpoint(str(tiny_model(name))), WISHES["int8"])
    found = open_dequantized(this.virtual)
    assert describe(found).spec.quantization is None
    before, after = this.checkpoint.tensors(), found.tensors()
    assert {n: i.shape for n, i in after.items()} == {n: i.shape for n, i in before.items()}
    for source in {matrix.source.name for matrix in this.matrices[:: len(this.matrices) // 3 + 1]}:
        original = tensor(this.checkpoint, source).float()
        error = (tensor(found, source).float() - original).norm() / original.norm()
        assert 0 < error < 0.02, source
