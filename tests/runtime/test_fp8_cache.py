"""A KV cache of float8_e4m3fn: what it holds, whose scales it has, and what accuracy it costs."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from runtime.ranks import PROMPTS, all_logits, decoded_logits, open_session, options
from support.quantizing import run_quantize
from support.tiny_models import VOCAB_SIZE, make_tiny_model
from support.words import write_word_tokenizer
from support.work import write_shards
from tightfit.checkpoint.checkpoint import open_checkpoint
from tightfit.errors import CheckpointError, UnsupportedModelError
from tightfit.model.families import model_spec
from tightfit.model.layout import Parallel, Rank
from tightfit.planner.assemble import make_plan
from tightfit.planner.devices import Device
from tightfit.planner.options import PlanOptions
from tightfit.runtime.attention.base import Attend
from tightfit.runtime.attention.kv_scales import Scales, load_scales
from tightfit.runtime.attention.sdpa import SdpaAttention
from tightfit.runtime.batch import Batch, Span, Step
from tightfit.runtime.ranks.world import World
from tightfit.runtime.session import Session, start
from tightfit.units import GiB, MiB

TinyModel = Callable[[str], Path]
FP8 = {"kv_cache_dtype": "F8_E4M3"}
LAYERS = 2


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its values are too large for e4m3 without a scale, which the output projection undoes."""
    path = tmp_path_factory.mktemp("plain") / "model"
    make_tiny_model("llama", path, dtype="float32", others={"num_hidden_layers": LAYERS})
    (file,) = path.glob("*.safetensors")
    tensors = load_file(file)
    for name, tensor in tensors.items():
        factor = {"v_proj": 2.0**12, "o_proj": 2.0**-12}.get(name.split(".")[-2], 1.0)
        tensors[name] = tensor * factor
    save_file(tensors, file, {"format": "pt"})
    write_word_tokenizer(path, VOCAB_SIZE)
    return path


