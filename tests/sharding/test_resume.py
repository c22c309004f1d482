"""Whatever kills `shard`, --resume ends with the same bytes; and ranks may come one by one."""

import os
import random
import shutil
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from support.interrupted import Copied, begin, digests, in_child, write
from tightfit.checkpoint.checkpoint import open_checkpoint
from tightfit.cli.output import NoProgress
from tightfit.errors import OutputError, UsageError, VerificationError
from tightfit.sharding.manifest import read_manifest
from tightfit.sharding.merge import prepare_merge
from tightfit.sharding.proof.verify import verify
from tightfit.sharding.ranks import parse_ranks, show_ranks

TinyModel = Callable[[str], Path]


def looks_whole(directory: Path) -> bool:
    return (directory / "tightfit-manifest.json").exists()


@pytest.mark.parametrize("model", ["llama_bias", "jamba"])
def test_killed_anywhere(model: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    source = tiny_model(model)
    write(source, tmp_path / "whole")
    expected = digests(tmp_path / "whole")
    calls = in_child(lambda: write(source, tmp_path / "counted"))
    generator = random.Random(7)
    places = sorted(generator.sample(range(1, calls), 30))
    # The end, where files get their names, is short and deserves every place.
    places += range(calls - 25, calls + 1)
    for i, place in enumerate(places):
        out = tmp_path / f"killed{i}"
        code = in_child(lambda out=out: write(source, out), place)
        if code == -9 and not looks_whole(out):
            if out.exists() and any(out.iterdir()):
                with pytest.raises(VerificationError):
                    read_manifest(out)
                with pytest.raises(OutputError):
                    write(source, out)
            # Another kill on the way does no harm.
            in_child(lambda out=out: write(source, out, resume=True), generator.randrange(1, calls))
        elif looks_whole(out):
            in_the_end = {
                n: d for n, d in digests(out).items() if not n.startswith("tightfit-rank")
            }
            assert in_the_end == expected
        write(source, out, resume=True)
        assert digests(out) == expected, place


def test_killed_again_and_again(tiny_model: TinyModel, tmp_path: Path) -> None:
    """Each attempt gets a little further, because it does not begin anew."""
    source, out = tiny_model("llama"), tmp_path / "out"
    write(source, tmp_path / "whole", size=4)
    calls = in_child(lambda: write(source, tmp_path / "counted", size=4))
    attempts = 0
    while in_child(lambda: write(source, out, size=4, resume=True), calls // 2) == -9:
        attempts += 1
        assert attempts < 50
    assert attempts > 0
    assert digests(out) == digests(tmp_path / "whole")


def test_what_is_proven_is_not_done_again(tiny_model: TinyModel, tmp_path: Path) -> None:
    model, out = tiny_model("llama"), tmp_path / "out"
    total = begin(model, out, 0.8)
    bars = Copied()
    write(model, out, bars=bars, resume=True)
    assert bars.totals["checking"] > 0
    # Copied and hashed: neither is done again.
    assert bars.totals["copying"] < total - 1.9 * bars.totals["checking"]
    write(model, tmp_path / "whole")
    assert digests(out) == digests(tmp_path / "whole")
    # A third time there is nothing to do at all.
    again = Copied()
    write(model, out, bars=again, resume=True)
    assert again.totals == {}


def test_damage_to_what_was_done_is_found(tiny_model: TinyModel, tmp_path: Path) -> None:
    """Power may fail before the disk has what the journal says."""
    model, out = tiny_model("llama"), tmp_path / "out"
    begin(model, out, 0.9)
    for path in out.glob("*.safetensors.partial"):
        path.write_bytes(b"\x55" * path.stat().st_size)
    write(model, out, resume=True)
    write(model, tmp_path / "whole")
    assert digests(out) == digests(tmp_path / "whole")


@pytest.mark.parametrize("damage", ["torn", "emptied", "garbage", "removed"])
def test_damaged_journals(damage: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    model, out = tiny_model("llama"), tmp_path / "out"
    begin(model, out)
    path = out / "tightfit-rank-1.journal"
    data = path.read_bytes()
    if damage == "removed":
        path.unlink()
    else:
        path.write_bytes({"torn": data[:-7], "emptied": b"", "garbage": b"\xff[[[" * 99}[damage])
    if damage == "garbage":
        # It may be anything: nobody but its owner may say that it goes.
        with pytest.raises(OutputError, match=r"journal is damaged, or no journal of tightfit"):
            write(model, out, resume=True)
        assert path.read_bytes() == b"\xff[[[" * 99
        path.unlink()
    begin(model, out, 0.1)
    write(model, out, resume=True)
    write(model, tmp_path / "whole")
    assert digests(out) == digests(tmp_path / "whole")


def test_another_source_proves_nothing(tiny_model: TinyModel, tmp_path: Path) -> None:

    model, out = Path(shutil.copytree(tiny_model("llama"), tmp_path / "model")), tmp_path / "out"
    total = begin(model, out)
    weights = model / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    bars = Copied()
    write(model, out, bars=bars, resume=True)
    assert bars.totals["copying"] == total
    write(model, tmp_path / "whole")
    assert digests(out) == digests(tmp_path / "whole")


def test_another_job_is_refused(tiny_model: TinyModel, tmp_path: Path) -> None:
    out = tmp_path / "out"
    begin(tiny_model("llama"), out)
    before = digests(out)
    with pytest.raises(OutputError) as e:
        write(tiny_model("llama"), out, size=4, resume=True)
    assert e.value.message == (
        f"{out} holds the work of another call: --tensor-parallel-size was 2, and is 4"
    )
    with pytest.raises(OutputError, match="the model is another one"):
        write(tiny_model("llama_bias"), out, resume=True)
    with pytest.raises(OutputError) as e:
        write(tiny_model("llama"), out)
    assert e.value.message == f"the output directory {out} holds an unfinished output"
    (out / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="is not empty"):
        write(tiny_model("llama"), out, resume=True)
    (out / "notes.txt").unlink()
    assert digests(out) == before


def test_ranks_by_parts(tiny_model: TinyModel, tmp_path: Path) -> None:
    model, out = tiny_model("jamba"), tmp_path / "out"
    write(model, tmp_path / "whole", size=4)
    expected = digests(tmp_path / "whole")
    for ranks, missing in (({2}, (0, 1, 3)), ({0, 3}, (1,))):
        assert write(model, out, size=4, ranks=ranks).missing_ranks == missing
        with pytest.raises(VerificationError) as e:
            read_manifest(out)
        lacks = show_ranks(missing)
        assert e.value.message == f"{out} is not whole: of 4 ranks it lacks {lacks}"
        assert e.value.hint == f"run `tightfit shard` into it with --ranks {lacks} --resume"
        with pytest.raises(VerificationError):
            prepare_merge(open_checkpoint(str(out)), max_shard_bytes=10**9)
        for rank in ranks:
            assert {n for n in digests(out) if f"rank-{rank}-part" in n} == {
                n for n in expected if f"rank-{rank}-part" in n
            }
    with pytest.raises(OutputError) as e2:
        write(model, out, size=4, ranks={1, 2})
    assert e2.value.message == f"{out} already has rank 2"
    assert write(model, out, size=4, ranks={1}).missing_ranks == ()
    assert digests(out) == expected
    report = verify(
        out, open_checkpoint(str(out)).config, NoProgress(), open_checkpoint(str(model))
    )
    assert report.problems == ()
    # Whole directories stay as they are.
    with pytest.raises(OutputError, match="already has all ranks"):
        write(model, out, size=4, ranks={1})
    write(model, out, size=4, ranks={1}, resume=True)
    assert digests(out) == expected


def test_the_rest_without_saying_which(tiny_model: TinyModel, tmp_path: Path) -> None:
    model, out = tiny_model("llama"), tmp_path / "out"
    write(model, tmp_path / "whole", size=4)
    write(model, out, size=4, ranks={1, 2})
    kept = {p.name: p.stat().st_mtime_ns for p in out.glob("model-rank-[12]*")}
    write(model, out, size=4, resume=True)
    assert digests(out) == digests(tmp_path / "whole")
    assert {p.name: p.stat().st_mtime_ns for p in out.glob("model-rank-[12]*")} == kept


def test_ranks_that_were_written_elsewhere(tiny_model: TinyModel, tmp_path: Path) -> None:
    """On local disks of several machines, and copied into one directory."""
    model, out = tiny_model("llama"), tmp_path / "out"
    write(model, tmp_path / "whole", size=4)
    for ranks in ({0, 1}, {2, 3}):
        local = tmp_path / f"local{min(ranks)}"
        write(model, local, size=4, ranks=ranks)
        shutil.copytree(local, out, dirs_exist_ok=True)
    bars = Copied()
    write(model, out, size=4, bars=bars, resume=True)
    assert bars.totals == {}
    assert digests(out) == digests(tmp_path / "whole")


def test_ranks_killed_anywhere(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = tiny_model("llama_mqa")
    write(model, tmp_path / "whole", size=4)
    expected = digests(tmp_path / "whole")
    write(model, tmp_path / "rest", size=4, ranks={0, 1, 3})

    def copy(name: str) -> Path:
        return Path(shutil.copytree(tmp_path / "rest", tmp_path / name))

    counted = copy("counted")
    calls = in_child(lambda: write(model, counted, size=4, ranks={2}))
    for place in [*range(3, calls - 25, calls // 12), *range(calls - 25, calls + 1)]:
        out = copy(f"killed{place}")
        assert in_child(lambda out=out: write(model, out, size=4, ranks={2}), place) == -9
        write(model, out, size=4, ranks={2}, resume=True)
        assert digests(out) == expected, place


def test_ranks_at_the_same_time(tiny_model: TinyModel, tmp_path: Path) -> None:
    """As a job array does on a shared directory."""
    model, out = tiny_model("llama"), tmp_path / "deep" / "out"
    write(model, tmp_path / "whole", size=4)
    for _ in range(5):
        children = []
        for rank in range(4):
            child = os.fork()
            if child == 0:
                try:
                    write(model, out, size=4, ranks={rank})
                    os._exit(0)
                finally:
                    os._exit(1)
            children.append(child)
        assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
        assert digests(out) == digests(tmp_path / "whole")
        for path in out.iterdir():
            path.unlink()


def test_one_process_for_a_rank(tiny_model: TinyModel, tmp_path: Path) -> None:
    model, out = tiny_model("llama"), tmp_path / "out"

    class Meanwhile(NoProgress):
        def phase(self, name: str, total_bytes: int) -> None:
            with pytest.raises(OutputError) as e:
                write(model, out, ranks={0}, resume=True)
            assert e.value.message == f"another process is writing rank 0 to {out}"
            self.seen = True

    bars = Meanwhile()
    write(model, out, bars=bars, ranks={0})
    assert bars.seen
    assert read_rank_names(out) == ["tightfit-rank-0.json"]


def read_rank_names(out: Path) -> list[str]:
    return sorted(p.name for p in out.glob("tightfit-*"))


def test_a_failure_leaves_other_ranks_alone(tiny_model: TinyModel, tmp_path: Path) -> None:
    model, out = tiny_model("llama"), tmp_path / "out"
    write(model, out, ranks={0})
    before = digests(out)
    with pytest.raises(KeyboardInterrupt):
        write(model, out, bars=Copied(0.5), ranks={1})
    assert digests(out) == before


@pytest.mark.parametrize("ranks", [{2}, {0, 7}, set()])
def test_ranks_that_do_not_exist(ranks: set[int], tiny_model: TinyModel, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        write(tiny_model("llama"), tmp_path / "out", ranks=ranks)
    assert not (tmp_path / "out").exists()


def test_spelling_of_ranks() -> None:
    assert parse_ranks("0-3,7") == {0, 1, 2, 3, 7}
    assert show_ranks({7, 0, 1, 3, 2}) == "0-3,7"
    for text in ("", "a", "3-1", "1,,2", "-1", "1-", "9999999"):
        with pytest.raises(UsageError):
            parse_ranks(text)


def test_an_interrupt_at_any_call_leaves_all_or_nothing(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    source = tiny_model("llama")
    whole = tmp_path / "whole"
    write(source, whole)

    def work(out: Path) -> Callable[[], None]:
        def interrupted() -> None:
            with suppress(KeyboardInterrupt):
                write(source, out)

        return interrupted

    calls = in_child(work(tmp_path / "counted"))
    for place in range(1, calls + 1):
        out = tmp_path / "new" / str(place)
        in_child(work(out), place, number=signal.SIGINT)
        if out.parent.exists():
            assert digests(out) == digests(whole), place
            shutil.rmtree(out.parent)
