"""How does loading scale with the tensor parallel size, from rank files and from plain ones?

usage: bench_load.py [--rounds N] [--layers N] [--directory DIR] [--record]

Four ways to the same parameters, bit for bit: rank files of `tightfit shard`; a plain checkpoint,
of which the built-in runtime reads what a rank needs; the same through safetensors' lazy
`safe_open`, as vLLM loads by default; and every file read whole before it is cut, as vLLM's
`--safetensors-load-strategy eager` does, or pickled checkpoints. `read` only reads the rank files
into a small buffer: it is as fast as the disk.

A model of random weights is made in DIR. Each figure is that of processes that were forked for it:
of one rank alone, as on a machine of its own, or of all ranks at once; with an empty page cache, or
with all files in it. Bytes are those that the kernel read from disk for the rank alone.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from load_chart import chart
from measure import record
from safetensors import safe_open
from safetensors.torch import load as load_bytes
from safetensors.torch import save_file

from tightfit.checkpoint.checkpoint import open_checkpoint
from tightfit.model.families import model_spec
from tightfit.model.layout import Parallel, RankTensor
from tightfit.model.parameters import parameters
from tightfit.model.stored import rank_tensors, stored_layout
from tightfit.runtime.loading.loader import load_checkpoint, load_rank_files
from tightfit.runtime.memory.ledger import status_bytes
from tightfit.sharding.manifest import read_manifest

ROOT = Path(__file__).parents[1]
SIZES = (1, 2, 4, 8)
CPU, DTYPE = torch.device("cpu"), torch.bfloat16
WAYS = "sharded", "plain", "lazy", "whole", "read"

Weights = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One way at one size."""

    way: str
    size: int
    alone: bool
    cold: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """What the processes of a cell took: seconds until the last was ready, and the most of one."""

    seconds: float
    disk_bytes: int
    peak_bytes: int
    digests: tuple[str, ...]


def make_model(path: Path, layers: int) -> int:
    """Write a Llama of random weights in several files, and give their bytes."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "vocab_size": 32_768,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 4096,
    }
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    tensors: Weights = {}
    for weight in parameters(model_spec(config)):
        for piece in weight.rank_tensor(Parallel().ranks()[0], "BF16").pieces:
            bits = torch.randint(-(2**14), 2**14, piece.source_shape, dtype=torch.int16)
            tensors[piece.source] = bits.view(DTYPE)
    files: list[Weights] = [{}]
    for name, tensor in tensors.items():
        if sum(one.nbytes for one in files[-1].values()) > 256 * 2**20:
            files.append({})
        files[-1][name] = tensor
    index: dict[str, str] = {}
    for number, file in enumerate(files, 1):
        name = f"model-{number:05}-of-{len(files):05}.safetensors"
        save_file(file, path / name)
        index |= dict.fromkeys(file, name)
    total = sum(tensor.nbytes for tensor in tensors.values())
    (path / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    )
    return total


def cut(parts: Mapping[str, torch.Tensor], expected: Sequence[RankTensor], into: Weights) -> None:
    """Take a rank's share out of whole tensors, as far as they are given."""
    for tensor in expected:
        assert tensor.parameter is not None
        for piece in tensor.pieces:
            if piece.source in parts:
                if tensor.parameter not in into:
                    into[tensor.parameter] = torch.empty(tensor.shape, dtype=DTYPE)
                source, target = parts[piece.source], into[tensor.parameter]
                for i, length in enumerate(piece.shape):
                    source = source.narrow(i, piece.start[i], length)
                    target = target.narrow(i, piece.at[i], length)
                target.copy_(source)


