"""What is taken from optimum, of which a fake stands in: what it needs is slow to build."""

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from support.seeded_models import LLAMA, write_seeded_model
from support.words import write_word_tokenizer
from tightfit.checkpoint.checkpoint import open_checkpoint
from tightfit.cli.main import build
from tightfit.cli.output import NoProgress
from tightfit.codecs.integers import Gptq
from tightfit.errors import CheckpointError, MissingExtraError, UsageError
from tightfit.model.quantization.written import Choice, Wish
from tightfit.quantize.calibration import CalibrationOptions
from tightfit.quantize.calibration.directory import RefusedDirectoryError
from tightfit.quantize.calibration.optimum_backend import calibrate_by_optimum
from tightfit.quantize.job import QuantizeJob, prepare
from tightfit.quantize.write import write, write_job


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = write_seeded_model(LLAMA, tmp_path_factory.mktemp("llama") / "model")
    write_word_tokenizer(model)
    return model


@pytest.fixture
def options(tmp_path: Path) -> CalibrationOptions:
    path = tmp_path / "text.txt"
    path.write_text("w17 w23 w5 w99 " * 100)
    return CalibrationOptions(texts=(path,), samples=4, length=16)


class FakeQuantizer:
    """Rounds to nearest, in the dtypes and with the zero points that optimum leaves in memory."""

    zero_is_less = False
    calls: list[dict[str, Any]] = []  # noqa: RUF012

    def __init__(self, **arguments: Any) -> None:
        self.calls.append(arguments)
        self.arguments = arguments

    def quantize_model(self, model: dict[str, Tensor]) -> "FakeQuantizer":
        bits, group = self.arguments["bits"], self.arguments["group_size"]
        coder = Gptq(bits, group, torch.bfloat16)
        self.found: dict[str, Tensor] = {}
        for (name,) in self.arguments["modules_in_block_to_quantize"]:
            for layer in range(3):
                module = f"{self.arguments['block_name_to_quantize']}.{layer}.{name}"
                stored = coder.encode(model[f"{module}.weight"].float())
                stored["scales"] = stored["scales"].half()
                if not self.zero_is_less:
                    stored["qzeros"] += 0x11111111 if bits == 4 else 0x01010101
                self.found |= {f"{module}.{kind}": one for kind, one in stored.items()}
        return self

    def state_dict(self) -> dict[str, Tensor]:
        return self.found


class FakeModel:
    @staticmethod
    def from_pretrained(path: str, **options: Any) -> dict[str, Tensor]:
        assert options["trust_remote_code"] is False
        return load_file(Path(path) / "model.safetensors")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeQuantizer]:
    contents: dict[str, dict[str, Any]] = {
        "optimum": {},
        "optimum.gptq": {"GPTQQuantizer": FakeQuantizer},
        "transformers": {"AutoModelForCausalLM": FakeModel},
        "gptqmodel": {},
    }
    for name, values in contents.items():
        module = ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(FakeQuantizer, "calls", [])
    return FakeQuantizer


def job_of(model: Path, scheme: str = "w4a16", method: str = "gptq", **changes: Any) -> QuantizeJob:
    choice = Choice(scheme=scheme, group_size=64, format=changes.pop("format", "gptq"))
    wish = Wish(default=choice, **changes)
    return prepare(open_checkpoint(str(model)), wish, method=method)


@pytest.mark.parametrize("scheme", ["w4a16", "w8a16"])
@pytest.mark.parametrize("zero_is_less", [False, True])
def test_its_tensors_are_taken_and_its_config_is_not(
    scheme: str,
    zero_is_less: bool,
    llama: Path,
    options: CalibrationOptions,
    fake: type[FakeQuantizer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fake, "zero_is_less", zero_is_less)
    job = job_of(llama, scheme)
    given = calibrate_by_optimum(job, options, tmp_path / "work")
    done = prepare(job.checkpoint, job.wish, method="gptq", given=given)
    write(write_job(done, max_shard_bytes=2**30), tmp_path / "out", NoProgress())
    write(
        write_job(prepare(job.checkpoint, job.wish), max_shard_bytes=2**30),
        tmp_path / "plain",
        NoProgress(),
    )
    found, expected = (
        load_file(tmp_path / name / "model.safetensors") for name in ("out", "plain")
    )
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["checkpoint_format"] == "gptq"
    assert not any("w17" in path.read_text() for path in (tmp_path / "out").glob("*config*.json"))
    (arguments,) = fake.calls
    assert {len(one["input_ids"]) for one in arguments["dataset"]} == {16}
    assert ["self_attn.q_proj"] in arguments["modules_in_block_to_quantize"]


def test_what_is_not_known_is_not_written(
    llama: Path,
    options: CalibrationOptions,
    fake: type[FakeQuantizer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    honest = fake.state_dict
    for kind, change in (
        ("qzeros", lambda one: one + 2),
        ("g_idx", lambda one: one.flip(0)),
        ("qweight", lambda one: one[1:]),
    ):

        def changed(self: FakeQuantizer, kind: str = kind, change: Any = change) -> Any:
            found = honest(self)
            return {n: change(t) if n.endswith(kind) else t for n, t in found.items()}

        monkeypatch.setattr(fake, "state_dict", changed)
        with pytest.raises(CheckpointError, match=kind):
            calibrate_by_optimum(job_of(llama), options, tmp_path / "work")
        assert not (tmp_path / "work").exists()


def test_what_it_cannot_do_is_refused(
    llama: Path, options: CalibrationOptions, fake: type[FakeQuantizer], tmp_path: Path
) -> None:
    jobs = (
        job_of(llama, method="rtn"),
        job_of(llama, format="compressed-tensors"),
        job_of(llama, rules=((r"layers\.1\.mlp", None),)),
    )
    for job in jobs:
        with pytest.raises(UsageError, match="the backend optimum"):
            calibrate_by_optimum(job, options, tmp_path / "work")
    assert not fake.calls


def test_files_of_others_stay(
    llama: Path,
    options: CalibrationOptions,
    fake: type[FakeQuantizer],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, work = tmp_path / "out", tmp_path / "out.calibration"
    work.mkdir()
    (work / "notes.txt").write_text("mine")
    words = ["quantize", str(llama), str(out), "--scheme", "w4a16", "--group-size", "64"]
    words += ["--format", "gptq", "--method", "gptq", "--backend", "optimum"]
    words += ["--calibration", str(options.texts[0]), "--calibration-length", "16"]
    for more in ([], ["--resume"]):
        with pytest.raises(SystemExit, match="2"):
            build([*words, *more])([*words, *more])
        said = capsys.readouterr().err
        assert str(work) in said
        assert "goes on with them" not in said
        with pytest.raises(RefusedDirectoryError):
            calibrate_by_optimum(job_of(llama), options, work, resume=bool(more))
    assert [path.name for path in work.iterdir()] == ["notes.txt"]
    assert not fake.calls
    (work / "notes.txt").rename(tmp_path / "notes.txt")
    with pytest.raises(SystemExit, match="0"):
        build(words)(words)
    assert not work.exists()


@pytest.mark.parametrize("name", ["optimum.gptq", "transformers", "gptqmodel"])
def test_it_says_what_to_install(
    name: str,
    llama: Path,
    options: CalibrationOptions,
    fake: type[FakeQuantizer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtraError, match=name.partition(".")[0]) as caught:
        calibrate_by_optimum(job_of(llama), options, tmp_path / "work")
    assert "gptqmodel" in str(caught.value.hint)
