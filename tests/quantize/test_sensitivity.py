import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from support.seeded_models import LLAMA, QWEN3_MOE, write_seeded_model
from tightfit.checkpoint.checkpoint import open_checkpoint
from tightfit.model.families import model_spec
from tightfit.model.quantization.written import Choice, Wish
from tightfit.quantize import observe as observing
from tightfit.quantize.calibration.options import CalibrationOptions
from tightfit.quantize.dequantize import open_dequantized
from tightfit.quantize.job import QuantizeJob, prepare
from tightfit.quantize.observe import observe
from tightfit.quantize.places import Where, layer_kinds, places
from tightfit.quantize.quality import measure
from tightfit.quantize.sensitivity import output_sensitivity, weight_sensitivity
from tightfit.runtime.layerwise import LayerwiseModel

TOKENS = torch.randint(0, 259, (3, 40), generator=torch.Generator().manual_seed(2))


@pytest.fixture(autouse=True)
def tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observing, "token_windows", lambda *_: TOKENS)
    monkeypatch.setattr(observing, "_AT_ONCE", 80)


@pytest.fixture
def options(tmp_path: Path) -> CalibrationOptions:
    return CalibrationOptions(texts=(tmp_path / "text.txt",))


def job(model: Path, scheme: str = "w4a16", **rules: Choice | None) -> QuantizeJob:
    size = 64 if scheme == "w4a16" else None
    wish = Wish(default=Choice(scheme=scheme, group_size=size), rules=tuple(rules.items()))
    return prepare(open_checkpoint(str(model)), wish)


def seeded(path: Path, config: dict[str, object] = LLAMA) -> Path:
    """With one layer that is hard to quantize: the weights of the others have one size."""
    model = write_seeded_model(config, path)
    tensors = load_file(model / "model.safetensors")
    for name, tensor in tensors.items():
        if "_proj" in name and ".layers.1." not in name:
            tensor.sign_().mul_(0.05)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    return model


def test_without_data_weights_decide(tmp_path: Path) -> None:
    quality = measure(job(seeded(tmp_path / "model")))
    found = weight_sensitivity(quality)
    assert found.layers[0].name == "layer 1"
    assert [one.damage for one in found.layers] == sorted(
        (one.damage for one in found.layers), reverse=True
    )
    for some in (found.layers, found.kinds):
        assert sum(one.share for one in some) == pytest.approx(1)
        assert sum(one.parameters for one in some) == quality.total.parameters
    one = next(one for one in quality.matrices if one.where.kind == "attention")
    alone = weight_sensitivity(type(quality)(model="", scheme="", method="", matrices=(one,)))
    assert alone.kinds[0].damage == pytest.approx(one.figures.relative_error)
    assert json.loads(json.dumps(found.to_json()))["calibrated"] is False


def test_with_data_the_output_decides(tmp_path: Path, options: CalibrationOptions) -> None:
    this = job(seeded(tmp_path / "model"))
    found = output_sensitivity(this, options, tmp_path)
    assert found.calibrated
    assert {one.name for one in found.kinds} == {"attention", "mlp"}

    model = LayerwiseModel(this.checkpoint)
    other = LayerwiseModel(open_dequantized(this.virtual))
    hidden = model.embed(TOKENS)
    for index in range(3):
        right, wrong = model.layer(index)(hidden), other.layer(index)(hidden)
        expected = float((wrong - right).norm() / right.norm())
        damage = next(one.damage for one in found.layers if one.layer == index)
        assert damage == pytest.approx(expected, rel=1e-3)
        hidden = right
    damages = [one.damage for one in found.layers]
    assert damages == sorted(damages, reverse=True)


def test_kinds_are_told_apart(tmp_path: Path, options: CalibrationOptions) -> None:
    model = write_seeded_model(LLAMA, tmp_path / "model")
    attention = observe(job(model, mlp=None), options, tmp_path)
    mlp = observe(job(model, self_attn=None), options, tmp_path)
    both = observe(job(model), options, tmp_path)
    for layer in range(3):
        for kind, alone, other in (("attention", attention, mlp), ("mlp", mlp, attention)):
            place = Where(kind=kind, layer=layer)
            assert other.places[place] == 0
            assert alone.places[place] == pytest.approx(alone.layers[layer])
            assert both.places[place] == pytest.approx(alone.layers[layer])


def test_experts_are_a_kind(tmp_path: Path, options: CalibrationOptions) -> None:
    this = job(write_seeded_model(QWEN3_MOE, tmp_path / "model"))
    found = observe(this, options, tmp_path)
    assert {place.kind for place in found.places} == {"attention", "experts", "mlp"}
    assert Where(kind="mlp", layer=0) not in found.places


def test_places_of_all_matrices(tmp_path: Path) -> None:
    spec = model_spec(QWEN3_MOE)
    where = places(spec)
    assert where["model.layers.0.mlp.experts.3.up_proj"] == Where(kind="experts", layer=0)
    assert where["model.layers.1.self_attn.o_proj"] == Where(kind="attention", layer=1)
    assert where["lm_head"] == Where(kind="head", layer=None)
    kinds = layer_kinds(spec, 0)
    assert kinds["model.layers.0.mlp.gate.weight"] == "experts"
    assert kinds["model.layers.0.self_attn.q_norm.weight"] == "attention"
    assert kinds["model.layers.0.input_layernorm.weight"] == "attention"
    assert kinds["model.layers.0.post_attention_layernorm.weight"] == "experts"
    assert layer_kinds(spec, 1)["model.layers.1.post_attention_layernorm.weight"] == "mlp"