def loader(way: str, plain: Path, shards: Path, size: int, number: int) -> Callable[[], Weights]:
    """What loads one rank's parameters, with all that is known before any weight is read."""
    rank = Parallel(tensor_parallel_size=size).ranks()[number]
    checkpoint = open_checkpoint(str(plain))
    checkpoint.tensors()
    spec = model_spec(checkpoint.config)
    expected = tuple(weight.rank_tensor(rank, "BF16") for weight in parameters(spec))
    manifest = read_manifest(shards)
    stored = rank_tensors(spec, rank, stored_layout(manifest.layout))
    files = [shards / file.name for file in manifest.rank_files(number)]

    def whole() -> Weights:
        weights: Weights = {}
        for path in sorted(plain.glob("*.safetensors")):
            cut(load_bytes(path.read_bytes()), expected, weights)
        return weights

    def lazy() -> Weights:
        weights: Weights = {}
        for path in sorted(plain.glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118
                    cut({name: file.get_tensor(name)}, expected, weights)
        return weights

    def read() -> Weights:
        buffer = bytearray(2**20)
        for path in files:
            with open(path, "rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass
        return {}

    loaders = {
        "sharded": partial(load_rank_files, files, stored, dtype=DTYPE, device=CPU),
        "plain": partial(load_checkpoint, checkpoint, expected, dtype=DTYPE, device=CPU),
        "lazy": lazy,
        "whole": whole,
        "read": read,
    }
    return loaders[way]


def child(task: Callable[[], Weights], threads: int, start: Any, results: Any, number: int) -> None:
    torch.set_num_threads(threads)
    before, disk = status_bytes("VmRSS"), disk_bytes()
    start.wait()
    weights = task()
    results.put((number, disk_bytes() - disk, status_bytes("VmHWM") - before))
    start.wait()
    digest = hashlib.blake2b()
    for name in sorted(weights):
        digest.update(weights[name].contiguous().view(torch.uint8).numpy().data)
    results.put((number, digest.hexdigest()))


def disk_bytes() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


def measure(cell: Cell, plain: Path, shards: Path) -> Loaded:
    files = [*plain.glob("*.safetensors"), *shards.glob("*.safetensors")]
    for path in files:
        with open(path, "rb") as file:
            if cell.cold:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    ranks = 1 if cell.alone else cell.size
    tasks = [loader(cell.way, plain, shards, cell.size, number) for number in range(ranks)]
    context = multiprocessing.get_context("fork")
    start, results = context.Barrier(ranks + 1), context.SimpleQueue()
    threads = max(1, len(os.sched_getaffinity(0)) // ranks)
    children = [
        context.Process(
            target=child,
            args=(task, threads, start, results, number),
        )
        for number, task in enumerate(tasks)
    ]
    for process in children:
        process.start()
    start.wait(timeout=600)
    began = perf_counter()
    figures = [results.get() for _ in children]
    seconds = perf_counter() - began
    start.wait(timeout=600)
    digests = sorted(results.get() for _ in children)
    for process in children:
        process.join()
    return Loaded(
        seconds=seconds,
        disk_bytes=max(disk for _, disk, _ in figures),
        peak_bytes=max(peak for _, _, peak in figures),
        digests=tuple(digest for _, digest in digests),
    )


def cells() -> Iterator[Cell]:
    """Warm follows cold, which has left all that is needed in the page cache."""
    for size in SIZES:
        for alone in (True, False) if size > 1 else (True,):
            for way in WAYS:
                for cold in (True, False):
                    yield Cell(way=way, size=size, alone=alone, cold=cold)


def row(cell: Cell, runs: Mapping[Cell, list[Loaded]], total: int) -> dict[str, Any]:
    base = Cell(way="sharded", size=1, alone=True, cold=cell.cold)
    unit = median(one.seconds for one in runs[base])
    seconds = sorted(one.seconds / unit for one in runs[cell])
    return {
        "way": cell.way,
        "tensor_parallel_size": cell.size,
        "ranks": "one" if cell.alone else "all",
        "cache": "cold" if cell.cold else "warm",
        "times_sharded_tp1_median": round(median(seconds), 3),
        "times_sharded_tp1_spread": [round(seconds[0], 3), round(seconds[-1], 3)],
        "seconds_median": round(unit * median(seconds), 3),
        "disk_share_of_checkpoint": round(median(o.disk_bytes for o in runs[cell]) / total, 3),
        "peak_share_of_checkpoint": round(median(o.peak_bytes for o in runs[cell]) / total, 3),
    }


def compare(directory: Path, rounds: int, layers: int) -> dict[str, Any]:
    plain = directory / "plain"
    # A process of its own: threads of torch here would be missing in what is forked later.
    subprocess.run([sys.executable, __file__, "--make", plain, "--layers", str(layers)], check=True)
    total = sum(path.stat().st_size for path in plain.glob("*.safetensors"))
    for size in SIZES:
        command = [sys.executable, "-m", "tightfit", "shard", plain, directory / f"tp{size}"]
        subprocess.run([*command, "-tp", str(size), "--quiet"], check=True)
    os.sync()
    runs: defaultdict[Cell, list[Loaded]] = defaultdict(list)
    digests: dict[tuple[int, bool], tuple[str, ...]] = {}
    for number in range(rounds):
        for cell in cells():
            loaded = measure(cell, plain, directory / f"tp{cell.size}")
            runs[cell].append(loaded)
            print(f"round {number + 1}: {cell} {loaded.seconds:.2f} s", file=sys.stderr)
            if cell.way != "read":
                expected = digests.setdefault((cell.size, cell.alone), loaded.digests)
                assert loaded.digests == expected, "other bits"
    return {
        "rounds": rounds,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "checkpoint_mib": round(total / 2**20),
        "rows": [row(cell, runs, total) for cell in cells()],
    }


def show(result: Mapping[str, Any]) -> None:
    print("times are multiples of those of `sharded` at TP 1 with the same cache")
    print(f"{'':8} TP ranks cache  time median (spread)        disk   peak memory, of checkpoint")
    for one in result["rows"]:
        low, high = one["times_sharded_tp1_spread"]
        print(
            f"{one['way']:8} {one['tensor_parallel_size']:2} {one['ranks']:5} {one['cache']:5}  "
            f"{one['times_sharded_tp1_median']:8.2f} ({low:6.2f} .. {high:6.2f})  "
            f"{one['disk_share_of_checkpoint']:8.3f}  {one['peak_share_of_checkpoint']:8.3f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=8, help="of the model; 8 are 1.2 GB")
    parser.add_argument(
        "--directory", type=Path, help="on the disk to measure; six times the model"
    )
    parser.add_argument(
        "--record", action="store_true", help="write results/load.json and the chart"
    )
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make:
        make_model(options.make, options.layers)
        return
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        result = compare(Path(directory), options.rounds, options.layers)
    show(result)
    if options.record:
        record("load", result)
        (ROOT / "docs" / "images" / "load.svg").write_text(chart(result))


if __name__ == "__main__":
    main()
