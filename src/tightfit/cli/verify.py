"""`tightfit verify`: is a sharded checkpoint whole, and is it what its source holds?"""

from pathlib import Path
from typing import Annotated

import typer

from tightfit.checkpoint.checkpoint import open_checkpoint
from tightfit.cli import options as o
from tightfit.cli.output import guarded, one_line, print_json, progress
from tightfit.errors import ConfigError, ExitCode
from tightfit.sharding.manifest import read_manifest
from tightfit.sharding.verify import Report, check_tensor_parallel_size, require_manifest
from tightfit.sharding.verify import verify as check
from tightfit.units import format_bytes


@guarded
def verify(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="Output of `tightfit shard`.", show_default=False)
    ],
    against: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help="Compare every byte with this source.", show_default=False
        ),
    ] = None,
    tensor_parallel_size: Annotated[
        int | None,
        typer.Option(
            "--tensor-parallel-size",
            "-tp",
            help="Refuse a checkpoint that was cut for another size.",
            show_default=False,
        ),
    ] = None,
    quiet: o.Quiet = False,
    as_json: o.Json = False,
) -> None:
    """Check names, shapes and checksums, and with --against every byte.

    Example: tightfit verify ./Qwen3-8B-tp2 --against ./Qwen3-8B
    """
    if not directory.is_dir():
        raise ConfigError(f"there is no directory {directory}", hint="check the path")
    require_manifest(directory)
    check_tensor_parallel_size(read_manifest(directory), tensor_parallel_size, str(directory))
    config = open_checkpoint(str(directory)).config
    source = None if against is None else open_checkpoint(against, download=True)
    with progress(quiet=quiet) as bars:
        report = check(directory, config, bars, source)
    if as_json:
        print_json(_document(directory, report))
    else:
        _show(directory, report)
    if not report.ok:
        raise typer.Exit(ExitCode.FINDING)


def _document(directory: Path, report: Report) -> dict[str, object]:
    return {
        "schema": 1,
        "directory": str(directory),
        "ok": report.ok,
        "layout": report.manifest.layout,
        "tensor_parallel_size": report.manifest.tensor_parallel_size,
        "tensors": report.tensors,
        "total_bytes": report.nbytes,
        "compared_with_source": report.compared_with_source,
        "problems": list(report.problems),
    }


def _show(directory: Path, report: Report) -> None:
    for problem in report.problems:
        print(f"problem: {one_line(problem)}")
    manifest = report.manifest
    if report.ok:
        compared = ", every byte as in its source" if report.compared_with_source else ""
        print(
            f"verified: {directory} is whole: {len(manifest.files)} files, {report.tensors:,} "
            f"tensors, {format_bytes(report.nbytes)}, for tensor parallel size "
            f"{manifest.tensor_parallel_size} in layout {manifest.layout}{compared}"
        )
    else:
        count = len(report.problems)
        print(f"verification failed: {count} problem{'s' if count > 1 else ''} in {directory}")
