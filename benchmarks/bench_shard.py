"""What `tightfit shard` takes, beside `cp -r` of the same bytes and beside torch.

Each round runs every candidate once, on the same source and to a new directory on the same disk,
once with the source in the page cache and once without. Nothing of an earlier run is left to be
written when a timer starts. `cp -r` leaves its copy in memory, to be written some time, and `shard`
has all of it on disk when it ends, so both are given: `cp -r`, and `cp -r` and a sync.

The naive way loads the checkpoint with safetensors, cuts tensors with torch and saves each rank
with `save_file`: nothing is checked, and nothing need be on disk at its end.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from measure import observe, record, with_bytecode

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "src"))

from tightfit.checkpoint.header import encode_header  # noqa: E402
from tightfit.model.families import model_spec  # noqa: E402
from tightfit.model.sources import source_shapes  # noqa: E402

CP, SYNCED, NAIVE = "cp -r", "cp -r, then sync", "safetensors and torch"

_NAIVE = """
import json, sys
from pathlib import Path
from safetensors import safe_open
from safetensors.torch import save_file
source, out, size = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
tensors = {}
for path in sorted(source.glob("*.safetensors")):
    with safe_open(path, "pt") as file:
        for name in file.keys():
            tensors[name] = file.get_tensor(name)
out.mkdir()
inputs = ("o_proj.weight", "down_proj.weight")
for rank in range(size):
    held = {}
    for name, tensor in tensors.items():
        if name.endswith("norm.weight"):
            held[name] = tensor
        else:
            held[name] = tensor.chunk(size, int(name.endswith(inputs)))[rank].contiguous()
    save_file(held, out / f"model-rank-{rank}-part-0.safetensors")
"""


def config(hidden: int, layers: int, vocabulary: int) -> dict[str, Any]:
    """A Llama whose heads, intermediate size and vocabulary divide by 8."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_size": hidden,
        "intermediate_size": 7 * hidden // 2,
        "num_attention_heads": hidden // 128,
        "num_key_value_heads": 8,
        "num_hidden_layers": layers,
        "vocab_size": vocabulary,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    }


def write_model(
    directory: Path,
    document: Mapping[str, Any],
    *,
    sparse: bool = False,
    content: bytes | None = None,
    file_bytes: int = 2 * 10**9,
) -> int:
    """A checkpoint of random bytes, of `content` again and again, or of holes.

    Returns the bytes of its weights.
    """
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(document))
    shapes = source_shapes(model_spec(document))
    sizes = {name: 2 * shape[0] * (shape[1:] or (1,))[0] for name, shape in shapes.items()}
    files: list[list[str]] = [[]]
    room = file_bytes
    for name, size in sizes.items():
        if size > room and files[-1]:
            files.append([])
            room = file_bytes
        files[-1].append(name)
        room -= size
    weight_map = {}
    noise = memoryview(content or os.urandom(2**24))
    for number, names in enumerate(files):
        path = directory / f"model-{number + 1:05}-of-{len(files):05}.safetensors"
        weight_map |= dict.fromkeys(names, path.name)
        left = sum(sizes[name] for name in names)
        with open(path, "wb") as file:
            file.write(encode_header([(name, "BF16", shapes[name], sizes[name]) for name in names]))
            if sparse:
                file.truncate(file.tell() + left)
            while not sparse and left:
                left -= file.write(noise[: min(left, len(noise))])
            file.flush()
            os.fsync(file.fileno())
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return sum(sizes.values())


def set_cache(directory: Path, *, warm: bool) -> None:
    """Bring the files of a directory into the page cache, or out of it."""
    buffer = bytearray(2**22)
    for path in directory.iterdir():
        fd = os.open(path, os.O_RDONLY)
        try:
            if not warm:
                os.fsync(fd)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            while warm and os.readv(fd, [buffer]):
                pass
        finally:
            os.close(fd)


def sync_files(directory: Path) -> None:
    """Bring a copy to disk: `sync FILE...` does the same."""
    for path in directory.iterdir():
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


def shard(source: Path, out: Path, size: int, *options: str) -> list[str]:
    command = [sys.executable, "-m", "tightfit", "shard", str(source), str(out)]
    return [*command, "-tp", str(size), "--json", *options]


