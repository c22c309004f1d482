"""Kill `shard`, `merge` or `quantize` with -9 at random moments, resume, and compare the bytes.

usage: kill_and_resume.py [--kills 50] [--gigabytes 1.3] [--command shard|merge|quantize]
                          [--scheme fp8-channel] [DIRECTORY]

Each round starts the command anew and kills it once, at a moment drawn from the time in which an
undisturbed run has its output directory; every third round is killed again while it goes on. What
is there after a kill must not verify nor load, and after --resume has to be the undisturbed output,
file by file.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from math import prod
from pathlib import Path

import xxhash

from tightfit.checkpoint.header import encode_header
from tightfit.model.families import model_spec
from tightfit.model.sources import source_shapes

_LAYER_GB = 0.0865
_FINITE = bytes((byte & 0xBF) for byte in range(256))


def write_model(directory: Path, gigabytes: float) -> Path:
    """A Llama of random bytes."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "num_hidden_layers": max(1, round((gigabytes - 0.26) / _LAYER_GB)),
        "vocab_size": 32_000,
    }
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    shapes = source_shapes(model_spec(config))
    header = encode_header([(n, "BF16", shape, 2 * prod(shape)) for n, shape in shapes.items()])
    with open(directory / "model.safetensors", "wb") as file:
        file.write(header)
        for shape in shapes.values():
            # No exponent of these is that of NaN and infinity.
            noise = bytearray(os.urandom(2 * prod(shape)))
            noise[1::2] = bytes(noise[1::2]).translate(_FINITE)
            file.write(noise)
    return directory


def digests(directory: Path) -> dict[str, str]:
    found = {}
    for path in directory.iterdir():
        digest = xxhash.xxh3_128()
        with open(path, "rb") as file:
            while data := file.read(2**20):
                digest.update(data)
        found[path.name] = digest.hexdigest()
    return found


def start(command: list[str]) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, "-m", "tightfit", *command],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def finish(command: list[str]) -> float:
    """Seconds from when its output directory was there."""
    process = start(command)
    started = appeared(process, Path(command[2]))
    _, errors = process.communicate()
    if process.returncode:
        sys.exit(f"{command}: {process.returncode} {errors.decode()}")
    return time.monotonic() - started


def appeared(process: "subprocess.Popen[bytes]", out: Path) -> float:
    """When the output directory was there, or the process at its end."""
    while not out.exists() and process.poll() is None:
        time.sleep(0.001)
    return time.monotonic()


def kill(command: list[str], after: float) -> bool:
    """Whether it was still running."""
    process = start(command)
    appeared(process, Path(command[2]))
    try:
        process.wait(after)
    except subprocess.TimeoutExpired:
        process.kill()
    process.communicate()
    return process.returncode == -9


def state(out: Path) -> str:
    """How far it was."""
    if not out.exists():
        return "nothing yet"
    names = {path.name for path in out.iterdir()}
    if any(name.endswith(".safetensors.partial") for name in names):
        noted = sum(path.read_bytes().count(b"\n[") for path in out.glob("*.journal"))
        return "copying" if noted else "files reserved"
    return "names given" if any(n.endswith(".safetensors") for n in names) else "begun"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("directory", nargs="?", type=Path)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--gigabytes", type=float, default=1.3)
    parser.add_argument("--command", choices=("shard", "merge", "quantize"), default="shard")
    parser.add_argument("--scheme", default="fp8-channel", help="of quantize")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="kills-", dir=arguments.directory))
    try:
        run(root, arguments)
    finally:
        shutil.rmtree(root)


def run(root: Path, arguments: argparse.Namespace) -> None:
    generator = random.Random(arguments.seed)
    source = write_model(root / "model", arguments.gigabytes)
    if arguments.command == "merge":
        finish(["shard", str(source), str(root / "shards"), "-tp", "2", "-q"])
        source = root / "shards"
    options = {"shard": ["-tp", "2"], "merge": [], "quantize": ["--scheme", arguments.scheme]}
    common = [*options[arguments.command], "--max-shard-size", "300MB", "-q"]
    whole, out = root / "whole", root / "out"
    seconds = finish([arguments.command, str(source), str(whole), *common])
    expected = digests(whole)
    command = [arguments.command, str(source), str(out), *common]
    states: Counter[str] = Counter()
    killed = resumed = 0.0
    deadline = time.monotonic()
    for number in range(arguments.kills):
        after = generator.uniform(0, seconds)
        if not kill(command, after):
            states["ended before"] += 1
        else:
            states[state(out)] += 1
            looks = out / (
                "tightfit-manifest.json" if arguments.command == "shard" else "config.json"
            )
            if looks.exists() and {*digests(out)} >= {*expected} and digests(out) != expected:
                # A plain checkpoint whose journal is still there is whole already.
                found = {n: d for n, d in digests(out).items() if not n.endswith(".journal")}
                assert found == expected, "looks whole, and is not"
        if number % 3 == 2:
            kill([*command, "--resume"], generator.uniform(0, seconds))
        took = finish([*command, "--resume"])
        assert digests(out) == expected, f"kill {number} after {after:.3f} s"
        killed += after
        resumed += took
        shutil.rmtree(out)
    size = sum(path.stat().st_size for path in whole.iterdir())
    print(
        f"{arguments.command} of {size / 1e9:.2f} GB, {seconds:.1f} s undisturbed: "
        f"{arguments.kills} kills in {time.monotonic() - deadline:.0f} s, all identical after "
        f"--resume; killed on average after {killed / arguments.kills:.1f} s, resumed in "
        f"{resumed / arguments.kills:.1f} s"
    )
    print(", ".join(f"{name}: {count}" for name, count in states.most_common()))


if __name__ == "__main__":
    main()
