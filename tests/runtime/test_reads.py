import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tightfit.checkpoint.checkpoint import open_checkpoint
from tightfit.model.families import model_spec
from tightfit.model.layout import Parallel
from tightfit.model.parameters import parameters
from tightfit.runtime.loading import reads, uploads
from tightfit.runtime.loading.files import TensorFile
from tightfit.runtime.loading.loader import load_checkpoint
from tightfit.units import MiB

TinyModel = Callable[[str], Path]
CPU = torch.device("cpu")


def whole_file(path: Path, shape: tuple[int, ...]) -> tuple[TensorFile, torch.Tensor]:
    tensor = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)
    save_file({"x": tensor}, path)
    return TensorFile(path), tensor


@pytest.mark.parametrize(
    "shape", [(), (7,), (40, 30), (3, 40, 30), (1, 1, 900), (2, 0, 5)], ids=str
)
def test_chunks_are_small_and_make_up_the_tensor(
    shape: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reads, "CHUNK_BYTES", 1000)
    file, tensor = whole_file(tmp_path / "x.safetensors", shape)
    info = file.tensors["x"]
    target = torch.full(shape, -1.0)
    planned = list(reads.copy(file, info, file.view(info), target))
    assert all(read.nbytes <= 1000 for read in planned)
    assert sum(read.nbytes for read in planned) == info.nbytes
    reads.carry_out(planned, CPU)
    assert torch.equal(target, tensor)
    kept = list(reads.keep(file, info))
    assert sum(read.nbytes for read in kept) == info.nbytes


def test_slices_of_rows_span_what_lies_between_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reads, "CHUNK_BYTES", 1000)
    file, tensor = whole_file(tmp_path / "x.safetensors", (40, 30))
    info = file.tensors["x"]
    target = torch.zeros(40, 10, dtype=torch.bfloat16)
    planned = list(reads.copy(file, info, file.view(info)[:, 10:20], target))
    assert all(40 <= read.nbytes <= 1000 for read in planned)
    assert info.offset + 40 == planned[0].start
    assert planned[-1].stop == info.offset + info.nbytes - 40
    reads.carry_out(planned, CPU)
    assert torch.equal(target, tensor[:, 10:20].bfloat16())


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "gemma2", "olmo2", "llama_mqa"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_size_of_chunks_changes_nothing(
    name: str, dtype: torch.dtype, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(str(tiny_model(name)))
    spec = model_spec(checkpoint.config)
    for rank in Parallel(tensor_parallel_size=2, uneven=True).ranks():
        tensors = tuple(weight.rank_tensor(rank, spec.dtype) for weight in parameters(spec))
        one = load_checkpoint(checkpoint, tensors, dtype=dtype, device=CPU)
        with monkeypatch.context() as patch:
            patch.setattr(reads, "CHUNK_BYTES", 512)
            patch.setattr(reads, "_AHEAD_BYTES", 2000)
            two = load_checkpoint(checkpoint, tensors, dtype=dtype, device=CPU)
        assert one.keys() == two.keys()
        assert all(torch.equal(one[parameter], two[parameter]) for parameter in one)


PROGRAM = """
import json, sys
from pathlib import Path
import torch
from tightfit.runtime.loading import reads
from tightfit.runtime.loading.files import TensorFile
from tightfit.runtime.memory.ledger import CpuLedger
ledger = CpuLedger()
with ledger.phase("the first use of torch"):
    torch.zeros(2**20).add_(1)
with ledger.phase("weights"):
    file = TensorFile(Path(sys.argv[1]))
    kept, copied = file.tensors["kept"], file.tensors["copied"]
    view = file.view(kept)
    target = torch.empty(copied.shape, dtype=torch.float32)
    planned = [*reads.keep(file, kept), *reads.copy(file, copied, file.view(copied), target)]
    reads.carry_out(planned, torch.device("cpu"))
reading = ledger.readings["weights"]
print(json.dumps([reading.kept_bytes, reading.transient_bytes, float(view[5, 5] + target[5, 5])]))
"""


def test_a_copy_needs_little_beyond_what_it_makes(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    one = torch.ones(64, 2**19, dtype=torch.bfloat16)
    save_file({"copied": one, "kept": one.clone()}, path)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(path)], check=True, capture_output=True, text=True
    )
    kept, peak, total = json.loads(done.stdout)
    assert total == 2
    assert kept == pytest.approx((64 + 128) * MiB, abs=2 * MiB)
    assert peak < kept + reads.CHUNK_BYTES + 4 * MiB


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gets_the_same(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reads, "CHUNK_BYTES", 4096)
    checkpoint = open_checkpoint(str(tiny_model("qwen3_moe")))
    spec = model_spec(checkpoint.config)
    for rank in Parallel(tensor_parallel_size=2, uneven=True).ranks():
        tensors = tuple(weight.rank_tensor(rank, spec.dtype) for weight in parameters(spec))
        for dtype in (torch.bfloat16, torch.float32):
            one = load_checkpoint(checkpoint, tensors, dtype=dtype, device=CPU)
            two = load_checkpoint(checkpoint, tensors, dtype=dtype, device=torch.device("cuda", 0))
            assert all(torch.equal(one[name], two[name].cpu()) for name in one)


def test_an_interrupt_ends_uploads_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that read are waited for, so they must be told."""
    done: list[int] = []

    def work(turns: Iterable[int], *_: Any) -> None:
        for number in turns:
            time.sleep(0.01)
            done.append(number)
            if len(done) == 5:
                os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(uploads, "_work", work)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    with pytest.raises(KeyboardInterrupt):
        uploads.upload(range(10_000), torch.device("cuda"), 1)  # type: ignore[arg-type]
    assert len(done) < 1000
