"""Whatever kills `merge`, --resume ends with the same bytes, and nothing loads before."""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from support.interrupted import Copied, digests, in_child
from support.work import write_shards
from tightfit.checkpoint.checkpoint import open_checkpoint
from tightfit.checkpoint.source import open_source
from tightfit.cli.output import NoProgress
from tightfit.errors import ConfigError, OutputError, VerificationError
from tightfit.sharding.merge import merge, prepare_merge
from tightfit.sharding.proof.verify import require_manifest
from tightfit.sharding.remote.plain import write_to

TinyModel = Callable[[str], Path]
JOURNAL = "tightfit-merge.journal"


def join(
    shards: Path,
    out: Path,
    bars: NoProgress | None = None,
    *,
    resume: bool = False,
    max_shard_bytes: int = 2 * 10**5,
) -> None:
    job = prepare_merge(open_checkpoint(str(shards)), max_shard_bytes=max_shard_bytes)
    merge(job, out, bars or NoProgress(), resume=resume)


@pytest.fixture(scope="module")
def shards(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Biases and a tokenizer, cut in two."""
    root = tmp_path_factory.mktemp("merge")
    model = Path(shutil.copytree(tiny_model("llama_bias"), root / "model"))
    (model / "tokenizer.json").write_text("{}")
    write_shards(model, root / "shards", 2)
    return root / "shards"


def begin(shards: Path, out: Path, share: float = 0.6) -> int:
    """Interrupt at a share of the work; returns the bytes of all of it."""
    bars = Copied(share)
    with pytest.raises(KeyboardInterrupt):
        join(shards, out, bars, resume=True)
    return bars.totals["copying"]


@pytest.mark.parametrize("max_shard_bytes", [10**9, 2 * 10**5])
def test_killed_anywhere(max_shard_bytes: int, shards: Path, tmp_path: Path) -> None:
    size = max_shard_bytes

    def work(out: Path, *, resume: bool = False) -> Callable[[], None]:
        return lambda: join(shards, out, resume=resume, max_shard_bytes=size)

    work(tmp_path / "whole")()
    expected = digests(tmp_path / "whole")
    calls = in_child(work(tmp_path / "counted"))
    generator = random.Random(3)
    places = sorted(generator.sample(range(1, calls), 12))
    # The end, where files get their names, is short and deserves every place.
    places += range(calls - 20, calls + 1)
    for i, place in enumerate(places):
        out = tmp_path / f"killed{i}"
        in_child(work(out), place)
        unfinished = out.exists() and any(out.iterdir()) and digests(out) != expected
        if unfinished:
            if not (out / "config.json").exists():
                with pytest.raises(ConfigError):
                    open_checkpoint(str(out))
            with pytest.raises(OutputError):
                work(out)()
            # Another kill on the way does no harm.
            in_child(work(out, resume=True), generator.randrange(1, calls))
        work(out, resume=True)()
        assert digests(out) == expected, place


def test_what_is_proven_is_not_done_again(shards: Path, tmp_path: Path) -> None:
    total = begin(shards, tmp_path / "out", 0.8)
    bars = Copied()
    join(shards, tmp_path / "out", bars, resume=True)
    assert bars.totals["checking"] > 0
    assert 0 < bars.totals["copying"] < total - 1.9 * bars.totals["checking"]
    join(shards, tmp_path / "whole")
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_a_finished_merge_is_compared(shards: Path, tiny_model: TinyModel, tmp_path: Path) -> None:
    out = tmp_path / "out"
    join(shards, out)
    before = digests(out)
    bars = Copied()
    join(shards, out, bars, resume=True)
    assert bars.totals.keys() == {"comparing"}
    path = min(out.glob("model-00002-of-*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(OutputError) as e:
        join(shards, out, resume=True)
    assert e.value.message.startswith(f"{out} holds something else than a merge of shards: ")
    assert e.value.message.endswith(" differs from out")
    with pytest.raises(OutputError, match="is not empty"):
        join(shards, out)
    assert digests(out).keys() == before.keys()
    # What a model of somebody else is, it stays.
    other = Path(shutil.copytree(tiny_model("llama"), tmp_path / "other"))
    kept = digests(other)
    for size in (10**9, 2 * 10**5):
        with pytest.raises(OutputError):
            join(shards, other, resume=True, max_shard_bytes=size)
    assert digests(other) == kept


def test_twins_of_a_finished_merge(tiny_model: TinyModel, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = Path(shutil.copytree(tiny_model("llama_tied"), tmp_path / "model"))
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    write_shards(model, tmp_path / "shards", 2)
    out = tmp_path / "out"
    join(tmp_path / "shards", out, max_shard_bytes=10**9)
    join(tmp_path / "shards", out, resume=True, max_shard_bytes=10**9)
    info = open_checkpoint(str(out)).tensors()["lm_head.weight"]
    with open(out / info.file, "r+b") as file:
        file.seek(info.offset)
        file.write(b"\x55\x55")
    with pytest.raises(OutputError) as e:
        join(tmp_path / "shards", out, resume=True, max_shard_bytes=10**9)
    assert "'lm_head.weight' differs from 'model.embed_tokens.weight'" in e.value.message


def test_another_merge_is_refused(shards: Path, tiny_model: TinyModel, tmp_path: Path) -> None:
    out = tmp_path / "out"
    begin(shards, out)
    before = digests(out)
    with pytest.raises(OutputError) as e:
        join(shards, out, resume=True, max_shard_bytes=10**9)
    assert "--max-shard-size was 200,000, and is 1,000,000,000" in e.value.message or (
        e.value.message == f"the output directory {out} is not empty"
    )
    with pytest.raises(OutputError) as e:
        join(shards, out)
    assert e.value.message == f"the output directory {out} holds an unfinished output"
    assert e.value.hint == "--resume continues it; or give a new directory"
    write_shards(tiny_model("llama"), tmp_path / "others", 2)
    with pytest.raises(OutputError):
        join(tmp_path / "others", out, resume=True)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="is not empty"):
        join(shards, out, resume=True)
    (out / "notes.txt").unlink()
    assert digests(out) == before


def test_rank_files_that_changed_prove_nothing(shards: Path, tmp_path: Path) -> None:
    copy, out = Path(shutil.copytree(shards, tmp_path / "copy")), tmp_path / "out"
    total = begin(copy, out)
    os.utime(copy / "model-rank-0-part-0.safetensors", (1, 1))
    bars = Copied()
    join(copy, out, bars, resume=True)
    assert bars.totals["copying"] == total
    join(shards, tmp_path / "whole")
    assert digests(out) == digests(tmp_path / "whole")


def test_interrupted_without_resume(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        join(shards, tmp_path / "deep" / "out", Copied(0.5))
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    out = tmp_path / "out"
    for resume in (False, True):
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(OutputError, match="no space left"):
            join(shards, out, resume=resume)
        monkeypatch.undo()
        assert out.exists() is resume
    assert json.loads((out / JOURNAL).read_bytes().split(b"\n")[0])["job"]
    join(shards, out, resume=True)
    join(shards, tmp_path / "whole")
    assert digests(out) == digests(tmp_path / "whole")


class Sent(NoProgress):
    """Ctrl-C when most is sent."""

    left = 2.0**60

    def phase(self, name: str, total_bytes: int) -> None:
        self.left = 0.9 * total_bytes if name == "uploading" else 2.0**60

    def advance(self, nbytes: int) -> None:
        self.left -= nbytes
        if self.left < 0:
            raise KeyboardInterrupt


def test_an_unfinished_merge_is_called_one(shards: Path, tmp_path: Path) -> None:
    from fsspec.implementations.memory import MemoryFileSystem

    out, url = tmp_path / "out", "memory://unfinished_merge"
    begin(shards, out)
    job = prepare_merge(open_checkpoint(str(shards)), max_shard_bytes=10**5)
    try:
        with pytest.raises(KeyboardInterrupt):
            write_to(job, url, Sent())
        for place in (str(out), url):
            with pytest.raises(VerificationError) as e:
                require_manifest(open_source(place))
            assert e.value.message == f"{place} is an unfinished output of `tightfit merge`"
            assert "--resume" in (e.value.hint or "")
    finally:
        MemoryFileSystem().rm("/unfinished_merge", recursive=True)
