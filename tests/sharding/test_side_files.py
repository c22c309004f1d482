"""Config, tokenizer and whatever else goes with the ranks: looked at before anything is copied."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from support.interrupted import Copied, digests, write
from tightfit.cli.output import NoProgress
from tightfit.errors import CheckpointError, OutputError
from tightfit.sharding.output import ShardOutput

TinyModel = Callable[[str], Path]


class Nothing(NoProgress):
    """Nothing is to be copied."""

    def phase(self, name: str, total_bytes: int) -> None:
        raise AssertionError(name)


def test_a_link_out_of_the_source(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_model("llama"), tmp_path / "model"))
    (tmp_path / "elsewhere.md").write_text("secret")
    (model / "README.md").symlink_to(tmp_path / "elsewhere.md")
    with pytest.raises(CheckpointError, match="a link that leads out of the directory"):
        write(model, tmp_path / "out", bars=Nothing())
    assert not (tmp_path / "out").exists()


def test_another_one_is_there_already(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_model("llama"), tmp_path / "model"))
    (model / "README.md").write_text("one")
    write(model, tmp_path / "out", ranks={0})
    before = digests(tmp_path / "out")
    (model / "README.md").write_text("two")
    with pytest.raises(OutputError, match=r"README.md is there already, and differs"):
        write(model, tmp_path / "out", bars=Nothing(), ranks={1})
    assert digests(tmp_path / "out") == before


def test_an_interruption_before_a_rank_has_its_name(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out = tiny_model("llama"), tmp_path / "out"
    write(model, tmp_path / "whole")

    def interrupted(_: ShardOutput) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(ShardOutput, "_name_parts", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write(model, out, ranks={0})
    left = set(os.listdir(out))
    assert "config.json" in left
    assert not any(name.startswith(("model-", "tightfit-")) for name in left)
    write(model, out, ranks={0}, bars=Copied())
    write(model, out, ranks={1})
    assert digests(out) == digests(tmp_path / "whole")
