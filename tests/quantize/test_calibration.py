"""The walk through the layers: what it leaves, what it gives, and how it goes on."""

import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from support.seeded_models import LLAMA, QWEN3_MOE, write_seeded_model
from support.words import write_word_tokenizer
from tightfit.checkpoint.checkpoint import Checkpoint, open_checkpoint
from tightfit.cli.output import NoProgress
from tightfit.errors import CheckpointError, OutputError, UsageError
from tightfit.model.quantization.written import Choice, Wish
from tightfit.quantize.calibration import CalibrationOptions, calibrate, is_needed
from tightfit.quantize.calibration import layer as layer_module
from tightfit.quantize.calibration.directory import LAYERS, directory_for, remove_own
from tightfit.quantize.calibration.inputs import Inputs
from tightfit.quantize.calibration.observers import Observer
from tightfit.quantize.calibration.samples import token_windows
from tightfit.quantize.calibration.state import State
from tightfit.quantize.job import QuantizeJob, prepare
from tightfit.quantize.write import write, write_job
from tightfit.runtime.layerwise import LayerwiseModel

WORDS = 259


def text_of(count: int, seed: int = 0) -> str:
    """Some words are far more frequent than others."""
    chosen = random.Random(seed).choices(range(WORDS), [1 / (i + 1) for i in range(WORDS)], k=count)
    return " ".join(f"w{i}" for i in chosen)


def with_tokenizer(model: Path) -> Path:
    write_word_tokenizer(model, WORDS)
    return model


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_tokenizer(write_seeded_model(LLAMA, tmp_path_factory.mktemp("llama") / "model"))


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_tokenizer(write_seeded_model(QWEN3_MOE, tmp_path_factory.mktemp("moe") / "model"))


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> CalibrationOptions:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(text_of(4000))
    return CalibrationOptions(texts=(path,), samples=24, length=64)


def job_of(model: Path, scheme: str, method: str, **changes: Any) -> QuantizeJob:
    size = 64 if scheme in ("w4a16", "w4a16-asym") else None
    wish = Wish(default=Choice(scheme=scheme, group_size=size), **changes)
    return prepare(open_checkpoint(str(model)), wish, method=method)


def quantized(
    job: QuantizeJob, options: CalibrationOptions, directory: Path, **more: Any
) -> QuantizeJob:
    given = calibrate(job, options, directory, NoProgress(), **more)
    return prepare(job.checkpoint, job.wish, method=job.method, given=given)


def logits(checkpoint: Checkpoint) -> Tensor:
    tokens = torch.tensor([[int(word[1:]) for word in text_of(200, seed=9).split()]]).view(4, 50)
    model = LayerwiseModel(checkpoint)
    hidden = model.embed(tokens)
    for index in range(model.num_layers):
        hidden = model.layer(index)(hidden)
    return model.logits(hidden)


def divergence(checkpoint: Checkpoint, original: Tensor) -> float:
    return float((logits(checkpoint) - original).square().mean())


@pytest.mark.parametrize(
    ("scheme", "method"),
    [
        ("w4a16", "gptq"),
        ("w4a16-asym", "gptq"),
        ("nvfp4", "gptq"),
        ("mxfp4", "gptq"),
        ("int8", "gptq"),
        ("w4a16", "awq"),
        ("mxfp4", "awq"),
        ("int8", "smoothquant"),
    ],
)
def test_calibrated_models_are_closer_to_the_original(
    scheme: str, method: str, llama: Path, options: CalibrationOptions, tmp_path: Path
) -> None:
    original = logits(open_checkpoint(str(llama)))
    nearest = job_of(llama, scheme, "rtn")
    if is_needed(nearest.wish, "rtn"):
        nearest = quantized(nearest, options, tmp_path / "nearest")
    found = quantized(job_of(llama, scheme, method), options, tmp_path / "found")
    assert divergence(found.virtual, original) < 0.95 * divergence(nearest.virtual, original)


def test_what_is_written_has_the_tensors_of_calibration(
    llama: Path, options: CalibrationOptions, tmp_path: Path
) -> None:
    job = quantized(job_of(llama, "w4a16", "awq"), options, tmp_path / "work")
    files = write_job(job, max_shard_bytes=2**30)
    write(files, tmp_path / "out", NoProgress())
    written = load_file(tmp_path / "out" / "model.safetensors")
    chosen: dict[str, Tensor] = {}
    for path in sorted((tmp_path / "work").glob("layer-*.safetensors")):
        chosen |= load_file(path)
    assert "model.layers.1.input_layernorm.weight" in chosen
    assert "model.layers.2.mlp.down_proj.weight_packed" in chosen
    for name, tensor in chosen.items():
        assert torch.equal(written[name], tensor), name
    assert written.keys() == job.virtual.tensors().keys()
    texts = [path.read_text() for path in (tmp_path / "out").glob("*.json")]
    words = options.texts[0].read_text()[:60]
    assert not any(words in text for text in texts)
    assert sorted(path.suffix for path in (tmp_path / "work").iterdir()).count(".partial") == 0


