"""`verify --load vllm`: what is said when vLLM loads, refuses, computes nothing, hangs or dies.

A package that calls itself vLLM stands for it here; `tests/vllm` asks the real one.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from support.cli import assert_error, tightfit
from support.work import write_shards
from tightfit.errors import UsageError, VerificationError
from tightfit.sharding.manifest import read_manifest
from tightfit.sharding.proof.vllm_load import Loaded, load_in_vllm

TinyModel = Callable[[str], Path]

PACKAGE = {
    "version.py": "import os\n__version__ = os.environ.get('FAKE_VERSION', '0.32.0+cpu')\n",
    "platforms.py": """
import os
class current_platform:
    device_type = os.environ.get("FAKE_DEVICE", "cpu")
    is_cpu = staticmethod(lambda: current_platform.device_type == "cpu")
""",
    "__init__.py": """
import json, os, sys, time
from types import SimpleNamespace
print("INFO: the engine talks")

class SamplingParams:
    def __init__(self, **options):
        self.options = options

class LLM:
    def __init__(self, **options):
        rank = os.environ.get("RANK", "0")
        with open(os.environ["FAKE_LOG"] + rank, "w") as file:
            json.dump([options, os.environ.get("WORLD_SIZE")], file)
        what = os.environ.get("FAKE_VLLM", "")
        if what == "missing":
            raise ValueError("Missing keys ('a', 'b') in loaded state!")
        if what == "one rank" and rank == "1":
            raise KeyError("foo")
        if what == "one rank":
            time.sleep(600)
        if what == "worker":
            print("(Worker pid=7) ERROR 11-23 KeyError: 'model.norm.weight'", flush=True)
            raise RuntimeError("Engine core initialization failed. See root cause above.")
        if what == "long":
            raise ValueError("x" * 2**20)
        if what == "daemon":
            # It leaves the process group, and keeps every descriptor.
            if not os.fork():
                os.setsid()
                os.closerange(0, 3)
                time.sleep(20)
                os._exit(0)
        if what == "shm":
            from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed
            path = "/dev/shm/" + _CPUSHMDistributed.make_group_name(None)
            open(os.environ["FAKE_OTHER"], "w").close()
            open(path, "w").close()
            with open(os.environ["FAKE_LOG"] + "-shm", "w") as file:
                file.write(path)
        if what == "hang":
            time.sleep(600)
        if what == "killed":
            os.kill(os.getpid(), 9)

    def generate(self, prompts, sampling, use_tqdm):
        nan = os.environ.get("FAKE_VLLM") == "nan"
        first = SimpleNamespace(token_ids=[4, 5], cumulative_logprob=float("nan") if nan else -1.0)
        return [SimpleNamespace(outputs=[first])]
