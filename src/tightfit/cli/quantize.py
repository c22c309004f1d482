"""`tightfit quantize`: fp8, int8, int4 and fp4 checkpoints, without a GPU."""

from typing import Annotated

import typer

from tightfit.checkpoint.checkpoint import open_checkpoint
from tightfit.checkpoint.source import is_remote
from tightfit.cli import options as o
from tightfit.cli.output import guarded, one_line, print_json, progress
from tightfit.errors import UsageError
from tightfit.model.quantization.written import COMPRESSED_TENSORS, FORMATS, SCHEMES, Choice, Wish
from tightfit.units import MiB, format_bytes, parse_bytes


@guarded
def quantize(
    model: o.Model,
    out: Annotated[
        str, typer.Argument(metavar="OUT", help="A new directory, or its URL (s3://...).")
    ],
    scheme: Annotated[
        str, typer.Option(metavar="SCHEME", help=", ".join(SCHEMES), show_default=False)
    ],
    group_size: Annotated[
        int | None,
        typer.Option(help="Inputs that share a scale; -1 for whole rows.", show_default="128"),
    ] = None,
    method: Annotated[
        str, typer.Option(help="How values are chosen: rtn (nearest), mse (least error).")
    ] = "rtn",
    file_format: Annotated[
        str, typer.Option("--format", help="Of the files: " + ", ".join(FORMATS) + ".")
    ] = COMPRESSED_TENSORS,
    ignore: Annotated[
        list[str] | None,
        typer.Option(metavar="REGEX", help="Leave matching modules as they are; repeatable."),
    ] = None,
    max_shard_size: Annotated[
        str, typer.Option(help="Largest file; a larger tensor gets a file of its own.")
    ] = "5GB",
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on after a kill: do what is not proven to be there."),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be written, write nothing.")
    ] = False,
    revision: o.Revision = None,
    quiet: o.Quiet = False,
    as_json: o.Json = False,
) -> None:
    """Quantize a checkpoint tensor by tensor, in bounded memory, without a GPU.

    vLLM and transformers load the result as they load any checkpoint.

    Example: tightfit quantize ./Qwen3-8B ./Qwen3-8B-fp8 --scheme fp8-channel
    """
    size = parse_bytes(max_shard_size)
    if size < MiB:
        raise UsageError(f"--max-shard-size {max_shard_size} is too small", hint="at least 1MiB")
    wish = Wish(
        default=Choice(scheme=scheme, group_size=group_size, format=file_format),
        rules=tuple((pattern, None) for pattern in ignore or ()),
    )
    from tightfit.quantize.job import prepare
    from tightfit.quantize.write import write, write_job

    download = not (dry_run or is_remote(out))
    checkpoint = open_checkpoint(model, revision=revision, download=download)
    job = write_job(prepare(checkpoint, wish, method=method), max_shard_bytes=size)
    if not dry_run:
        with progress(quiet=quiet) as bars:
            write(job, out, bars, resume=resume)
    if as_json:
        print_json({"schema": 1, "output": out, "total_bytes": job.output_bytes})
    elif not quiet:
        print(one_line(f"wrote {format_bytes(job.output_bytes)} to {out}"))
