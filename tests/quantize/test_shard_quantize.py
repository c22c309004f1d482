"""`shard --quantize`: the rank files of what `quantize` would write, without writing it first."""

import json
import os
import pickle
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.cli import assert_error, tightfit
from support.seeded_models import LLAMA, write_seeded_model
from support.spreading import InProcess
from support.wishes import CHOICES, WISHES, mixed
from support.work import digests, merged, stored
from tightfit.checkpoint.checkpoint import open_checkpoint
from tightfit.checkpoint.files import MANIFEST
from tightfit.cli.output import NoProgress
from tightfit.cli.shard_quantized import OnTheWay, again, quantized
from tightfit.errors import CheckpointError, LayoutError, UnsupportedModelError
from tightfit.model.quantization.written import Wish
from tightfit.model.stored import DEFAULT_LAYOUT, stored_layout
from tightfit.quantize import made_cache
from tightfit.quantize.encoding import EncodedSource
from tightfit.quantize.job import prepare
from tightfit.quantize.matrices import Matrix
from tightfit.quantize.write import write, write_job
from tightfit.sharding.job import ShardJob
from tightfit.sharding.job import prepare as prepare_shards
from tightfit.sharding.manifest import read_manifest
from tightfit.sharding.proof.verify import verify
from tightfit.sharding.shard import shard

LAYOUTS = {
    "tp2": {"tensor_parallel_size": 2},
    "tp2 pp2": {"tensor_parallel_size": 2, "pipeline_parallel_size": 2},
    "ep2": {"tensor_parallel_size": 2, "expert_parallel": True},
}
TINY = {
    "qwen3_moe": [("fp8-channel", "tp2"), ("nvfp4a16", "tp2 pp2"), ("w4a16 g32", "ep2")],
    "granitemoe": [("fp8-channel", "tp2"), ("int8", "ep2")],
    "mixtral": [("w4a16-asym g32", "tp2"), ("mxfp8", "ep2")],
    "llama4": [("fp8-channel", "tp2 pp2")],
    "qwen3_vl": [("mxfp4", "tp2")],
    "gemma3": [("w8a16 g32", "tp2 pp2")],
    "qwen2_tied": [("w4a16 g32 (gptq)", "tp2")],
    "mistral": [("w4a16-asym g32 (awq)", "tp2")],
    "qwen3_next": [("int8", "tp2")],
}
CASES = [(name, *case) for name, cases in TINY.items() for case in cases]


