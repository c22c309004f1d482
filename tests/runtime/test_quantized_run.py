"""Quantized checkpoints, executed: their logits are those of the weights that they stand for."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from runtime.ranks import PROMPTS, all_logits, greedy, open_session
from support.cli import tightfit
from support.quantizing import CHOICES, NOT_EXPERTS, quantize
from support.smollm2 import smollm2_or_skip
from support.tiny_models import make_tiny_model
from support.work import write_shards
from tightfit.checkpoint.checkpoint import open_checkpoint
from tightfit.errors import UnsupportedModelError
from tightfit.model.families import model_spec
from tightfit.model.layout import Parallel, Rank
from tightfit.model.parameters import plain_parameters
from tightfit.model.quantization.written import Choice
from tightfit.planner.engines.builtin_quantized import repacked_bytes
from tightfit.planner.weights import weights_component
from tightfit.quantize.dequantize import open_dequantized
from tightfit.runtime.layers import Weights
from tightfit.runtime.layerwise import LayerwiseModel, OnInput
from tightfit.runtime.loading.loader import load_checkpoint
from tightfit.runtime.loading.parameters import rank_parameters
from tightfit.runtime.quantized import DecodedMatrix, Int4Matrix, rank_weights
from tightfit.runtime.ranks.launch import launch_ranks

TESTS = Path(__file__).parents[1]
# Blocks of 128 divide every part of every matrix, also on each of two ranks.
SIZES = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
}
FAMILIES = {
    "llama": {**SIZES, "attention_bias": True},
    "qwen3_moe": {**SIZES, "moe_intermediate_size": 256},
}
NVFP4 = "nvfp4"
LABELS = [*CHOICES, NVFP4]
CASES = [
    (family, label)
    for family in FAMILIES
    for label in LABELS
    if family == "llama" or label not in NOT_EXPERTS
]
TOKENS = torch.tensor([PROMPTS[0]])
GLOBAL_SCALE = 100.0


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """The checkpoint of a family in a scheme, made when it is first asked for."""
    root = tmp_path_factory.mktemp("quantized")

    def make(family: str, label: str) -> Path:
        source = root / family
        if not source.exists():
            make_tiny_model(family, source, dtype="float32", others=FAMILIES[family])
        out = root / f"{family} {label}".replace(" ", "-")
        if not out.exists():
            quantize(source, out, CHOICES.get(label) or CHOICES["nvfp4a16"])
            if label == NVFP4:
                with_inputs(out)
        return out

    return make


def with_inputs(directory: Path) -> None:
    """Make W4A4 of nvfp4a16, as calibration would."""
    (path,) = directory.glob("*.safetensors")
    tensors = load_file(path)
    for name in list(tensors):
        if name.endswith("weight_global_scale"):
            scale = torch.tensor([GLOBAL_SCALE])
            tensors[name.replace("weight_global", "input_global")] = scale
    save_file(tensors, path)
    config = json.loads((directory / "config.json").read_text())
    group = config["quantization_config"]["config_groups"]["group_0"]
    group["input_activations"] = {**group["weights"], "dynamic": "local"}
    (directory / "config.json").write_text(json.dumps(config))


def rounding(label: str) -> OnInput | None:
    """What a scheme does to inputs, written down once more."""

    def tokens(x: Tensor, largest: float, group: int | None = None) -> tuple[Tensor, Tensor]:
        rows = x.unflatten(1, (-1, group or x.shape[1]))
        return rows, rows.abs().amax(dim=-1, keepdim=True) / largest

    def fp8(rows: Tensor, scale: Tensor) -> Tensor:
        return ((rows / scale).to(torch.float8_e4m3fn).float() * scale).flatten(1)

    def e2m1(x: Tensor) -> Tensor:
        grid = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
        return grid[(x.abs()[..., None] - grid).abs().argmin(dim=-1)].copysign(x)

    def int8(_: tuple[str, ...], x: Tensor) -> Tensor:
        rows, scale = tokens(x, 127)
        return ((rows / scale).round() * scale).flatten(1)

    def per_token(_: tuple[str, ...], x: Tensor) -> Tensor:
        return fp8(*tokens(x, 448))

    def per_group(_: tuple[str, ...], x: Tensor) -> Tensor:
        return fp8(*tokens(x, 448, 128))

    def mxfp8(_: tuple[str, ...], x: Tensor) -> Tensor:
        rows, _unused = tokens(x, 1, 32)
        exponent = (rows.abs().amax(dim=-1, keepdim=True) / 1.75).log2().floor() + 1 - 8
        return fp8(rows.clamp(-448 * 2**exponent, 448 * 2**exponent), 2**exponent)

    def nvfp4(_: tuple[str, ...], x: Tensor) -> Tensor:
        rows, scale = tokens(x, 6, 16)
        scale = (scale * GLOBAL_SCALE).to(torch.float8_e4m3fn).float() / GLOBAL_SCALE
        return (e2m1((rows / scale).clamp(-6, 6)) * scale).flatten(1)

    return {
        "int8": int8,
        "fp8-tensor": per_token,
        "fp8-channel": per_token,
        "fp8-block": per_group,
        "fp8-block (fp8)": per_group,
        "mxfp8": mxfp8,
        NVFP4: nvfp4,
    }.get(label)


def expected(path: Path, label: str) -> Tensor:
    """Logits of the decoded weights, one layer at a time."""
    model = LayerwiseModel(open_dequantized(open_checkpoint(str(path))))
    hidden = model.embed(TOKENS)
    for i in range(model.num_layers):
        layer = model.layer(i)
        layer.watch(rounding(label))
        hidden = layer(hidden)
    return model.logits(hidden)[0]


def assert_near(found: Tensor | None, wanted: Tensor, error: float) -> None:
    assert found is not None
    assert (found - wanted).norm() / wanted.norm() < error


@pytest.mark.parametrize(("family", "label"), CASES)
def test_logits_are_those_of_what_the_checkpoint_stands_for(
    family: str, label: str, quantized: Callable[[str, str], Path]
) -> None:
    path = quantized(family, label)
    wanted = expected(path, label)
    session = open_session(path)
    found = all_logits(session, PROMPTS[0])
    # Where inputs are rounded, the order of a sum may round one to the other side.
    assert_near(found, wanted, 0.01 if rounding(label) is None else 0.06)
    planned = weights_component(
        model_spec(open_checkpoint(str(path)).config), Parallel().ranks()[0], "F32"
    )
    assert session.weights_tensor_bytes == planned.planned_bytes


@pytest.mark.parametrize("family", FAMILIES)
def test_two_ranks_from_plain_checkpoints_and_from_rank_files(
    family: str, quantized: Callable[[str, str], Path], tmp_path: Path
) -> None:
    paths = {label: quantized(family, label) for mine, label in CASES if mine == family}
    shards = []
    for path in paths.values():
        out = tmp_path / f"tp2-{path.name}"
        write_shards(path, out, 2, layout="builtin")
        shards.append(out)
    models = map(str, (*paths.values(), *shards))
    command = [sys.executable, "-m", "runtime.ranks", "--logits", str(tmp_path), *models]
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS)}
    assert launch_ranks(command, 2, environment=environment) == 0
    for (label, path), out in zip(paths.items(), shards, strict=True):
        wanted = expected(path, label)
        # Each rank rounds its share of inputs by itself, as vLLM does, and random weights amplify
        # what is rounded to another side.
        error = 0.01 if rounding(label) is None else 0.25
        results = [load_file(tmp_path / f"{p.name}.safetensors")["logits"] for p in (path, out)]
        assert_near(results[0], wanted, error)
        assert torch.equal(*results)


def test_sixteen_bits_stay_close(quantized: Callable[[str, str], Path]) -> None:
    errors = {"nvfp4a16": 0.05, "fp8-channel": 0.2, "int8": 0.1}
    for label, error in errors.items():
        path = quantized("llama", label)
        found = all_logits(open_session(path, dtype="BF16"), PROMPTS[0])
        assert_near(found, expected(path, label), error)


INT4 = ("w4a16 g32", "w4a16-asym g64", "w4a16 g128 (gptq)", "w4a16-asym g128 (awq)")


def bf16_weights(path: Path, *, repack: bool) -> Weights:
    checkpoint = open_checkpoint(str(path))
    spec = model_spec(checkpoint.config)
    needed = rank_parameters(spec, plain_parameters(spec), Rank(), "BF16")
    tensors = load_checkpoint(
        checkpoint,
        needed.settled(checkpoint.tensors()),
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
        dtypes=needed.dtypes,
    )
    return rank_weights(needed, tensors, repack=repack)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("label", INT4)
def test_int4_in_the_order_of_its_kernel(
    family: str, label: str, quantized: Callable[[str, str], Path]
) -> None:
    path = quantized(family, label)
    packed, decoded = (bf16_weights(path, repack=repack) for repack in (True, False))
    assert packed.matrices.keys() == decoded.matrices.keys()
    for name, matrices in packed.matrices.items():
        for one, other in zip(matrices, decoded.matrices[name], strict=True):
            assert isinstance(one, Int4Matrix)
            assert isinstance(other, DecodedMatrix)
            x = torch.randn(3, other.weight.columns).bfloat16()
            assert_near(one(x).float(), other(x).float(), 0.01)
    session = open_session(path, dtype="BF16")
    assert session.executions == {"by torch's int4 kernel": len(packed.matrices)}
    spec, rank = model_spec(open_checkpoint(str(path)).config), Rank()
    planned = weights_component(spec, rank, "BF16").planned_bytes
    assert session.weights_tensor_bytes == planned
    held = sum(tensor.nbytes for tensor in packed.tensors.values())
    assert held == planned + repacked_bytes(spec, rank, 2)


def test_prompts_together_and_in_chunks(quantized: Callable[[str, str], Path]) -> None:
    path = quantized("qwen3_moe", "w4a16 g32")
    assert greedy(path, max_num_batched_tokens=7) == greedy(path)


def test_inputs_that_are_sorted_into_groups(quantized: Callable[[str, str], Path]) -> None:
    path = quantized("llama", "w4a16 g128 (gptq)")
    checkpoint = open_checkpoint(str(path))
    section = {**checkpoint.config["quantization_config"], "desc_act": True}
    spec = model_spec({**checkpoint.config, "quantization_config": section})
    from runtime.ranks import options
    from tightfit.runtime.ranks.world import World
    from tightfit.runtime.session import start

    with pytest.raises(UnsupportedModelError, match="desc_act"):
        start(checkpoint, spec, options(), world=World())


@pytest.mark.slow
@pytest.mark.parametrize(
    "choice",
    [
        Choice(scheme="w4a16", group_size=64),
        Choice(scheme="fp8-channel"),
        Choice(scheme="int8"),
    ],
    ids=lambda choice: choice.label,
)
def test_a_real_model_still_knows_its_capitals(choice: Choice, tmp_path: Path) -> None:
    quantize(smollm2_or_skip(), tmp_path / "out", choice)
    size = ("--max-model-len", "256", "--max-tokens", "8")
    done = tightfit("run", tmp_path / "out", "--raw", "-p", "The capital of France is", *size)
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout
    assert "per second" in done.stdout
    assert "quantized layers: 120 " in done.stdout