def test_scales_of_inputs_are_shared_by_what_engines_fuse(
    llama: Path, options: CalibrationOptions, tmp_path: Path
) -> None:
    job = job_of(llama, "nvfp4", "mse", kv_cache=True)
    given = calibrate(job, options, tmp_path / "work", NoProgress())
    found = {
        name: torch.frombuffer(
            bytearray(kept.source.read(kept.info.file, kept.info.offset, kept.info.offset + 4)),
            dtype=torch.float32,
        )
        for name, kept in given.items()
        if name.endswith(("global_scale", "k_scale", "v_scale"))
    }
    at = "model.layers.0.self_attn"
    q, k, v = (found[f"{at}.{name}_proj.input_global_scale"] for name in "qkv")
    assert q == k == v
    assert q != found[f"{at}.o_proj.input_global_scale"]

    model = LayerwiseModel(job.checkpoint)
    tokens = token_windows(job.checkpoint, options)
    seen: dict[str, float] = {}
    cached: list[float] = []
    layer = model.layer(0)

    def look(modules: tuple[str, ...], x: Tensor) -> None:
        seen[modules[0]] = float(x.abs().max())

    layer.watch(look, lambda keys, values: cached.extend([keys.abs().max(), values.abs().max()]))
    layer(model.embed(tokens))
    assert float(q) == pytest.approx(448 * 6 / seen[f"{at}.q_proj"])
    # Keys are of the quantized layer.
    assert float(found[f"{at}.k_scale"]) == pytest.approx(float(cached[0]) / 448, rel=0.2)
    assert float(found[f"{at}.v_scale"]) == pytest.approx(float(cached[1]) / 448, rel=0.2)
    assert sum(name.endswith("_scale") and ".self_attn.k_" in name for name in given) == 3 * 4


class Stop(Exception):
    pass


