"""Every family is quantized, and every tensor of it is accounted for."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils.match import match_named_modules
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from support.tiny_families import FAMILIES
from support.tiny_media import MEDIA
from support.tiny_models import NAMES
from support.wishes import CHOICES, ONE_OF_EACH_FORMAT, WISHES, mixed
from tightfit.checkpoint.checkpoint import open_checkpoint
from tightfit.checkpoint.describe import describe
from tightfit.cli.output import NoProgress
from tightfit.codecs import codec
from tightfit.errors import LayoutError, UnsupportedModelError
from tightfit.model.quantization.recipe import split_experts
from tightfit.model.quantization.section import _FORMATS
from tightfit.model.quantization.written import COMPRESSED_TENSORS, Wish, matrices
from tightfit.quantize.job import QuantizeJob, prepare
from tightfit.quantize.write import write, write_job

STORED_OTHERWISE = ("dbrx", "gpt2", "gpt_oss", "mamba", "mamba2")
"""`test_section` says why."""
QUANTIZED = [name for name in (*NAMES, *FAMILIES, *MEDIA) if name not in STORED_OTHERWISE]
STACKED = {
    "granitemoe": "block_sparse_moe.input_linear",
    "granitemoehybrid": "block_sparse_moe.input_linear",
    "llama4": "feed_forward.experts.gate_up_proj",
    "llama4_mm": "feed_forward.experts.gate_up_proj",
    "qwen3_vl_moe": "mlp.experts.gate_up_proj",
    "qwen3_5_moe": "mlp.experts.gate_up_proj",
}
TinyModel = Callable[[str], Path]


def quantized(model: Path, wish: Wish, out: Path) -> tuple[QuantizeJob, dict[str, Tensor]]:
    job = prepare(open_checkpoint(str(model)), wish)
    write(write_job(job, max_shard_bytes=10**9), out, NoProgress())
    return job, load_file(out / "model.safetensors")


def tensors_of(model: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in model.glob("*.safetensors"):
        found |= load_file(path)
    return found


@pytest.mark.parametrize("name", QUANTIZED)
def test_every_tensor_is_accounted_for(name: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    """Those of quantized matrices stand for them, and all others are as they were."""
    model = tiny_model(name)
    before, wish = tensors_of(model), mixed(describe(open_checkpoint(str(model))).spec)
    job, after = quantized(model, wish, tmp_path / "out")
    consumed = {matrix.source.name for matrix in job.matrices}
    made = {one.name for matrix in job.matrices for one in matrix.outputs.values()}
    kept = before.keys() - consumed
    assert after.keys() == kept | made
    for tensor in kept:
        assert before[tensor].dtype == after[tensor].dtype
        assert torch.equal(before[tensor], after[tensor])
    # Each element of a consumed tensor belongs to one matrix.
    for tensor in consumed:
        elements = sum(m.rows * m.columns for m in job.matrices if m.source.name == tensor)
        assert elements == before[tensor].numel()
    description = describe(open_checkpoint(str(tmp_path / "out")))
    assert description.warnings == describe(job.checkpoint).warnings
    assert description.from_headers


@pytest.mark.parametrize("label", ["fp8-channel", "w4a16 g32", "nvfp4a16"])
@pytest.mark.parametrize("name", STACKED)
def test_stacked_experts_are_quantized_one_by_one(
    name: str, label: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    """As if each expert had had a tensor of its own: gate and up share what an engine fuses."""
    model = tiny_model(name)
    before = tensors_of(model)
    job, after = quantized(model, WISHES[label], tmp_path / "out")
    weights = [w for w in matrices(job.spec) if w.stacked]
    assert any(".experts.0.gate_proj." in tensor for tensor in after)
    assert any(STACKED[name] in part.source for w in weights for part in w.parts)
    for weight in weights:
        parts = split_experts(weight).parts
        for expert in range(weight.experts):
            whole = before[weight.parts[0].source][expert]
            apart = (whole.T if weight.transposed else whole).split([p.rows for p in parts])
            coder = codec(CHOICES[label], whole.dtype)
            amax = whole.float().abs().amax() if coder.needs_amax else None
            for part, rows in zip(parts, apart, strict=True):
                module = part.source.format(expert=expert).removesuffix(".weight")
                for kind, expected in coder.encode(rows.float().contiguous(), amax).items():
                    assert torch.equal(bits(after[f"{module}.{kind}"]), bits(expected))


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


@pytest.mark.parametrize("name", QUANTIZED)
def test_compressed_tensors_finds_the_same_modules(name: str, tiny_model: TinyModel) -> None:
    """Its own reading of our section, on a tree of linear layers with the names of the files."""
    checkpoint = open_checkpoint(str(tiny_model(name)))
    spec = describe(checkpoint).spec
    for wish in (mixed(spec), *(w for w in WISHES.values() if w.format == COMPRESSED_TENSORS)):
        try:
            job = prepare(checkpoint, wish)
        except (LayoutError, UnsupportedModelError):
            # Blocks do not divide what engines fuse in tiny models, or experts have one scale.
            assert {choice.scheme for choice in wish.choices} <= {"fp8-block", "fp8-tensor"}
            continue
        names = {matrix.module for matrix in job.matrices}
        names |= {n.removesuffix(".weight") for n in checkpoint.tensors() if is_matrix(job, n)}
        config = QuantizationConfig.model_validate(job.virtual.config["quantization_config"])
        tree, found = tree_of(names), dict[str, str]()
        for scheme in config.config_groups.values():
            assert scheme.weights is not None
            matched = match_named_modules(tree, scheme.targets, config.ignore)
            found |= {module: str(scheme.format) for module, _ in matched}
        assert found == {m.module: _FORMATS[m.choice.scheme] for m in job.matrices}


def is_matrix(job: QuantizeJob, name: str) -> bool:
    """What could be a linear layer, in a tensor of its own."""
    module, _, kind = name.rpartition(".")
    other = module == job.spec.names.embedding or re.search("embed|norm", module)
    return kind == "weight" and len(job.checkpoint.tensors()[name].shape) == 2 and not other


def tree_of(names: set[str]) -> nn.Module:
    tree = nn.Module()
    for name in sorted(names):
        *path, last = name.split(".")
        at = tree
        for step in path:
            if step not in at._modules:
                at.add_module(step, nn.Module())
            at = at._modules[step]  # type: ignore[assignment]
        at.add_module(last, nn.Linear(1, 1, bias=False, device="meta"))
    return tree


def test_layers_that_predict_further_tokens_are_kept(tiny_model: TinyModel, tmp_path: Path) -> None:
    """DeepSeek's follow the last layer; Qwen3-Next's are beside the model."""
    for name, prefix in (("deepseek_v3", "model.layers.2"), ("qwen3_next", "mtp.layers.0")):
        model = tmp_path / name
        tensors = tensors_of(tiny_model(name))
        extra = {
            f"{prefix}.{tail}.weight": torch.ones(64, 128, dtype=torch.bfloat16)
            for tail in ("self_attn.o_proj", "mlp.experts.0.up_proj", "mlp.experts.1.up_proj")
        }
        extra["mtp.fc.weight" if name == "qwen3_next" else f"{prefix}.eh_proj.weight"] = torch.ones(
            64, 256, dtype=torch.bfloat16
        )
        model.mkdir()
        save_file(tensors | extra, model / "model.safetensors", metadata={"format": "pt"})
        (model / "config.json").write_bytes((tiny_model(name) / "config.json").read_bytes())
        job, after = quantized(model, WISHES["int8"], tmp_path / f"{name}-int8")
        assert all(torch.equal(after[key], tensor) for key, tensor in extra.items())
        config = QuantizationConfig.model_validate(job.virtual.config["quantization_config"])
        tree = tree_of({key.removesuffix(".weight") for key in extra})
        assert not list(match_named_modules(tree, ["Linear"], config.ignore))
        matched = {m.module for m in job.matrices}
        tree = tree_of(matched)
        assert {n for n, _ in match_named_modules(tree, ["Linear"], config.ignore)} == matched


def test_stacked_experts_that_predict_further_tokens_are_kept(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    """As Qwen3.5 has them; engines ask for them by the names of single ones."""
    model = tmp_path / "model"
    shutil.copytree(tiny_model("qwen3_next"), model)
    stacked = "mtp.layers.0.mlp.experts"
    extra = {
        f"{stacked}.gate_up_proj": torch.ones(4, 128, 128, dtype=torch.bfloat16),
        f"{stacked}.down_proj": torch.ones(4, 128, 64, dtype=torch.bfloat16),
    }
    save_file(tensors_of(model) | extra, model / "model.safetensors", metadata={"format": "pt"})
    job, after = quantized(model, WISHES["int8"], tmp_path / "out")
    assert all(torch.equal(after[key], tensor) for key, tensor in extra.items())
    config = QuantizationConfig.model_validate(job.virtual.config["quantization_config"])
    names = {f"{stacked}.0.{part}" for part in ("gate_proj", "up_proj", "down_proj")}
    assert not list(match_named_modules(tree_of(names), ["Linear"], config.ignore))


def test_layers_that_keep_a_state_stay(tiny_model: TinyModel) -> None:
    fp8 = CHOICES["fp8-channel"]
    for name, state in (("qwen3_next", "linear_attn"), ("jamba", "mamba"), ("bamba", "mamba")):
        job = prepare(open_checkpoint(str(tiny_model(name))), Wish(default=fp8))
        assert job.matrices
        assert not [m.module for m in job.matrices if f".{state}." in m.module]
    wish = Wish(default=fp8, rules=((r"\.linear_attn\.out_proj", fp8),))
    asked = prepare(open_checkpoint(str(tiny_model("qwen3_next"))), wish)
    assert [m.module for m in asked.matrices if ".linear_attn." in m.module] == [
        "model.layers.0.linear_attn.out_proj"
    ]


def test_sections_of_all_formats_are_json(tiny_model: TinyModel) -> None:
    checkpoint = open_checkpoint(str(tiny_model("qwen3_moe")))
    for label in ONE_OF_EACH_FORMAT:
        wish = replace(WISHES[label], rules=(("self_attn", None),))
        found = prepare(checkpoint, wish).virtual.config["quantization_config"]
        assert json.loads(json.dumps(found)) == found
