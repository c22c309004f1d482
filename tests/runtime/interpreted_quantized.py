"""Quantized layers and experts by their kernels, to be run with TRITON_INTERPRET=1."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter

from runtime.quantized_cases import CASES, COLUMNS, clones, quantized
from tightfit.model.blocks.mlp import MoE, Routing
from tightfit.model.quantization.recipe import Inputs
from tightfit.runtime.kernels import matmul as kernel
from tightfit.runtime.kernels.experts import assign, max_blocks
from tightfit.runtime.kernels.packed import Packed
from tightfit.runtime.kernels.rounding import rounded, rounded_codes
from tightfit.runtime.layers import Weights
from tightfit.runtime.models.grouped import GroupedExperts
from tightfit.runtime.models.moe import Experts
from tightfit.runtime.models.routing import Router
from tightfit.runtime.quantized.decoded import DecodedExperts, matrix
from tightfit.runtime.quantized.inputs import RoundedInputs, int8_tokens
from tightfit.runtime.quantized.packed import PackedExperts, packed_matrices

_patch_tensor = interpreter._patch_lang_tensor


def _patch(tensor, scope):
    """NumPy 2.4 takes no array of one element for an index, as Triton 3.6 has it."""
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


interpreter._patch_lang_tensor = _patch


def assert_near(found: Tensor, wanted: Tensor, error: float = 2e-3) -> None:
    assert (found.float() - wanted.float()).norm() / wanted.float().norm() < error


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("label", CASES)
def test_matrices(label: str) -> None:
    weight, tensors = quantized(label, (128, 64), 0)
    x, bias = torch.randn(3, COLUMNS).half(), torch.randn(192).half()
    wanted = matrix(weight, tensors)(x.float(), bias.float())
    found = packed_matrices(weight, clones(tensors))
    assert found is not None
    assert_near(found[0](x, bias), wanted)


@pytest.mark.parametrize("label", CASES)
def test_decoded_by_unit_vectors(label: str) -> None:
    """How latent attention takes a matrix apart; rounding would change the ones."""
    weight, tensors = quantized(label, (64,), 0, 128)
    found = packed_matrices(weight, clones(tensors))
    assert found is not None
    units = torch.eye(128)
    wanted = matrix(weight, tensors).exact()(units)
    assert_near(found[0].exact()(units.half()), wanted)
    if weight.inputs is None:
        assert torch.equal(wanted, matrix(weight, tensors)(units))


@pytest.mark.parametrize("label", ["w4a16", "mxfp4", "int8", "fp8-channel"])
def test_sizes_that_blocks_do_not_divide(label: str) -> None:
    weight, tensors = quantized(label, (88,), 0, 320)
    x = torch.randn(18, 320).half()
    found = packed_matrices(weight, clones(tensors))
    assert found is not None
    assert_near(found[0](x), matrix(weight, tensors)(x.float()))


@pytest.mark.parametrize("tokens", [20, 40, 70])
@pytest.mark.parametrize("label", ["mxfp4", "fp8-block", "int8"])
def test_blocks_of_more_tokens(label: str, tokens: int) -> None:
    weight, tensors = quantized(label, (64,), 0, 128)
    x = torch.randn(tokens, 128).half()
    found = packed_matrices(weight, clones(tensors))
    assert found is not None
    assert_near(found[0](x), matrix(weight, tensors)(x.float()))


@pytest.mark.parametrize("splits", [1, 2, 4])
def test_programs_that_share_a_tile(splits: int) -> None:
    weight, tensors = quantized("w4a16", (64,), 0, 512)
    found = packed_matrices(weight, clones(tensors))
    assert found is not None
    x = torch.randn(2, 512).half()
    blocks = kernel.Blocks(n=32, m=16, k=128, num_warps=4, num_stages=2)
    for _ in range(2):
        out = kernel.matmul(x, found[0].weight, blocks=blocks, splits=splits)
        assert_near(out, matrix(weight, tensors)(x.float()))
    assert not kernel.counters(x.device).any()


@pytest.mark.parametrize("label", ["w4a16-asym", "nvfp4a16", "fp8-block", "fp8 weights alone"])
def test_many_tokens(label: str) -> None:
    weight, tensors = quantized(label, (128, 64), 0)
    found = packed_matrices(weight, clones(tensors))
    assert found is not None
    x, bias = torch.randn(5, COLUMNS).half(), torch.randn(192).half()
    rounding = found[0].rounding
    inputs = x if rounding is None else rounding.values(x)
    out = kernel.decoded_matmul(inputs, found[0].weight, bias)
    assert_near(out, matrix(weight, tensors)(x.float(), bias.float()))


def test_columns_that_no_kernel_takes() -> None:
    weight, tensors = quantized("nvfp4a16", (16,), 0, 48)
    assert packed_matrices(weight, tensors) is None


ROUNDED = [
    Inputs(dtype="I8"),
    Inputs(dtype="F8_E4M3"),
    Inputs(dtype="F8_E4M3", group_size=128),
    Inputs(dtype="F8_E4M3", group_size=32, exponents=True),
    Inputs(dtype="F4_E2M1", group_size=16),
]


@pytest.mark.parametrize("inputs", ROUNDED, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rounding_is_that_of_the_cpu(inputs: Inputs, dtype: torch.dtype) -> None:
    x = (torch.randn(5, 256) * torch.logspace(-6, 3, 256)).to(dtype)
    x[2] = 0
    overall = torch.tensor(100.0) if inputs.dtype == "F4_E2M1" else None
    found = rounded(
        x,
        inputs.dtype,
        group_size=inputs.group_size,
        exponents=inputs.exponents,
        overall=overall,
    )
    assert torch.equal(found, RoundedInputs(inputs, overall=overall)(x))
    if not inputs.group_size:
        static = torch.tensor(0.01)
        found = rounded(x, inputs.dtype, static=static)
        assert torch.equal(found, RoundedInputs(inputs, static=static)(x))


def test_codes_of_inputs() -> None:
    x = torch.randn(4, 192)
    for found, wanted in zip(rounded_codes(x, "I8"), int8_tokens(x), strict=True):
        assert torch.equal(found, wanted)
    codes, scales = rounded_codes(x, "F8_E4M3", torch.tensor(0.5))
    assert scales.tolist() == [[0.5]] * 4
    assert torch.equal(codes.float(), (x / 0.5).to(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("tokens", [1, 5, 200])
def test_assignments_are_sorted_by_expert(tokens: int) -> None:
    experts = torch.rand(tokens, 6).argsort(dim=1)[:, :3].contiguous()
    found = assign(experts, 6, 16)
    blocks = int(found.block_experts[0])
    assert blocks <= found.max_blocks == max_blocks(tokens * 3, 6, 16)
    seen = []
    for block in range(blocks):
        places = found.order[block * 16 : block * 16 + 16]
        mine = places[places < tokens * 3]
        assert (experts.flatten()[mine] == found.block_experts[1 + block]).all()
        assert (places[len(mine) :] == tokens * 3).all()
        seen += mine.tolist()
    assert sorted(seen) == list(range(tokens * 3))


ROUTINGS = {
    "softmax": (Routing(), 24, False),
    "sigmoid": (Routing(sigmoid=True, scale=2.5), 16, True),
    "groups": (Routing(groups=4, top_groups=2), 20, False),
    "corrected groups": (Routing(sigmoid=True, groups=4, top_groups=2, scale=2.5), 32, True),
}


@pytest.mark.parametrize("label", ROUTINGS)
@pytest.mark.parametrize("renormalize", [True, False])
def test_routing_is_that_of_the_cpu(label: str, renormalize: bool) -> None:
    routing, experts, corrected = ROUTINGS[label]
    layer = replace(
        moe(),
        num_experts=experts,
        top_k=3,
        renormalize=renormalize,
        routing=routing,
        correction_bias="bias" if corrected else None,
    )
    tensors = {"m.gate.weight": torch.eye(experts), "m.bias": torch.randn(experts) / 4}
    router = Router(layer, Weights(tensors=tensors), "m")
    logits = torch.randn(9, experts)
    (shares, numbers), (wanted, best) = router._choose_at_once(logits), router(logits)
    assert torch.equal(numbers, best)
    assert_near(shares, wanted, 1e-6)


def moe(activation: str = "silu") -> MoE:
    return MoE(
        num_experts=4, top_k=2, intermediate_size=96, activation=activation, renormalize=True
    )


def chosen(tokens: int) -> tuple[Tensor, Tensor]:
    shares, experts = torch.rand(tokens, 4).topk(2)
    return shares, experts


def plain_experts(layer: MoE, dtype: torch.dtype) -> tuple[GroupedExperts, Experts]:
    """Those of the kernels, and those of a CPU in float32."""
    tensors = {
        "m.experts.w13_weight": torch.randn(4, 192, 64).to(dtype) / 8,
        "m.experts.w2_weight": torch.randn(4, 64, 96).to(dtype) / 8,
        "m.experts.w13_bias": torch.randn(4, 192).to(dtype),
        "m.experts.w2_bias": torch.randn(4, 64).to(dtype),
    }
    w13, w2 = (
        PackedExperts(Packed(kind="plain", values=weight, columns=weight.shape[-1]), None)
        for weight in list(tensors.values())[:2]
    )
    floats = Weights(tensors={name: tensor.float() for name, tensor in tensors.items()})
    found = GroupedExperts(layer, w13, w2, Weights(tensors=tensors), "m")
    return found, Experts(layer, floats, "m")


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_pytorch_tanh", "swigluoai"])
def test_plain_experts(activation: str) -> None:
    layer = moe(activation)
    if activation == "swigluoai":
        layer = replace(layer, names=replace(layer.names, alternating=True))
    found, wanted = plain_experts(layer, torch.float16)
    x, given = torch.randn(19, 64).half(), chosen(19)
    assert_near(found(x, *given), wanted(x.float(), *given))


def test_experts_in_float32_and_many_blocks() -> None:
    found, wanted = plain_experts(moe(), torch.float32)
    x, given = torch.randn(110, 64), chosen(110)
    assert_near(found(x, *given), wanted(x, *given), 1e-6)


def test_experts_that_all_take_all_tokens() -> None:
    _, experts = plain_experts(moe(), torch.float32)
    x, given = torch.randn(5, 64), chosen(5)
    wanted = experts(x, *given)
    x[0, 0] = torch.inf
    out = torch.zeros_like(x)
    experts._add_all(x, *given, out)
    assert_near(out[1:], wanted[1:], 1e-6)


EXPERTS = ("fp8-tensor", "fp8-block", "int8", "w4a16-asym", "awq", "nvfp4", "mxfp4")


@pytest.mark.parametrize("label", EXPERTS)
def test_quantized_experts(label: str) -> None:
    w13, w13_tensors = quantized(label, (128, 128), 4, 128)
    w2, w2_tensors = quantized(label, (128,), 4, 128)
    wanted = Weights(
        tensors={},
        matrices={
            "m.experts.w13_weight": DecodedExperts(w13, w13_tensors),
            "m.experts.w2_weight": DecodedExperts(w2, w2_tensors),
        },
    )
    packed = Weights(
        tensors={},
        matrices={
            "m.experts.w13_weight": packed_matrices(w13, clones(w13_tensors)) or [],
            "m.experts.w2_weight": packed_matrices(w2, clones(w2_tensors)) or [],
        },
    )
    x = torch.randn(5, 128).half()
    given = chosen(5)
    layer = replace(moe(), intermediate_size=128)
    found = GroupedExperts.of(layer, packed, "m")
    assert found is not None
    # What is rounded to the other side counts more where few values are left.
    error = 0.03 if CASES[label][2] is not None else 3e-3
    assert_near(found(x, *given), Experts(layer, wanted, "m")(x.float(), *given), error)
    one: Callable[[Tensor], Tensor] = found.w13[2]
    assert_near(one(x), wanted.experts("m.experts.w13_weight")[2](x.float()))


def test_experts_take_tokens_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {
        "m.experts.w13_weight": torch.randn(4, 192, 64).half() / 8,
        "m.experts.w2_weight": torch.randn(4, 64, 96).half() / 8,
    }
    w13, w2 = (
        PackedExperts(Packed(kind="plain", values=weight, columns=weight.shape[-1]), None)
        for weight in tensors.values()
    )
    experts = GroupedExperts(moe(), w13, w2, Weights(tensors=tensors), "m")
    x, given = torch.randn(7, 64).half(), chosen(7)
    whole = experts(x, *given)
    monkeypatch.setattr("tightfit.runtime.models.grouped.expert_tokens", lambda *_: 3)
    assert torch.equal(experts(x, *given), whole)
