import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from support.seeded_models import LLAMA, QWEN3_MOE, write_seeded_model
from tightfit.checkpoint.checkpoint import open_checkpoint
from tightfit.cli.output import NoProgress
from tightfit.codecs import codec
from tightfit.errors import CheckpointError
from tightfit.model.quantization.written import Choice, Wish
from tightfit.quantize import encoding
from tightfit.quantize.job import QuantizeJob, prepare
from tightfit.quantize.quality import Figures, MatrixQuality, measure
from tightfit.quantize.write import write, write_job
from tightfit.units import MiB


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_seeded_model(LLAMA, tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_seeded_model(QWEN3_MOE, tmp_path_factory.mktemp("moe") / "model")


def job(model: Path, scheme: str, *, format: str = "compressed-tensors") -> QuantizeJob:
    size = 64 if scheme.startswith(("w4", "w8")) else None
    wish = Wish(default=Choice(scheme=scheme, group_size=size, format=format))
    return prepare(open_checkpoint(str(model)), wish)


def by_module(found: tuple[MatrixQuality, ...]) -> dict[str, MatrixQuality]:
    return {one.module: one for one in found}


@pytest.mark.parametrize(
    ("scheme", "format"),
    [
        *((scheme, "compressed-tensors") for scheme in ("fp8-tensor", "fp8-block", "nvfp4a16")),
        *((scheme, "compressed-tensors") for scheme in ("w4a16", "w4a16-asym", "mxfp4", "int8")),
        ("w4a16", "gptq"),
        ("w4a16-asym", "awq"),
    ],
)
def test_errors_are_those_of_the_decoded_matrix(
    llama: Path, scheme: str, format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "_CHUNK_ELEMENTS", 256 * 128)
    this = job(llama, scheme, format=format)
    original = load_file(llama / "model.safetensors")
    virtual = this.virtual.tensors()
    found = by_module(measure(this).matrices)
    assert list(found) == [matrix.module for matrix in this.matrices]
    for matrix in this.matrices[:7]:
        coder = codec(matrix.choice, torch.bfloat16)
        stored = {}
        for kind, output in matrix.outputs.items():
            info = virtual[output.name]
            data = this.virtual.source.read(info.file, info.offset, info.offset + info.nbytes)
            dtype = coder_dtype(info.dtype)
            stored[kind] = torch.frombuffer(bytearray(data), dtype=dtype).view(info.shape)
        weight = original[f"{matrix.module}.weight"].float()
        error = coder.decode(stored) - weight
        one = found[matrix.module]
        figures = one.figures
        assert figures.parameters == weight.numel()
        assert figures.relative_error == pytest.approx(float(error.norm() / weight.norm()), 1e-4)
        assert figures.largest_error == pytest.approx(float(error.abs().max()))
        rows = error.norm(dim=1) / weight.norm(dim=1)
        assert one.worst[0][1] == pytest.approx(float(rows.max()), 1e-4)
        assert rows[one.worst[0][0]] == pytest.approx(one.worst[0][1], 1e-4)
        _, scales = coder.unpack(stored)
        assert sum(one.scales.values()) == scales.factor.numel()
        assert max(one.scales) == math.floor(math.log2(scales.factor.max()))
        assert min(one.scales) == math.floor(math.log2(scales.factor.min()))


def coder_dtype(name: str) -> torch.dtype:
    return {
        "F8_E4M3": torch.float8_e4m3fn,
        "BF16": torch.bfloat16,
        "I32": torch.int32,
        "I64": torch.int64,
        "I8": torch.int8,
        "U8": torch.uint8,
        "F32": torch.float32,
    }[name]


def test_written_checkpoint_has_the_errors_of_the_virtual_one(moe: Path, tmp_path: Path) -> None:
    this = job(moe, "w4a16")
    write(write_job(this, max_shard_bytes=MiB), str(tmp_path / "out"), NoProgress())
    assert measure(this, open_checkpoint(str(tmp_path / "out"))) == measure(this)


def test_a_changed_weight_is_found(llama: Path, tmp_path: Path) -> None:
    this = job(llama, "int8")
    write(write_job(this, max_shard_bytes=2**30), str(tmp_path / "out"), NoProgress())
    (file,) = (tmp_path / "out").glob("*.safetensors")
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"][17] = 127
    save_file(tensors, file)
    found = measure(this, open_checkpoint(str(tmp_path / "out")))
    worst = found.worst(1)[0]
    assert worst.module == "model.layers.1.mlp.up_proj"
    assert worst.worst[0][0] == 17
    assert found.layers[1].relative_error > 2 * found.layers[0].relative_error
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"lacks the tensor 'model\.layers\.1\.mlp\.up"):
        measure(this, open_checkpoint(str(tmp_path / "out")))


def test_kinds_and_layers_add_up(moe: Path) -> None:
    found = measure(job(moe, "fp8-channel"))
    assert list(found.kinds) == ["attention", "mlp", "experts"]
    for parts in (found.kinds.values(), found.layers.values()):
        assert Figures.of_all(parts).parameters == found.total.parameters
        assert Figures.of_all(parts).squared_error == pytest.approx(found.total.squared_error)
    assert {one.where.layer for one in found.matrices if one.where.kind == "mlp"} == {1}
    document = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert document["schema"] == 1
    assert [one["layer"] for one in document["layers"]] == [0, 1]
    assert document["total"]["relative_error"] == found.total.relative_error
    assert len(document["matrices"]) == 4 + 3 * 4 + 4 + 3


def test_clipped_weights_are_counted(tmp_path: Path) -> None:
    model = write_seeded_model(LLAMA, tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.0.mlp.down_proj"
    tensors[f"{name}.weight"].fill_(0.01)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    this = job(model, "int8")
    write(write_job(this, max_shard_bytes=2**30), str(tmp_path / "out"), NoProgress())
    (file,) = (tmp_path / "out").glob("*.safetensors")
    assert by_module(measure(this).matrices)[name].figures.clipped == 0
    stored = load_file(file)
    stored[f"{name}.weight_scale"][3] *= 0.5
    save_file(stored, file)
    figures = by_module(measure(this, open_checkpoint(str(tmp_path / "out"))).matrices)[
        name
    ].figures
    assert figures.clipped == 384
    assert figures.clipped_share == pytest.approx(1 / 256)


def test_no_error_has_no_ratio(tmp_path: Path) -> None:
    model = write_seeded_model(LLAMA, tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"].zero_()
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    found = by_module(measure(job(model, "mxfp8")).matrices)["model.layers.0.mlp.up_proj"]
    assert found.figures.relative_error == 0
    assert found.to_json()["sqnr_db"] is None