def compare(source: Path, work: Path, sizes: Sequence[int], rounds: int) -> dict[str, Any]:
    """Seconds of every candidate, round by round."""
    out = work / "out"

    def run(command: Sequence[str]) -> None:
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)

    def naive(size: int) -> Callable[[], None]:
        return lambda: run([sys.executable, "-c", _NAIVE, str(source), str(out), str(size)])

    candidates: dict[str, Callable[[], None]] = {
        CP: lambda: run(["cp", "-r", str(source), str(out)])
    }
    for size in sizes:
        candidates[f"tightfit shard -tp {size}"] = lambda size=size: run(shard(source, out, size))
        candidates[f"{NAIVE}, {size} ranks"] = naive(size)
    environment = with_bytecode(os.environ, work / "bytecode")
    environment["PYTHONPATH"] = str(ROOT / "src")
    run([sys.executable, "-m", "tightfit", "shard", "--help"])
    seconds: dict[str, dict[str, list[float]]] = {"warm": {}, "cold": {}}
    for number in range(rounds):
        # Who begins changes, so that nobody always runs after the same other.
        first = number % len(candidates)
        order = [*candidates.items()][first:] + [*candidates.items()][:first]
        for state, found in seconds.items():
            for name, candidate in order:
                set_cache(source, warm=state == "warm")
                os.sync()
                start = time.perf_counter()
                candidate()
                found.setdefault(name, []).append(time.perf_counter() - start)
                if name == CP:
                    sync_files(out)
                    found.setdefault(SYNCED, []).append(time.perf_counter() - start)
                shutil.rmtree(out)
                print(f"{state} {name}: {found[name][-1]:.2f} s", file=sys.stderr, flush=True)
    return {state: ratios(found) for state, found in seconds.items()}


def ratios(seconds: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Throughput as a share of that of both copies: median of rounds, lowest and highest."""
    rows = {}
    for name, mine in seconds.items():
        row = {}
        for base in (CP, SYNCED):
            shares = sorted(b / m for b, m in zip(seconds[base], mine, strict=True))
            row[f"of {base}"] = [round(v, 2) for v in (median(shares), shares[0], shares[-1])]
        rows[name] = row
    return rows


def memory(work: Path, size: int) -> dict[str, Any]:
    """Peak memory while two ranks of a model of 60 GB are written, whose source is all holes."""
    source, out = work / "holes", work / "ranks"
    nbytes = write_model(source, config(8192, 33, 128_000), sparse=True)
    environment = dict(os.environ) | {"PYTHONPATH": str(ROOT / "src")}
    command = shard(source, out, size, "--ranks", f"0,{size - 1}")
    done = observe(command, environment, timeout=3600)
    if done.returncode:
        raise SystemExit(done.stderr)
    written = sum(path.stat().st_size for path in out.iterdir())
    shutil.rmtree(out)
    shutil.rmtree(source)
    return {
        "source_bytes": nbytes,
        "written_bytes": written,
        "ranks": f"0 and {size - 1} of {size}",
        "peak_rss_mib": round(done.peak_rss_bytes / 2**20),
    }


def table(result: Mapping[str, Any]) -> str:
    lines = []
    for state in ("warm", "cold"):
        lines += [f"### {state} page cache, throughput: median (lowest .. highest)", ""]
        lines += [f"| | of `{CP}` | of `{SYNCED}` |", "|---|---|---|"]
        for name, row in result[state].items():
            cells = (f"{m} ({low} .. {high})" for m, low, high in row.values())
            lines.append(f"| {name} | {' | '.join(cells)} |")
        lines.append("")
    if found := result.get("memory"):
        lines.append(
            f"Peak resident memory, ranks {found['ranks']} of "
            f"{found['source_bytes'] / 1e9:.0f} GB: {found['peak_rss_mib']} MiB."
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=8, help="of 436 MB each; more is larger")
    parser.add_argument("--sizes", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--directory", help="on the disk to measure; the default is for temporary")
    parser.add_argument("--memory", action="store_true", help="60 GB of holes as well")
    parser.add_argument("--record", action="store_true", help="write the result to results/")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.directory) as place:
        work, source = Path(place), Path(place) / "model"
        nbytes = write_model(source, config(4096, options.layers, 64_000))
        result: dict[str, Any] = {"source_bytes": nbytes, "cores": os.cpu_count()}
        result |= {"rounds": options.rounds}
        result |= compare(source, work, options.sizes, options.rounds)
        shutil.rmtree(source)
        if options.memory:
            result["memory"] = memory(work, 16)
    print(table(result), end="")
    if options.record:
        record("shard", result)
        Path(__file__).with_name("results").joinpath("shard.md").write_text(table(result))


if __name__ == "__main__":
    main()