@pytest.mark.parametrize(("name", "label", "layout"), CASES)
def test_as_quantize_and_then_shard(
    name: str, label: str, layout: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    model, wish = tiny_model(name), WISHES[label]
    job = shard_job(model, wish, **LAYOUTS[layout])
    counted = counting(job)
    shard(job, tmp_path / "out", NoProgress())
    assert set(counted.values()) == {1}, "each matrix is computed once"
    plain = write_quantized(model, wish, tmp_path / "plain")
    shard(job_of(plain, **LAYOUTS[layout]), tmp_path / "expected", NoProgress())
    assert_same(tmp_path / "out", tmp_path / "expected")
    manifest = read_manifest(tmp_path / "out")
    assert manifest.source_name == name
    assert manifest.quantized["method"] == "rtn"
    assert manifest.quantized["scheme"] == CHOICES[label].scheme
    # Held against what it was made of, and put together again.
    config = open_checkpoint(str(tmp_path / "out")).config
    source = again(open_checkpoint(str(model)), manifest.quantized, "manifest")
    report = verify(tmp_path / "out", config, NoProgress(), source)
    assert report.ok
    assert report.compared_with_source
    assert merged(tmp_path / "out", tmp_path / "merged") == stored(plain)


def test_a_mixed_recipe(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    model = tiny_model("qwen3_moe")
    spec = prepare(open_checkpoint(str(model)), WISHES["int8"]).spec
    job = shard_job(model, mixed(spec), tensor_parallel_size=2)
    shard(job, tmp_path / "out", NoProgress())
    plain = write_quantized(model, mixed(spec), tmp_path / "plain")
    shard(job_of(plain, tensor_parallel_size=2), tmp_path / "expected", NoProgress())
    assert_same(tmp_path / "out", tmp_path / "expected")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_seeded_model(LLAMA, tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture(scope="module")
def expected(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the llama in groups, for two ranks."""
    out = tmp_path_factory.mktemp("expected") / "out"
    shard(shard_job(llama, WISHES["w4a16 g32"], tensor_parallel_size=2), out, NoProgress())
    return out


def test_some_ranks(llama: Path, expected: Path, tmp_path: Path) -> None:
    """Of what they read a part of, the rest is not kept."""
    for rank in (1, 0):
        job = shard_job(llama, WISHES["w4a16 g32"], tensor_parallel_size=2, ranks=[rank])
        counted = counting(job)
        shard(job, tmp_path / "out", NoProgress())
        assert set(counted.values()) == {1}
        source = job.checkpoint.source
        assert isinstance(source, EncodedSource)
        kept = [key for key in source._cache.held if key not in source._cache.waiting]
        assert len(kept) <= (os.cpu_count() or 1) * 2
    assert_same(tmp_path / "out", expected)


def test_memory_is_bounded_where_ranks_read_a_part(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(made_cache, "_KEPT_BYTES", 2**14)
    job = shard_job(llama, WISHES["fp8-channel"], tensor_parallel_size=2, ranks=[0])
    source = job.checkpoint.source
    assert isinstance(source, EncodedSource)
    most, turn_to = [0], source._cache.turn_to

    def watched(key: Any) -> None:
        turn_to(key)
        most[0] = max(most[0], sum(map(len, source._cache.held.values())))

    source._cache.turn_to = watched  # type: ignore[method-assign]
    shard(job, tmp_path / "out", NoProgress())
    largest = max(info.nbytes for info in job.checkpoint.tensors().values())
    assert most[0] < 2**14 + 4 * largest


def test_going_on(llama: Path, expected: Path, tmp_path: Path) -> None:
    """With the same recipe, and by the same method, and no other."""
    wish, out = WISHES["w4a16 g32"], tmp_path / "out"
    job = shard_job(llama, wish, tensor_parallel_size=2, max_shard_bytes=10**5)
    source = job.checkpoint.source
    assert isinstance(source, EncodedSource)
    make, done = source.make, []

    def failing(unit: Matrix) -> Any:
        done.append(unit.module)
        if len(done) > 9:
            raise KeyboardInterrupt
        return make(unit)

    source.make = failing  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        shard(job, out, NoProgress(), resume=True)
    assert not (out / MANIFEST).exists()
    for other, method, said in (
        (WISHES["int8"], "rtn", "--quantize was w4a16, and is int8"),
        (wish, "mse", "--method was rtn, and is mse"),
    ):
        changed = shard_job(llama, other, method, tensor_parallel_size=2, max_shard_bytes=10**5)
        with pytest.raises(Exception, match=said):
            shard(changed, out, NoProgress(), resume=True)
    job = shard_job(llama, wish, tensor_parallel_size=2, max_shard_bytes=10**5)
    counted = counting(job)
    shard(job, out, NoProgress(), resume=True)
    assert len(counted) < 3 * 7
    assert merged(out, tmp_path / "a") == merged(expected, tmp_path / "b")


def test_a_cluster_writes_the_same(llama: Path, expected: Path, tmp_path: Path) -> None:
    """Sources go to workers without what they have computed."""

    class Elsewhere(InProcess):
        def run(self, work: Any, shared: Any, tasks: Any, **options: Any) -> None:
            shared, tasks = pickle.loads(pickle.dumps((shared, tasks)))
            super().run(work, shared, tasks, **options)

    job = shard_job(llama, WISHES["w4a16 g32"], tensor_parallel_size=2)
    shard(job, tmp_path / "out", NoProgress(), executor=Elsewhere())
    assert_same(tmp_path / "out", expected)


def test_from_and_to_stores(llama: Path, expected: Path) -> None:
    from fsspec.implementations.memory import MemoryFileSystem

    from tightfit.sharding.remote.upload import shard_to

    fs = MemoryFileSystem()
    for path in llama.iterdir():
        fs.pipe_file(f"/shard-source/{path.name}", path.read_bytes())
    job = shard_job("memory://shard-source", WISHES["w4a16 g32"], tensor_parallel_size=2)
    counted = counting(job)
    shard_to(job, "memory://shard-out", NoProgress())
    # A rank's file after the other's windows: what they share is not computed for each of them.
    assert sum(counted.values()) <= 1.2 * len(counted)
    for path in expected.glob("*.safetensors"):
        assert fs.cat_file(f"/shard-out/{path.name}") == path.read_bytes()
    fs.rm("/shard-source", recursive=True)
    fs.rm("/shard-out", recursive=True)


def test_what_ranks_could_not_load(llama: Path) -> None:
    """Two KV heads of 64 are one block of 128 rows, and not two halves."""
    with pytest.raises(LayoutError, match=r"the 128 outputs of self_attn\.qkv_proj"):
        shard_job(llama, WISHES["fp8-block"], tensor_parallel_size=2)


def test_by_command(llama: Path, expected: Path, tmp_path: Path) -> None:
    flags = ["--quantize", "w4a16", "--group-size", "32", "-tp", "2"]
    done = tightfit("shard", llama, tmp_path / "out", *flags, "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    planned = json.loads(done.stdout)
    assert planned["quantized"]["scheme"] == "w4a16"
    assert not (tmp_path / "out").exists()
    done = tightfit("shard", llama, tmp_path / "out", *flags)
    assert done.returncode == 0, done.stderr
    assert "quantized: w4a16 g32" in done.stdout
    assert_same(tmp_path / "out", expected)
    sizes = {file["name"]: file["nbytes"] for file in planned["files"]}
    assert sizes == {p.name: p.stat().st_size for p in (tmp_path / "out").glob("*.safetensors")}
    done = tightfit("verify", tmp_path / "out", "--against", llama)
    assert done.returncode == 0, done
    assert "every byte as in its source" in done.stdout


def test_what_vllm_has_no_room_for(tiny_model: Callable[[str], Path]) -> None:
    with pytest.raises(UnsupportedModelError, match="no room for the scales of a quantized cache"):
        shard_job(tiny_model("jamba"), WISHES["int8"], tensor_parallel_size=2)


def test_what_is_sharded_or_quantized_already(expected: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is sharded, and `tightfit quantize` needs a plain"):
        shard_job(expected, WISHES["int8"])
    merged(expected, tmp_path / "merged")
    with pytest.raises(UnsupportedModelError, match="is quantized already"):
        shard_job(tmp_path / "merged", WISHES["int8"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--group-size", "32"], "--group-size 32 without --quantize"),
        (
            ["--quantize", "nvfp4"],
            "nvfp4 needs calibration, and `shard` has no data",
        ),
        (
            ["--quantize", "int8", "--method", "gptq"],
            "--method gptq needs calibration, and `shard` has no data",
        ),
        (["--quantize", "int8", "--method", "foo"], "there is no method 'foo'"),
    ],
)
def test_wrong_flags(flags: list[str], message: str, llama: Path, tmp_path: Path) -> None:
    assert_error(tightfit("shard", llama, tmp_path / "out", *flags), 2, message)
    assert not (tmp_path / "out").exists()


def test_sharding_alone_imports_no_torch(llama: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from tightfit.cli.main import build; "
        "build(['shard'])(sys.argv[1:], standalone_mode=False); "
        "assert 'torch' not in sys.modules"
    )
    command = [sys.executable, "-c", code, "shard", str(llama), str(tmp_path / "out"), "-tp", "2"]
    subprocess.run([*command, "-q"], check=True)


def shard_job(model: Path | str, wish: Wish, method: str = "rtn", **options: Any) -> ShardJob:
    made = quantized(open_checkpoint(str(model)), OnTheWay(wish=wish, method=method))
    return prepare_shards(
        made.checkpoint,
        stored_layout(DEFAULT_LAYOUT),
        max_shard_bytes=options.pop("max_shard_bytes", 10**9),
        bundles=made.bundles,
        quantized=made.document,
        **options,
    )


def job_of(model: Path, **options: Any) -> ShardJob:
    checkpoint = open_checkpoint(str(model))
    layout = stored_layout(DEFAULT_LAYOUT)
    return prepare_shards(checkpoint, layout, max_shard_bytes=10**9, **options)


def write_quantized(model: Path, wish: Wish, out: Path) -> Path:
    write(
        write_job(prepare(open_checkpoint(str(model)), wish), max_shard_bytes=10**9),
        out,
        NoProgress(),
    )
    return out


def counting(job: ShardJob) -> Counter[str]:
    """How often each matrix is computed from now on."""
    source = job.checkpoint.source
    assert isinstance(source, EncodedSource)
    found: Counter[str] = Counter()
    make = source.make

    def counted(unit: Matrix) -> Any:
        found[unit.module] += 1
        return make(unit)

    source.make = counted  # type: ignore[method-assign]
    return found


def assert_same(out: Path, expected: Path) -> None:
    """All files but the manifest, which says where they come from."""
    found, wanted = digests(out), digests(expected)
    assert found.pop(MANIFEST) is not None
    assert wanted.pop(MANIFEST) is not None
    assert found == wanted
