"""How a checkpoint is written: of `shard`, `merge` and `quantize`."""

from typing import Annotated

import typer

from tightfit.errors import UsageError
from tightfit.executors import EXECUTORS
from tightfit.units import MiB, parse_bytes

Out = Annotated[str, typer.Argument(metavar="OUT", help="A new directory, or its URL (s3://...).")]
MaxShardSize = Annotated[
    str, typer.Option(help="Largest file; a larger tensor gets a file of its own.")
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on after a kill: do what is not proven to be there.")
]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Say what would be written or refused, write nothing."),
]
ExecutorName = Annotated[
    str,
    typer.Option(metavar="|".join(EXECUTORS), help="Where the work is done; see --ray-address."),
]
RayAddress = Annotated[
    str | None,
    typer.Option(
        metavar="HOST:PORT",
        help="Cluster for --executor ray; else RAY_ADDRESS, one that runs here, or a new one. "
        "All its machines need MODEL and OUT under the same paths.",
        show_default=False,
    ),
]


def check_out(out: str) -> None:
    """Refuse what would be the current directory, and is nobody's wish.

    Raises:
        UsageError: there is no name.
    """
    if not out:
        raise UsageError("the output is an empty string", hint="give a new directory, or its URL")


def shard_bytes(max_shard_size: str) -> int:
    """The bytes of `--max-shard-size`.

    Raises:
        UsageError: it is no size, or too small.
    """
    size = parse_bytes(max_shard_size)
    if size < MiB:
        raise UsageError(f"--max-shard-size {max_shard_size} is too small", hint="at least 1MiB")
    return size