def layers(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.glob("layer-*")}


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_a_killed_calibration_goes_on(
    method: str,
    llama: Path,
    options: CalibrationOptions,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job = job_of(llama, "w4a16", method)
    calibrate(job, options, tmp_path / "whole", NoProgress())

    def stop(*_: Any) -> None:
        raise Stop

    def stop_at_the_end(self: Observer, modules: tuple[str, ...], x: Tensor) -> None:
        if modules == ("model.layers.1.mlp.down_proj",):
            raise Stop

    places = (
        (Inputs, "add", stop),
        (Observer, "on_input", stop_at_the_end),
        (State, "_note", stop),
    )
    for where, name, happens in places:
        with monkeypatch.context() as patched:
            patched.setattr(where, name, happens)
            with pytest.raises(Stop):
                calibrate(job, options, tmp_path / "cut", NoProgress(), resume=True)
    first = tmp_path / "cut" / "layer-00000.safetensors"
    made = first.stat().st_mtime_ns
    given = calibrate(job, options, tmp_path / "cut", NoProgress(), resume=True)
    assert layers(tmp_path / "cut") == layers(tmp_path / "whole")
    assert first.stat().st_mtime_ns == made
    assert prepare(job.checkpoint, job.wish, method=method, given=given)


@pytest.mark.parametrize("damaged", ["layer-00000.safetensors", "hidden-00003.safetensors"])
def test_what_is_damaged_is_made_again(
    damaged: str, llama: Path, options: CalibrationOptions, tmp_path: Path
) -> None:
    job = job_of(llama, "mxfp4", "gptq")
    calibrate(job, options, tmp_path / "work", NoProgress())
    expected = layers(tmp_path / "work")
    path = tmp_path / "work" / damaged
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    calibrate(job, options, tmp_path / "work", NoProgress(), resume=True)
    assert layers(tmp_path / "work") == expected


def test_another_calibration_is_not_taken_over(
    llama: Path, options: CalibrationOptions, tmp_path: Path
) -> None:
    work = tmp_path / "work"
    calibrate(job_of(llama, "w4a16", "gptq"), options, work, NoProgress())
    with pytest.raises(OutputError, match="not empty"):
        calibrate(job_of(llama, "w4a16", "gptq"), options, work, NoProgress())
    for job, other, said in (
        (job_of(llama, "w4a16", "awq"), options, "--method was gptq, and is awq"),
        (job_of(llama, "mxfp4", "gptq"), options, "--scheme was w4a16, and is mxfp4"),
        (
            job_of(llama, "w4a16", "gptq"),
            replace(options, seed=options.seed + 1),
            "the text of --calibration, or --seed, is another",
        ),
    ):
        with pytest.raises(OutputError, match=f"another calibration: {said}$"):
            calibrate(job, other, work, NoProgress(), resume=True)
    (work / "layer-notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="not of a calibration"):
        calibrate(job_of(llama, "w4a16", "gptq"), options, work, NoProgress(), resume=True)
    remove_own(work, LAYERS)
    assert [path.name for path in work.iterdir()] == ["layer-notes.txt"]


@pytest.mark.parametrize(
    "content",
    [
        '{"identity": [], "layers": [], "hidden": null}',
        '{"identity": {}, "layers": 3, "hidden": 1}',
    ],
)
def test_a_journal_that_is_none_counts_for_nothing(content: str, tmp_path: Path) -> None:
    (tmp_path / "calibration.json").write_text(content)
    state = State(tmp_path, {"method": "gptq"}, resume=True)
    assert (state.done, state.has_begun) == (0, False)


def test_where_calibration_keeps_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIGHTFIT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert directory_for(".") == tmp_path / "here.calibration"
    assert directory_for("file:///a/out/") == Path("/a/out.calibration")
    found = directory_for("s3://bucket/out")
    assert found.parent == tmp_path / "cache" / "calibration"
    assert found.parent.stat().st_mode & 0o777 == 0o700
    assert found != directory_for("s3://bucket/other")


def test_experts_that_see_few_tokens_are_named(
    moe: Path, options: CalibrationOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer_module, "_GRAM_BYTES", 2 * 256 * 256 * 4)
    warnings: list[str] = []
    job = job_of(moe, "w4a16", "gptq")
    found = quantized(job, options, tmp_path / "all", warn=warnings.append)
    assert not warnings
    original = logits(open_checkpoint(str(moe)))
    nearest = divergence(job_of(moe, "w4a16", "rtn").virtual, original)
    assert divergence(found.virtual, original) < 0.85 * nearest

    few = CalibrationOptions(texts=options.texts, samples=1, length=40)
    for method in ("gptq", "awq"):
        warnings.clear()
        again = quantized(
            job_of(moe, "w4a16", method), few, tmp_path / method, warn=warnings.append
        )
        assert len(warnings) == 1
        assert "round" in warnings[0]
        assert "model.layers.0.mlp.experts." in warnings[0]
        assert torch.isfinite(logits(again.virtual)).all()


def test_an_expert_without_tokens_gets_the_scale_of_the_busiest(
    moe: Path, options: CalibrationOptions, tmp_path: Path
) -> None:
    one = CalibrationOptions(texts=options.texts, samples=1, length=8)
    given = calibrate(job_of(moe, "nvfp4", "rtn"), one, tmp_path / "work", NoProgress())
    found = load_file(tmp_path / "work" / "layer-00000.safetensors")
    scales = {name: one for name, one in found.items() if name.endswith("input_global_scale")}
    assert len(scales) == 4 + 4 * 3
    assert all(torch.isfinite(one).all() and (one > 0).all() for one in scales.values())
    assert given.keys() >= scales.keys()


@pytest.mark.parametrize(
    ("scheme", "method"),
    [("fp8-channel", "awq"), ("w8a16", "awq"), ("w4a16", "smoothquant"), ("mxfp8", "smoothquant")],
)
def test_methods_that_make_no_sense_are_refused(
    scheme: str, method: str, llama: Path, options: CalibrationOptions, tmp_path: Path
) -> None:
    job = job_of(llama, scheme, method)
    with pytest.raises(UsageError, match=f"{method} makes no sense for the scheme {scheme}"):
        calibrate(job, options, tmp_path / "work", NoProgress())
    assert not (tmp_path / "work").exists()


def test_only_what_needs_data_is_calibrated() -> None:
    wish = Wish(default=Choice(scheme="w4a16"))
    assert is_needed(wish, "gptq")
    assert not is_needed(wish, "mse")
    assert is_needed(Wish(default=Choice(scheme="nvfp4")), "rtn")
    assert is_needed(Wish(default=Choice(scheme="fp8-channel"), kv_cache=True), "rtn")


@pytest.mark.parametrize("method", ["gptq", "awq", "rtn"])
def test_damaged_weights_are_named(
    method: str, llama: Path, options: CalibrationOptions, tmp_path: Path
) -> None:
    model = shutil.copytree(llama, tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    job = job_of(model, "nvfp4" if method == "rtn" else "w4a16", method)
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj.*NaN"):
        calibrate(job, options, tmp_path / "work", NoProgress())


def test_activations_that_overflow_are_an_error(
    llama: Path, options: CalibrationOptions, tmp_path: Path
) -> None:
    model = shutil.copytree(llama, tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.input_layernorm.weight"].fill_(1e30)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"inputs of model\.layers\.1.*not finite"):
        calibrate(job_of(model, "w4a16", "gptq"), options, tmp_path / "work", NoProgress())