@pytest.fixture(scope="module")
def calibrated(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Quantized with scales for its cache."""
    root = tmp_path_factory.mktemp("calibrated")
    words = random.Random(0).choices(range(VOCAB_SIZE), k=3000)
    (root / "text.txt").write_text(" ".join(f"w{i}" for i in words))
    text = ("--calibration", str(root / "text.txt"), "--calibration-samples", "8")
    how = ("--scheme", "w8a16", "--group-size", "64", "--kv-cache", "fp8")
    return run_quantize(plain, root / "out", *how, *text, "--calibration-length", "64").directory


def logits(path: Path, **changes: Any) -> Tensor:
    found = all_logits(open_session(path, **changes), PROMPTS[0])
    assert found is not None
    return found


def error(got: Tensor, wanted: Tensor) -> float:
    """Relative, of all logits together."""
    return float((got - wanted).norm() / wanted.norm())


def stored_scales(path: Path) -> list[tuple[float, float]]:
    tensors = {k: v for file in path.glob("*.safetensors") for k, v in load_file(file).items()}
    at = "model.layers.{}.self_attn.{}_scale"
    return [
        (float(tensors[at.format(i, "k")]), float(tensors[at.format(i, "v")]))
        for i in range(LAYERS)
    ]


def layer_scales(session: Session) -> list[tuple[float, float]]:
    return [(one.k_scale, one.v_scale) for one in session.engine.worker.attention.layers]


class Rounding:
    """A backend that gets what an fp8 cache would give back."""

    def __init__(self, inner: SdpaAttention, scales: Scales) -> None:
        self._inner = inner
        self._scales = scales

    def step(self, batch: Batch) -> Attend:
        return _RoundingStep(self._inner.step(batch), self._scales)


class _RoundingStep:
    def __init__(self, inner: Attend, scales: Scales) -> None:
        self._inner = inner
        self._scales = scales

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k_scale, v_scale = self._scales[layer]
        return self._inner(layer, q, as_fp8(k, k_scale), as_fp8(v, v_scale))

    def latent(self, layer: int, q: Tensor, latent: Tensor) -> Tensor:
        return self._inner.latent(layer, q, as_fp8(latent, self._scales[layer][0]))


def as_fp8(x: Tensor, scale: float) -> Tensor:
    return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale


def rounding_logits(path: Path, scales: Scales) -> Tensor:
    session = open_session(path)
    worker = session.engine.worker
    worker.attention = Rounding(worker.attention, scales)
    found = all_logits(session, PROMPTS[0])
    assert found is not None
    return found


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "deepseek_v3", "minicpm3"])
def test_keys_and_values_are_rounded_and_nothing_else(name: str, tiny_model: TinyModel) -> None:
    path = tiny_model(name)
    session = open_session(path, **FP8)
    rounded = all_logits(session, PROMPTS[0])
    wanted = rounding_logits(path, [(1.0, 1.0)] * len(layer_scales(session)))
    torch.testing.assert_close(rounded, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_little_accuracy_is_lost(name: str, tiny_model: TinyModel) -> None:
    path = tiny_model(name)
    # With three bits of mantissa a number is off by 2**-4 at most.
    assert 1e-3 < error(logits(path, **FP8), logits(path)) < 2**-4


def test_scales_of_a_checkpoint_keep_large_values(calibrated: Path, tmp_path: Path) -> None:
    scales = stored_scales(calibrated)
    assert all(scale != 1 for pair in scales for scale in pair)
    exact = logits(calibrated)
    session = open_session(calibrated, **FP8)
    assert layer_scales(session) == scales
    rounded = all_logits(session, PROMPTS[0])
    assert rounded is not None
    torch.testing.assert_close(rounded, rounding_logits(calibrated, scales), atol=1e-4, rtol=1e-4)
    assert 1e-3 < error(rounded, exact) < 2**-4

    without = without_scales(calibrated, tmp_path / "without")
    session = open_session(without, **FP8)
    assert layer_scales(session) == [(1.0, 1.0)] * LAYERS
    saturated = all_logits(session, PROMPTS[0])
    assert saturated is not None
    assert error(saturated, exact) > 0.2


def without_scales(path: Path, copy: Path) -> Path:
    return changed(path, copy, lambda tensors: [tensors.pop(n) for n in cache_scales(tensors)])


def cache_scales(tensors: dict[str, Tensor]) -> list[str]:
    return [name for name in tensors if name.endswith(("k_scale", "v_scale"))]


def changed(path: Path, copy: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    shutil.copytree(path, copy)
    (file,) = copy.glob("*.safetensors")
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    (copy / "model.safetensors.index.json").unlink(missing_ok=True)
    return copy


def test_what_is_stored(calibrated: Path) -> None:
    """Numbers divided by the scale, and bounded."""
    session = open_session(calibrated, **FP8)
    worker, heads = session.engine.worker, 4
    step = Step(spans=(Span(start=0, count=3, blocks=[1]),), token_ids=[1, 2, 3], samples=())
    torch.manual_seed(0)
    attend = worker.attention.step(worker.staging.place(step))
    for layer, (k_scale, _) in enumerate(layer_scales(session)):
        keys, values = worker.cache.layers[layer]
        assert keys.dtype == values.dtype == torch.float8_e4m3fn
        k, v = torch.randn(2, 3, *keys.shape[2:])
        attend(layer, torch.zeros(3, heads, keys.shape[-1]), k, v * 1e9)
        held_k, held_v = (x.flatten(0, 1)[4:7] for x in (keys, values))
        assert torch.equal(held_k.float() * k_scale, as_fp8(k, k_scale))
        assert torch.equal(held_v.float(), v.sign() * 448)


@pytest.mark.parametrize("name", ["llama", "gemma2", "deepseek_v3"])
def test_a_token_that_is_decoded(name: str, tiny_model: TinyModel) -> None:
    """It sees what it would see as the last one of a prompt."""
    alone = decoded_logits(open_session(tiny_model(name), **FP8), PROMPTS[0])
    torch.testing.assert_close(alone, logits(tiny_model(name), **FP8)[-1:], atol=1e-4, rtol=1e-4)


def test_pieces_change_nothing(calibrated: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = logits(calibrated, **FP8)
    monkeypatch.setattr("tightfit.runtime.attention.sdpa.FP8_ELEMENTS", 1)
    assert torch.equal(logits(calibrated, **FP8), whole)


@pytest.mark.parametrize("size", [1, 2])
def test_rank_files_have_the_scales(size: int, calibrated: Path, tmp_path: Path) -> None:
    write_shards(calibrated, tmp_path / "shards", size, layout="builtin")
    checkpoint = open_checkpoint(str(tmp_path / "shards"))
    spec = model_spec(checkpoint.config)
    for rank in Parallel(tensor_parallel_size=size, uneven=True).ranks():
        files = sorted((tmp_path / "shards").glob(f"model-rank-{rank.rank}-part-*.safetensors"))
        found = load_scales(checkpoint, spec, rank, rank_files=files)
        assert [*found] == stored_scales(calibrated)
    if size == 1:
        sharded = logits(tmp_path / "shards", **FP8)
        assert torch.equal(sharded, logits(calibrated, **FP8))


def test_a_stage_has_the_scales_of_its_layers(calibrated: Path) -> None:
    checkpoint = open_checkpoint(str(calibrated))
    spec = model_spec(checkpoint.config)
    parallel = Parallel(pipeline_parallel_size=2, tensor_parallel_size=2)
    found = [load_scales(checkpoint, spec, rank) for rank in parallel.ranks()]
    first, second = stored_scales(calibrated)
    assert found == [(first,), (first,), (second,), (second,)]


def test_scales_of_heads_are_refused(calibrated: Path, tmp_path: Path) -> None:
    def of_heads(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.1.self_attn.v_scale"] = torch.ones(2, 1, 1)

    path = changed(calibrated, tmp_path / "heads", of_heads)
    with pytest.raises(UnsupportedModelError) as e:
        open_session(path, **FP8)
    assert e.value.message.startswith("'model.layers.1.self_attn.v_scale' has the shape [2, 1, 1]:")
    open_session(path)


def test_a_scale_of_zero_is_refused(calibrated: Path, tmp_path: Path) -> None:
    def zero(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.1.self_attn.k_scale"].zero_()

    path = changed(calibrated, tmp_path / "zero", zero)
    with pytest.raises(CheckpointError, match=r"layer 1 has 0\.0 for a scale of its KV cache"):
        open_session(path, **FP8)


def test_one_scale_is_for_both(tiny_model: TinyModel, tmp_path: Path) -> None:
    """ModelOpt's: what is not there is -1, and an old `kv_scale` is that of keys."""

    def old(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.0.self_attn.kv_scale"] = torch.tensor(0.5)
        tensors["model.layers.1.self_attn.k_proj.k_scale"] = torch.tensor([0.25])
        tensors["model.layers.1.self_attn.v_proj.v_scale"] = torch.tensor([2.0])

    path = changed(tiny_model("llama"), tmp_path / "old", old)
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "modelopt",
        "quant_algo": "FP8",
        "kv_cache_quant_algo": "FP8",
        "ignore": ["*"],
    }
    (path / "config.json").write_text(json.dumps(config))
    checkpoint = open_checkpoint(str(path))
    spec = model_spec(checkpoint.config)
    assert spec.kv_cache_quantization == "fp8_e4m3"
    assert [*load_scales(checkpoint, spec, Rank())][:2] == [(0.5, 0.5), (0.25, 2.0)]


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "deepseek_v3", "minicpm3"])
def test_the_cache_is_what_was_planned(name: str, tiny_model: TinyModel) -> None:
    checkpoint = open_checkpoint(str(tiny_model(name)))
    spec = model_spec(checkpoint.config)

    def planned(word: str) -> Any:
        asked = PlanOptions(
            engine="builtin",
            device=Device(name="cpu", total_bytes=16 * GiB, kind="cpu"),
            max_model_len=64,
            max_num_seqs=4,
            kv_cache_dtype=word,
            kv_cache_memory_bytes=MiB,
        )
        return make_plan(spec, asked, name=name)

    plan, auto = planned("fp8"), planned("auto")
    assert plan.kv_cache.dtype == plan.options.kv_cache_dtype.value == "F8_E4M3"
    assert 2 * plan.kv_cache.bytes_per_block == auto.kv_cache.bytes_per_block
    blocks = plan.kv_cache.num_blocks
    session = open_session(tiny_model(name), num_blocks=blocks, block_size=16, **FP8)
    component = plan.ranks[0].component("kv_cache")
    assert session.engine.worker.cache.nbytes == component.planned_bytes


def test_random_weights_have_no_scales(calibrated: Path) -> None:
    checkpoint = open_checkpoint(str(calibrated))
    spec = model_spec(checkpoint.config)
    session = start(checkpoint, spec, options(**FP8), world=World(), load_format="dummy")
    assert layer_scales(session) == [(1.0, 1.0)] * LAYERS
