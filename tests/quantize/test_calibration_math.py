"""GPTQ, searched scales and folded scales as functions of tensors."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from support.seeded_models import LLAMA, QWEN3_MOE, write_seeded_model
from tightfit.checkpoint.checkpoint import open_checkpoint
from tightfit.codecs import Codec, Scales, codec
from tightfit.model.quantization.written import SCHEMES, Choice
from tightfit.quantize.calibration.folding import folds
from tightfit.quantize.calibration.gptq import gptq, hessian
from tightfit.quantize.calibration.inputs import Inputs
from tightfit.quantize.calibration.scales import least_output_error
from tightfit.quantize.calibration.smoothing import (
    awq_scales,
    rounding_of_inputs,
    smoothquant_scales,
)
from tightfit.runtime.layerwise import LayerwiseModel

COLUMNS = 256


def correlated(tokens: int = 600, *, seed: int = 1) -> Tensor:
    """Inputs whose channels hang together, some of them large."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(40, COLUMNS, generator=torch.Generator().manual_seed(0))
    x = torch.randn(tokens, 40, generator=generator) @ mixing
    x += torch.randn(tokens, COLUMNS, generator=generator)
    x[:, ::50] *= 20
    return x


def weights(rows: int = 64) -> Tensor:
    return torch.randn(rows, COLUMNS, generator=torch.Generator().manual_seed(7)) * 0.05


def coder_of(scheme: str) -> Codec:
    size = 64 if scheme in ("w4a16", "w4a16-asym", "w8a16") else None
    return codec(Choice(scheme=scheme, group_size=size), torch.bfloat16)


def output_error(values: Tensor, weight: Tensor, x: Tensor) -> float:
    return float(((values - weight) @ x.T).square().sum())


def test_the_factor_is_that_of_the_inverse() -> None:
    gram = correlated().T @ correlated()
    for by_importance in (False, True):
        found = hessian(gram, damping=0.01, by_importance=by_importance)
        damped = gram[found.order][:, found.order].double()
        damped.diagonal().add_(0.01 * gram.diagonal().mean())
        factor = found.upper.double()
        assert torch.equal(factor, factor.triu())
        torch.testing.assert_close(
            factor.T @ factor @ damped, torch.eye(COLUMNS).double(), atol=1e-2, rtol=0
        )
    assert (gram.diagonal()[found.order].diff() <= 0).all()


