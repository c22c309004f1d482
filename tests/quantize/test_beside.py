"""What goes with the weights, of `quantize` and of `shard --quantize`."""

import json
import shutil
from pathlib import Path

import pytest

from support.cli import Call
from support.seeded_models import LLAMA, write_seeded_model


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_seeded_model(LLAMA, tmp_path_factory.mktemp("llama") / "model")


@pytest.mark.parametrize("command", ["quantize", "shard"])
def test_a_config_that_utf8_has_no_bytes_for(
    command: str, llama: Path, tmp_path: Path, call: Call
) -> None:
    model, out = Path(shutil.copytree(llama, tmp_path / "model")), tmp_path / "out"
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "remark": "\ud800 é"}))
    scheme = ("--scheme" if command == "quantize" else "--quantize", "int8")
    done = call(command, model, out, *scheme)
    assert done.returncode == 0, done.stderr
    assert json.loads((out / "config.json").read_text())["remark"] == "\ud800 é"
    assert call("verify", out).returncode == 0


@pytest.mark.parametrize("command", ["quantize", "shard"])
def test_what_is_beside_the_weights(command: str, llama: Path, tmp_path: Path, call: Call) -> None:
    model, out = Path(shutil.copytree(llama, tmp_path / "model")), tmp_path / "out"
    for name in ("1_Pooling/config.json", "additional_chat_templates/rag.jinja", ".cache/x"):
        (model / name).parent.mkdir()
        (model / name).write_text("{}")
    scheme = ("--scheme" if command == "quantize" else "--quantize", "int8")
    done = call(command, model, out, *scheme, "-q")
    assert done.returncode == 0
    assert done.stderr == (
        "warning: subdirectories of model are not copied (1_Pooling, additional_chat_templates): "
        "copy those that the model needs\n"
    )
    (model / "vocab.json").symlink_to("blobs/1234")
    done = call(command, model, tmp_path / "another", *scheme, "-q")
    assert done.returncode == 2
    assert f"error: vocab.json of {model} is a link that leads nowhere\n" in done.stderr
    assert not (tmp_path / "another").exists()
