"""`verify` of what `quantize` writes: damage, other sources, and what lies beside the weights."""

import json
import shutil
from pathlib import Path

import pytest

from support.seeded_models import LLAMA, write_seeded_model
from tightfit.checkpoint.checkpoint import open_checkpoint
from tightfit.checkpoint.source import LocalSource
from tightfit.cli.output import NoProgress
from tightfit.errors import VerificationError
from tightfit.model.quantization.written import Choice, Wish
from tightfit.quantize.dequantize import open_dequantized
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
    with pytest.raises(VerificationError, match=f"finished, and damaged: {index.name} is missing"):
        write(job, out, NoProgress(), resume=True)
    weight_map = dict.fromkeys(document["weight_map"], "model-00009-of-00009.safetensors")
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert problems() == (f"{index.name} is not the one that was written",)
    with pytest.raises(
        VerificationError, match=r"finished, and damaged: model\.safetensors\.index"
    ):
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


def test_side_files_are_verified(llama: Path, tmp_path: Path) -> None:
    model, out = Path(shutil.copytree(llama, tmp_path / "model")), tmp_path / "out"
    for name in ("tokenizer.json", "chat_template.jinja", "README.md"):
        (model / name).write_text(f"{name} of the source")
    write(files_of(model), out, NoProgress())
    manifest = json.loads((out / NAME).read_text())
    assert {"config.json", "tokenizer.json", "chat_template.jinja"} <= manifest["beside"].keys()
    # What somebody adds is theirs.
    (out / "notes.txt").write_text("mine")

    def problems() -> tuple[str, ...]:
        return verify(LocalSource(out), NoProgress(), None).problems

    assert problems() == ()
    (out / "tokenizer.json").unlink()
    (out / "chat_template.jinja").write_text("chat_template.jinja of another")
    found = (
        "chat_template.jinja is not the one that was written",
        "tokenizer.json is missing, which belongs beside the weights",
    )
    assert problems() == found
    with pytest.raises(VerificationError, match=r"finished, and damaged: chat_template\.jinja is"):
        write(files_of(model), out, NoProgress(), resume=True)
    (out / "config.json").unlink()
    assert problems() == (f"{out} has no config.json", *found)
    # No name in a manifest leads out of the directory; older ones do not have them.
    (tmp_path / "secret").write_text("")
    (out / NAME).write_text(json.dumps({**manifest, "beside": {"../secret": "0"}}))
    assert problems()[1:] == ("../secret is missing, which belongs beside the weights",)


def test_another_source_is_found(llama: Path, tmp_path: Path) -> None:
    write(files_of(llama), tmp_path / "out", NoProgress())
    other = write_seeded_model(LLAMA, tmp_path / "other", seed=6)
    problems = verify(LocalSource(tmp_path / "out"), NoProgress(), str(other)).problems
    assert len(problems) > 30
    assert all("differs from" in problem for problem in problems)


def test_a_source_that_cannot_be_it(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    rule = (r"layers\.2\.", Choice(scheme="fp8-channel"))
    job = prepare(open_checkpoint(str(llama)), Wish(default=None, rules=(rule,)))
    write(write_job(job, max_shard_bytes=10**9), out, NoProgress())
    other = write_seeded_model({**LLAMA, "num_hidden_layers": 1}, tmp_path / "other")
    with pytest.raises(VerificationError, match=f"{other} cannot be what {out} was made") as e:
        verify(LocalSource(out), NoProgress(), str(other))
    assert e.value.hint == "it was quantized from model"


@pytest.mark.parametrize("text", ["", "{}", '{"format": 1}', "[" * 9999])
def test_a_manifest_that_is_damaged(text: str, llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(files_of(llama), out, NoProgress())
    (out / NAME).write_text(text)
    with pytest.raises(VerificationError, match="is damaged or of another version"):
        verify(LocalSource(out), NoProgress(), None)
    with pytest.raises(VerificationError, match="is damaged or of another version"):
        write(files_of(llama), out, NoProgress(), resume=True)


def test_what_was_dequantized_before(llama: Path, tmp_path: Path) -> None:
    """Held against the quantized model that it was made of, and not against that model's files."""
    first, second = tmp_path / "first", tmp_path / "second"
    write(files_of(llama), first, NoProgress())
    source = open_dequantized(open_checkpoint(str(first)))
    wish = Wish(default=Choice(scheme="w4a16", group_size=64))
    write(write_job(prepare(source, wish), max_shard_bytes=10**9), second, NoProgress())
    assert verify(LocalSource(second), NoProgress(), str(first)).ok
    found = verify(LocalSource(second), NoProgress(), str(llama)).problems
    assert found
    assert all("differs from" in problem for problem in found)
