"""`verify` of what `quantize` writes: damage, other sources, and what lies beside the weights."""

import json
from pathlib import Path

import pytest

from support.seeded_models import LLAMA, write_seeded_model
from tightfit.checkpoint.checkpoint import open_checkpoint
from tightfit.checkpoint.source import LocalSource
from tightfit.cli.output import NoProgress
from tightfit.errors import OutputError, VerificationError
from tightfit.model.quantization.written import Choice, Wish
from tightfit.quantize.job import prepare
from tightfit.quantize.manifest import NAME
from tightfit.quantize.verify import verify
from tightfit.quantize.write import WriteJob, write, write_job


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_seeded_model(LLAMA, tmp_path_factory.mktemp("llama") / "model")


def files_of(model: Path, max_shard_bytes: int = 2 * 10**5) -> WriteJob:
    wish = Wish(default=Choice(scheme="fp8-channel"))
    return write_job(prepare(open_checkpoint(str(model)), wish), max_shard_bytes=max_shard_bytes)


def test_damage_is_found_by_name(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(files_of(llama, max_shard_bytes=10**9), out, NoProgress())
    assert verify(LocalSource(out), NoProgress(), str(llama)).ok
    info = open_checkpoint(str(out)).tensors()["model.layers.1.self_attn.o_proj.weight_scale"]
    with open(out / info.file, "r+b") as file:
        file.seek(info.offset)
        file.write(b"\x55")
    (problem,) = verify(LocalSource(out), NoProgress(), None).problems
    assert problem == (
        "model.safetensors: 'model.layers.1.self_attn.o_proj.weight_scale' is damaged (its "
        "checksum differs)"
    )
    (out / "more.safetensors").write_bytes(b"")
    config = json.loads((out / "config.json").read_text())
    del config["quantization_config"]["format"]
    (out / "config.json").write_text(json.dumps(config))
    found = verify(LocalSource(out), NoProgress(), None).problems
    assert found[0].startswith("more.safetensors is not in tightfit-quantize.json")
    assert found[1] == "the quantization_config in config.json is not the one that was written"


def test_what_is_beside_the_weights_is_verified(llama: Path, tmp_path: Path) -> None:
    out, job = tmp_path / "out", files_of(llama)
    write(job, out, NoProgress())
    index, config = out / "model.safetensors.index.json", out / "config.json"

    def problems() -> tuple[str, ...]:
        return verify(LocalSource(out), NoProgress(), None).problems

    assert problems() == ()
    text, document = index.read_text(), json.loads(index.read_text())
    index.unlink()
    assert problems() == (
        f"{index.name} is missing, which says that the weights are several files",
    )
    with pytest.raises(OutputError, match="is not empty"):
        write(job, out, NoProgress(), resume=True)
    weight_map = dict.fromkeys(document["weight_map"], "model-00009-of-00009.safetensors")
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert problems() == (f"{index.name} is not the one that was written",)
    with pytest.raises(OutputError, match=r"finished, and damaged: model\.safetensors\.index"):
        write(job, out, NoProgress(), resume=True)
    index.write_text(text)
    changed = json.loads(config.read_text()) | {"num_hidden_layers": 1}
    config.write_text(json.dumps(changed))
    assert problems() == ("config.json is not the one that was written",)
    # Older versions noted no checksums of these.
    manifest = json.loads((out / NAME).read_text())
    del manifest["beside"]
    (out / NAME).write_text(json.dumps(manifest))
    assert problems() == ()


def test_another_source_is_found(llama: Path, tmp_path: Path) -> None:
    write(files_of(llama), tmp_path / "out", NoProgress())
    other = write_seeded_model(LLAMA, tmp_path / "other", seed=6)
    problems = verify(LocalSource(tmp_path / "out"), NoProgress(), str(other)).problems
    assert len(problems) > 30
    assert all("differs from" in problem for problem in problems)


@pytest.mark.parametrize("text", ["", "{}", '{"format": 1}', "[" * 9999])
def test_a_manifest_that_is_damaged(text: str, llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(files_of(llama), out, NoProgress())
    (out / NAME).write_text(text)
    with pytest.raises(VerificationError, match="is damaged or of another version"):
        verify(LocalSource(out), NoProgress(), None)
    with pytest.raises(VerificationError, match="is damaged or of another version"):
        write(files_of(llama), out, NoProgress(), resume=True)
