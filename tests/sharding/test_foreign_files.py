"""Files that are not ours stay as they are, whatever their names."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from support.interrupted import begin, write
from tightfit.errors import OutputError

TinyModel = Callable[[str], Path]


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_journals_that_are_no_files(kind: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    out, victim = tmp_path / "out", tmp_path / "victim.txt"
    out.mkdir()
    victim.write_text("precious\n")
    path = out / "tightfit-rank-0.journal"
    path.symlink_to(victim) if kind == "link" else os.mkfifo(path)
    with pytest.raises(OutputError, match=r"tightfit-rank-0.journal is not a regular file"):
        write(tiny_model("llama"), out, resume=True)
    assert victim.read_text() == "precious\n"


@pytest.mark.parametrize("text", ["precious\n", '{"mine": 1}\n', '["job"]\n'])
def test_a_foreign_file_with_the_name_of_a_journal(
    text: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    path = tmp_path / "tightfit-rank-0.journal"
    path.write_text(text)
    with pytest.raises(OutputError, match="is damaged, or no journal of tightfit"):
        write(tiny_model("llama"), tmp_path, resume=True)
    assert path.read_text() == text


@pytest.mark.parametrize(
    "name", ["config.json.rank0.partial", "tightfit-manifest.json.rank0.partial"]
)
def test_small_files_do_not_follow_links(name: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    out, victim = tmp_path / "out", tmp_path / "victim.txt"
    victim.write_text("precious\n")
    begin(tiny_model("llama"), out)
    (out / f"{name}.rank0.partial").symlink_to(victim)
    write(tiny_model("llama"), out, resume=True)
    assert victim.read_text() == "precious\n"


def test_a_pipe_with_the_name_of_a_side_file(tiny_model: TinyModel, tmp_path: Path) -> None:
    begin(tiny_model("llama"), tmp_path)
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(OutputError, match=r"config.json is not a regular file"):
        write(tiny_model("llama"), tmp_path, resume=True)
