"""Peak memory of `tightfit quantize` on a model of any size, without the disk for its output.

usage: quantize_memory.py [--layers 33] [--scheme fp8-channel] [--crew 4] [DIRECTORY]

The source is all holes, shaped as a Llama with a hidden size of 8192 (33 layers are 60 GB). The
command runs as it is but for two things: files are not reserved, and what would be written to them
is hashed and thrown away.
"""

import argparse
import os
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

from bench_shard import ROOT, config, write_model

sys.path.insert(0, str(ROOT / "src"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("directory", nargs="?", type=Path)
    parser.add_argument("--layers", type=int, default=33)
    parser.add_argument("--scheme", default="fp8-channel")
    parser.add_argument("--crew", type=int, help="threads, else by processors")
    arguments = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="quantize-", dir=arguments.directory))
    try:
        run(root, arguments)
    finally:
        shutil.rmtree(root)


def run(root: Path, arguments: argparse.Namespace) -> None:
    from tightfit.cli.main import build
    from tightfit.sharding.stream import crew
    from tightfit.sharding.stream.written import Target

    nbytes = write_model(root / "model", config(8192, arguments.layers, 128_000), sparse=True)
    command = ["quantize", str(root / "model"), str(root / "out"), "--scheme", arguments.scheme]
    started = time.monotonic()
    with (
        mock.patch("tightfit.sharding.output.reserve", os.ftruncate),
        mock.patch("tightfit.sharding.shard.check_free_space"),
        mock.patch.object(Target, "write"),
        mock.patch.object(crew, "_MOST", arguments.crew or 8),
        mock.patch.object(crew, "_FEWEST", arguments.crew or 4),
    ):
        build(command)(command, standalone_mode=False)
    seconds = time.monotonic() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"{nbytes / 1e9:.1f} GB, {arguments.scheme}: {peak:.0f} MiB at most, in {seconds:.0f} s "
        f"({nbytes / seconds / 1e6:.0f} MB/s)"
    )


if __name__ == "__main__":
    main()