def test_gptq_is_the_loop_of_the_paper() -> None:
    """Column by column with the inverse itself, of which each step removes a row and a column."""
    coder, weight, x = coder_of("w4a16"), weights(8), correlated()
    gram = x.T @ x
    known = hessian(gram, by_importance=False)
    codes, scales = gptq(coder, weight, known)
    damped = gram.double()
    damped.diagonal().add_(0.05 * gram.diagonal().mean())
    inverse = torch.linalg.inv(damped)
    left, expected = weight.double(), torch.empty(weight.shape)
    for i in range(COLUMNS):
        factor = scales.factor[:, i // 64].double()
        expected[:, i] = (left[:, i] / factor).round().clamp(-8, 7)
        error = (left[:, i] - expected[:, i] * factor) / inverse[i, i]
        left -= error[:, None] * inverse[i]
        inverse -= inverse[:, i, None] * inverse[i] / inverse[i, i]
    assert (codes != expected).float().mean() < 0.005


@pytest.mark.parametrize("scheme", SCHEMES)
def test_outputs_of_other_data_come_closer(scheme: str) -> None:
    coder, weight = coder_of(scheme), weights()
    x, other = correlated(), correlated(seed=2)
    gram, amax = x.T @ x, weight.abs().amax()

    def error(codes: Tensor, scales: Scales) -> float:
        stored = coder.pack(codes, scales)
        values = coder.decode(stored)
        torch.testing.assert_close(values, coder.values(codes, scales))
        return output_error(values, weight, other)

    nearest = coder.scales(weight, amax)
    clipped = least_output_error(coder, weight, gram, amax)
    rtn = error(coder.codes(weight.clone(), nearest), nearest)
    found = error(coder.codes(weight.clone(), clipped), clipped)
    assert error(*gptq(coder, weight, hessian(gram), amax)) < 0.7 * rtn
    assert found <= rtn * 1.02
    if scheme.startswith("w4"):
        assert found < 0.8 * rtn


def test_odd_shapes_and_inputs_that_are_always_zero() -> None:
    coder = codec(Choice(scheme="fp8-block"), torch.bfloat16)
    weight, x = weights(150)[:, :200], correlated()[:, :200]
    codes, scales = gptq(coder, weight, hessian(x.T @ x))
    assert codes.shape == weight.shape
    assert scales.factor.shape == (2, 2)
    coder = coder_of("w4a16")
    for gram in (torch.zeros(COLUMNS, COLUMNS), torch.ones(COLUMNS, COLUMNS)):
        gram[:, 100] = gram[100] = 0
        codes, scales = gptq(coder, weights(), hessian(gram))
        assert torch.isfinite(codes).all()
        assert torch.equal(codes[:, 100], coder.codes(weights(), scales)[:, 100])


def test_rows_are_independent() -> None:
    coder, weight, x = coder_of("w4a16-asym"), weights(), correlated()
    known = hessian(x.T @ x)
    whole, _ = gptq(coder, weight, known)
    parts = [gptq(coder, rows, known)[0] for rows in weight.split(16)]
    assert (torch.cat(parts) != whole).float().mean() < 0.01


def seen(x: Tensor) -> Inputs:
    inputs = Inputs.nothing(COLUMNS, gram=True, rows=True)
    for part in x.split(100):
        inputs.add(part, 0.5)
    return inputs


def test_rows_are_kept_of_all_positions_of_windows() -> None:
    positions = torch.arange(512).float().repeat(512)[:, None]
    inputs = Inputs.nothing(1, gram=False, rows=True)
    for windows in positions.split(8 * 512):
        inputs.add(windows, 1 / 64)
    assert inputs.rows is not None
    assert inputs.rows.unique().tolist() == list(range(512))
    assert torch.equal(inputs.rows, positions[::61])


def test_inputs_are_summed_up() -> None:
    x = correlated()
    inputs = seen(x)
    assert inputs.tokens == len(x)
    torch.testing.assert_close(inputs.gram, x.T @ x, rtol=1e-4, atol=1e-1)
    torch.testing.assert_close(inputs.mean, x.abs().mean(dim=0))
    assert torch.equal(inputs.largest, x.abs().amax(dim=0))
    scales = torch.linspace(0.5, 2, COLUMNS)
    inputs.divide(scales)
    divided = seen(x / scales)
    for name in ("gram", "largest", "total", "rows"):
        torch.testing.assert_close(
            getattr(inputs, name), getattr(divided, name), rtol=1e-4, atol=1e-1
        )


@pytest.mark.parametrize("scheme", ["w4a16", "nvfp4a16", "mxfp4"])
def test_awq_protects_large_inputs(scheme: str) -> None:
    coder, weight, x = coder_of(scheme), weights(), correlated()
    weight[:, ::50] *= 0.1
    scales = awq_scales(coder, [weight[:32], weight[32:]], seen(x), lambda one: one)
    assert scales[::50].mean() > 1.5 * scales.mean()

    def error(scales: Tensor) -> float:
        scaled = weight * scales
        amax = scaled.abs().amax()
        found = coder.scales(scaled, amax)
        return output_error(
            coder.values(coder.codes(scaled, found), found) / scales, weight, correlated(seed=2)
        )

    assert error(scales) < 0.7 * error(torch.ones(COLUMNS))


def test_smoothquant_evens_out_the_inputs() -> None:
    coder, weight, x = coder_of("int8"), weights(), correlated()
    rounded = rounding_of_inputs("int8")
    scales = smoothquant_scales(coder, [weight], seen(x), rounded, lambda one: one)
    other = correlated(seed=2)

    def error(scales: Tensor) -> float:
        scaled = weight * scales
        found = coder.scales(scaled)
        values = coder.values(coder.codes(scaled, found), found)
        return float((rounded(other / scales) @ values.T - other @ weight.T).square().sum())

    assert error(scales) < 0.5 * error(torch.ones(COLUMNS))


_GEMMA2: dict[str, Any] = {
    **LLAMA,
    "architectures": ["Gemma2ForCausalLM"],
    "model_type": "gemma2",
    "head_dim": 64,
    "sliding_window": 16,
    "query_pre_attn_scalar": 64,
    "hidden_activation": "gelu_pytorch_tanh",
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}
_PHI3: dict[str, Any] = {
    **LLAMA,
    "architectures": ["Phi3ForCausalLM"],
    "model_type": "phi3",
    "pad_token_id": 0,
}
_QWEN2: dict[str, Any] = {**LLAMA, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
_OLMO2: dict[str, Any] = {**LLAMA, "architectures": ["Olmo2ForCausalLM"], "model_type": "olmo2"}
_CONFIGS = {
    "llama": (LLAMA, 4),
    "qwen2": (_QWEN2, 4),
    "gemma2": (_GEMMA2, 4),
    "phi3": (_PHI3, 4),
    "moe": (QWEN3_MOE, 7),
    "olmo2": (_OLMO2, 2),
}


@pytest.mark.parametrize("name", _CONFIGS)
def test_folding_changes_nothing(name: str, tmp_path: Path) -> None:
    config, count = _CONFIGS[name]
    model = LayerwiseModel(open_checkpoint(str(write_seeded_model(config, tmp_path / name))))
    layer = model.layer(0)
    hidden = model.embed(torch.arange(60).view(2, 30))
    before = layer(hidden)
    found = list(folds(model.spec, 0))
    assert len(found) == count
    names: set[str] = set()
    generator = torch.Generator().manual_seed(3)
    for fold in found:
        columns = layer.linears[fold.consumers[0]].shape[1]
        wanted = fold.alike(torch.rand(columns, generator=generator) * 3 + 0.2)
        applied, changed = fold.apply(layer.parameters, wanted, torch.bfloat16)
        torch.testing.assert_close(applied, wanted, rtol=0.05, atol=0)
        names |= changed
    after = layer(hidden)
    assert not torch.equal(after, before)
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-3)
    if name == "moe":
        assert "model.layers.0.mlp.gate.weight" in names
    if name == "qwen2":
        assert "model.layers.0.self_attn.v_proj.bias" in names