""",
    "model_executor/models/registry.py": "_run_in_subprocess = None\n",
    "v1/engine/llm_engine.py": "",
    "v1/worker/cpu_worker.py": "",
}


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where its ranks write down what they were asked."""
    for name, text in PACKAGE.items():
        path = tmp_path / "site" / "vllm" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    paths = [str(tmp_path / "site"), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    monkeypatch.setenv("FAKE_LOG", str(tmp_path / "asked"))
    monkeypatch.setenv("TIGHTFIT_VLLM_PYTHON", sys.executable)
    return tmp_path / "asked"


@pytest.fixture(scope="module")
def made(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    root = tmp_path_factory.mktemp("load")

    def make(size: int, layout: str = "vllm-0.32") -> Path:
        out = root / f"{layout}-tp{size}"
        if not out.exists():
            write_shards(tiny_model("llama"), out, size, layout=layout)
        return out

    return make


def load(
    directory: Path,
    *,
    python: str | None = None,
    seconds: float = 60,
    lines: list[str] | None = None,
) -> Loaded:
    heard = [] if lines is None else lines
    return load_in_vllm(
        directory,
        read_manifest(directory),
        python=python,
        timeout_seconds=seconds,
        on_line=heard.append,
    )


@pytest.mark.parametrize("size", [1, 2, 4])
def test_loaded(size: int, fake: Path, made: Callable[..., Path]) -> None:
    lines: list[str] = []
    found = load(made(size), lines=lines)
    assert (found.version, found.device, found.ranks) == ("0.32.0+cpu", "cpu", size)
    assert found.tokens == (4, 5)
    assert "INFO: the engine talks" in lines
    for rank in range(size):
        options, world = json.loads(Path(f"{fake}{rank}").read_bytes())
        assert options["model"] == str(made(size))
        assert options["load_format"] == "sharded_state"
        assert options["tensor_parallel_size"] == size
        assert world == (str(size) if size > 1 else None)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("missing", "ValueError: Missing keys ('a', 'b') in loaded state!"),
        ("worker", "KeyError: 'model.norm.weight'"),
        ("killed", "its process ended with SIGKILL"),
    ],
)
def test_not_loaded(
    what: str,
    message: str,
    fake: Path,
    made: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FAKE_VLLM", what)
    with pytest.raises(VerificationError) as e:
        load(made(1))
    version = " 0.32.0+cpu" if what != "killed" else ""
    assert e.value.message == f"vLLM{version} does not load {made(1)}: {message}"


def test_long_error(fake: Path, made: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipe takes 64 KiB, and is read when the child has ended."""
    monkeypatch.setenv("FAKE_VLLM", "long")
    with pytest.raises(VerificationError, match="ValueError: xxx") as e:
        load(made(1), seconds=30)
    assert len(e.value.message) < 5000


def test_descendant_that_stays(
    fake: Path, made: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It holds the pipe open; the answer has come all the same."""
    monkeypatch.setenv("FAKE_VLLM", "daemon")
    started = time.monotonic()
    assert load(made(1), seconds=60).tokens == (4, 5)
    assert time.monotonic() - started < 15


def test_shared_memory_of_another_vllm(
    fake: Path, made: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only what bears our own name is removed; another vLLM may begin meanwhile."""
    communicator = fake.parent / "site/vllm/distributed/device_communicators/cpu_communicator.py"
    communicator.parent.mkdir(parents=True)
    communicator.write_text(
        "class _CPUSHMDistributed:\n"
        "    @staticmethod\n"
        "    def make_group_name(communicator):\n"
        "        return '//-tp:0-[0-1]-cpushm'\n"
    )
    monkeypatch.setenv("FAKE_VLLM", "shm")
    other = Path(f"/dev/shm/another-{os.getpid()}-cpushm_0")
    monkeypatch.setenv("FAKE_OTHER", str(other))
    try:
        assert load(made(2)).ranks == 2
        assert other.exists()
        ours = Path(f"{fake}-shm").read_text()
        assert ours.startswith("/dev/shm/tightfit-")
        assert ours.endswith("--tp:0-[0-1]-cpushm")
        assert not Path(ours).exists()
    finally:
        other.unlink(missing_ok=True)


def test_one_rank_fails(
    fake: Path, made: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others would wait for it."""
    monkeypatch.setenv("FAKE_VLLM", "one rank")
    with pytest.raises(VerificationError) as e:
        load(made(2))
    assert e.value.message.endswith(": KeyError: 'foo'")


def test_no_numbers(fake: Path, made: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_VLLM", "nan")
    with pytest.raises(VerificationError, match="computes no numbers"):
        load(made(1))


@pytest.mark.parametrize("size", [1, 2])
def test_time_is_limited(
    size: int, fake: Path, made: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_VLLM", "hang")
    started = time.monotonic()
    with pytest.raises(VerificationError) as e:
        load(made(size), seconds=3)
    assert time.monotonic() - started < 30
    assert e.value.message == f"vLLM had not loaded {made(size)} after 3 s"


def test_versions(fake: Path, made: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    for version in ("0.31.1", "0.34.0", "1.0"):
        monkeypatch.setenv("FAKE_VERSION", version)
        with pytest.raises(UsageError) as e:
            load(made(1))
        assert e.value.message == (
            f"layout vllm-0.32 is for vLLM 0.32 to 0.33, and {sys.executable} has {version}"
        )
    monkeypatch.setenv("FAKE_VERSION", "0.33.0rc1")
    assert load(made(1)).version == "0.33.0rc1"


def test_devices(fake: Path, made: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    (fake.parent / "site" / "torch.py").write_text(
        "class accelerator:\n    device_count = staticmethod(lambda: 2)\n"
    )
    monkeypatch.setenv("FAKE_DEVICE", "cuda")
    assert load(made(2)).device == "cuda"
    with pytest.raises(UsageError) as e:
        load(made(4))
    assert e.value.message == "4 ranks need 4 devices, and vLLM sees 2 (cuda)"


def test_no_vllm(made: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TIGHTFIT_VLLM_PYTHON", raising=False)
    with pytest.raises(UsageError, match="vLLM is not installed in this environment"):
        load(made(1))
    with pytest.raises(UsageError, match="has no vLLM"):
        load(made(1), python=sys.executable)
    with pytest.raises(UsageError, match="--python /nowhere/python is not an executable file"):
        load(made(1), python="/nowhere/python")
    with pytest.raises(UsageError, match="layout builtin is not for vLLM"):
        load(made(1, "builtin"), python=sys.executable)


def test_command(fake: Path, made: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    done = tightfit("verify", made(2), "--load", "vllm")
    assert done.returncode == 0, done
    whole, loaded = done.stdout.splitlines()
    assert whole.startswith("verified: ")
    assert loaded.startswith("loaded: vLLM 0.32.0+cpu (cpu, 2 ranks) took ")
    assert loaded.endswith(", and generated 2 tokens: 4 5")
    assert "INFO: the engine talks" in done.stderr
    done = tightfit("verify", made(2), "--load", "vllm", "--quiet", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["loaded"]["tokens"] == [4, 5]
    monkeypatch.setenv("FAKE_VLLM", "missing")
    done = tightfit("verify", made(1), "--load", "vllm", "--quiet", "--json")
    assert done.returncode == 1
    document = json.loads(done.stdout)
    assert (document["ok"], document["loaded"]) == (False, None)
    assert "Missing keys" in document["load_error"]
    assert_error(tightfit("verify", made(1), "--load", "sglang"), 2, "unknown engine 'sglang'")
