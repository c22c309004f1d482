"""Peak memory of `tightfit quantize` on a model of any size, without the disk for its output.

usage: quantize_memory.py [--layers 33] [--scheme fp8-channel] [--crew 4] [DIRECTORY]
       quantize_memory.py --layers 1 --scheme w4a16 --method gptq --calibration TEXT
                          --tokenizer MODEL [--samples 8] [DIRECTORY]

The source is shaped as a Llama with a hidden size of 8192: as the 70B, which has 80 layers (33 are
60 GB). It is all holes, or random for a method that calibrates. The command runs as it is but for
two things: files are not reserved, and what would be written to them is hashed and thrown away.
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
    parser.add_argument("--method", default="rtn")
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--tokenizer", type=Path, help="a model whose tokenizer to take")
    arguments = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="quantize-", dir=arguments.directory))
    try:
        run(root, arguments)
    finally:
        shutil.rmtree(root)


def random_weights() -> bytes:
    """16 MiB of bfloat16 with a standard deviation of 0.02, as models begin."""
    import torch

    weights = torch.randn(2**23, generator=torch.Generator().manual_seed(0)).mul_(0.02)
    return weights.bfloat16().view(torch.uint8).numpy().tobytes()


def run(root: Path, arguments: argparse.Namespace) -> None:
    from tightfit.cli.main import build
    from tightfit.sharding.stream import crew
    from tightfit.sharding.stream.written import Target

    model = root / "model"
    shape = config(8192, arguments.layers, 128_000)
    command = ["quantize", str(model), str(root / "out"), "--scheme", arguments.scheme]
    command += ["--method", arguments.method]
    if arguments.calibration is None:
        nbytes = write_model(model, shape, sparse=True)
    else:
        nbytes = write_model(model, shape, content=random_weights())
        for file in arguments.tokenizer.glob("tokenizer*"):
            shutil.copy(file, model)
        command += ["--calibration", str(arguments.calibration)]
        command += ["--calibration-samples", str(arguments.samples)]
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
        f"{nbytes / 1e9:.1f} GB, {arguments.scheme} {arguments.method}: {peak:.0f} MiB at most, "
        f"in {seconds:.0f} s ({nbytes / seconds / 1e6:.0f} MB/s)"
    )


if __name__ == "__main__":
    main()
