"""`tightfit verify`: is a sharded or quantized checkpoint whole, and what its source gives?"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer

from tightfit.checkpoint.checkpoint import Checkpoint, open_checkpoint
from tightfit.checkpoint.files import MANIFEST, find_weights
from tightfit.checkpoint.source import Source, is_remote, local_path_of, open_source
from tightfit.cli import options as o
from tightfit.cli.output import guarded, note, one_line, print_json, progress
from tightfit.errors import CheckpointError, ExitCode, UsageError, VerificationError
from tightfit.quantize.manifest import NAME as QUANTIZED
from tightfit.sharding.manifest import read_manifest
from tightfit.sharding.proof.verify import Report, check_tensor_parallel_size, require_manifest
from tightfit.sharding.proof.verify import verify as check
from tightfit.sharding.proof.vllm_load import PYTHON_VARIABLE, Loaded, load_in_vllm
from tightfit.units import format_bytes

_LOADING = "Loading"
_MOST_PROBLEMS = 20
"""That are printed: a wrong source differs in every tensor."""


@guarded
def verify(
    directory: Annotated[
        str,
        typer.Argument(
            metavar="DIR",
            help="Output of `tightfit shard` or `quantize`, or its URL.",
            show_default=False,
        ),
    ],
    against: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Compare every byte with this source, or with what quantizing it gives.",
            show_default=False,
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
    load: Annotated[
        str | None,
        typer.Option(
            metavar="vllm",
            help="Load it in a real vLLM too, and generate a few tokens.",
            rich_help_panel=_LOADING,
            show_default=False,
        ),
    ] = None,
    python: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help=f"Interpreter of vLLM's environment; else {PYTHON_VARIABLE}, or this one.",
            rich_help_panel=_LOADING,
            show_default=False,
        ),
    ] = None,
    load_timeout: Annotated[
        float, typer.Option(help="Seconds that vLLM may take.", rich_help_panel=_LOADING)
    ] = 1800,
    quiet: o.Quiet = False,
    as_json: o.Json = False,
) -> None:
    """Check names, shapes and checksums, with --against every byte, with --load that vLLM loads it.

    Example: tightfit verify ./Qwen3-8B-tp2 --against ./Qwen3-8B
    """
    if load not in (None, "vllm"):
        raise UsageError(f"unknown engine {load!r}", hint="--load vllm")
    if load is not None and is_remote(directory):
        raise UsageError(
            f"--load {load} needs the files of {directory} here", hint="download them first"
        )
    if not load_timeout > 0:
        raise UsageError(f"--load-timeout {load_timeout} is out of range", hint="seconds")
    place = open_source(directory)
    if place.exists(QUANTIZED):
        if load is not None or tensor_parallel_size is not None:
            flag = "--tensor-parallel-size" if load is None else "--load"
            raise UsageError(
                f"{directory} is quantized, and not sharded: {flag} does not apply",
                hint=f"leave it out; `vllm serve {directory}` loads it",
            )
        _verify_quantized(place, directory, against, quiet=quiet, as_json=as_json)
        return
    if (
        against is not None
        and load is None
        and tensor_parallel_size is None
        and not place.exists(MANIFEST)
        and find_weights(place).files
    ):
        _verify_plain(directory, against, quiet=quiet, as_json=as_json)
        return
    require_manifest(place)
    manifest = read_manifest(place)
    check_tensor_parallel_size(manifest, tensor_parallel_size, directory)
    config = open_checkpoint(directory).config
    source = None if against is None else _open_source(against, directory, config)
    if source is not None and manifest.quantized and "quantization_config" not in source.config:
        from tightfit.cli.shard_quantized import again

        source = again(source, manifest.quantized, f"the manifest of {directory}")
    with progress(quiet=quiet) as bars:
        report = check(place, config, bars, source)
    loaded: Loaded | None = None
    failure: VerificationError | None = None
    if load is not None and report.ok:
        try:
            loaded = load_in_vllm(
                local_path_of(directory),
                manifest,
                python=python,
                timeout_seconds=load_timeout,
                on_line=(lambda _: None) if quiet else note,
            )
        except VerificationError as error:
            failure = error
    if as_json:
        document = _document(directory, report)
        if load is not None:
            document |= {
                "ok": report.ok and loaded is not None,
                "loaded": None if loaded is None else loaded.to_json(),
                "load_error": None if failure is None else failure.message,
            }
        print_json(document)
    else:
        _show(directory, report, asked_to_load=load is not None)
        if loaded is not None:
            print(one_line(_said(loaded)))
    if failure is not None:
        raise failure
    if not report.ok:
        raise typer.Exit(ExitCode.FINDING)


def _verify_quantized(
    place: Source, directory: str, against: str | None, *, quiet: bool, as_json: bool
) -> None:
    from tightfit.quantize.verify import verify as check_quantized

    with progress(quiet=quiet) as bars:
        report = check_quantized(place, bars, against)
    if as_json:
        print_json(report.to_json(directory))
    else:
        _show_problems(directory, report.problems)
    if not report.ok:
        if against is not None and not as_json:
            print(one_line(f"{directory} was quantized from {report.manifest.source_name}"))
        raise typer.Exit(ExitCode.FINDING)
    if not as_json:
        compared = ", every byte as its source gives it" if report.compared_with_source else ""
        print(
            one_line(
                f"verified: {directory} is whole: {report.tensors:,} tensors, "
                f"{format_bytes(report.nbytes)}, quantized from {report.manifest.source_name} by "
                f"{report.manifest.method}{compared}"
            )
        )


def _verify_plain(directory: str, against: str, *, quiet: bool, as_json: bool) -> None:
    from tightfit.sharding.proof.plain import verify_plain

    checkpoint = open_checkpoint(directory)
    source = _open_source(against, directory, checkpoint.config)
    with progress(quiet=quiet) as bars:
        report = verify_plain(checkpoint, source, bars)
    if as_json:
        print_json(report.to_json(directory))
    else:
        _show_problems(directory, report.problems)
    if report.problems:
        raise typer.Exit(ExitCode.FINDING)
    if not as_json:
        print(
            one_line(
                f"verified: {directory} holds what {against} does: {report.tensors:,} tensors, "
                f"{format_bytes(report.nbytes)}, every byte"
            )
        )


def _open_source(against: str, directory: str, config: Mapping[str, Any]) -> Checkpoint:
    source = open_checkpoint(against, download=True)
    if source.is_sharded:
        raise CheckpointError(
            f"{against} is sharded itself, and cannot be compared with",
            hint="give the model that was sharded, or a merge (`tightfit merge`)",
        )
    there, here = (c.get("architectures") for c in (source.config, config))
    if there != here:
        raise VerificationError(
            f"{against} is another model: its architectures are {there}, and those of {directory} "
            f"are {here}",
            hint="give the model that was sharded",
        )
    return source


def _said(loaded: Loaded) -> str:
    ranks = f"{loaded.ranks} rank{'s' if loaded.ranks > 1 else ''}"
    return (
        f"loaded: vLLM {loaded.version} ({loaded.device}, {ranks}) took {loaded.load_seconds:g} s, "
        f"and generated {len(loaded.tokens)} tokens: {' '.join(map(str, loaded.tokens))}"
    )


def _document(directory: str, report: Report) -> dict[str, object]:
    return {
        "schema": 1,
        "directory": directory,
        "ok": report.ok,
        "layout": report.manifest.layout,
        "tensor_parallel_size": report.manifest.tensor_parallel_size,
        "pipeline_parallel_size": report.manifest.pipeline_parallel_size,
        "expert_parallel": report.manifest.expert_parallel,
        "tensors": report.tensors,
        "total_bytes": report.nbytes,
        "compared_with_source": report.compared_with_source,
        "problems": list(report.problems),
    }


def _show(directory: str, report: Report, *, asked_to_load: bool) -> None:
    _show_problems(directory, report.problems)
    manifest = report.manifest
    if report.ok:
        compared = ", every byte as in its source" if report.compared_with_source else ""
        files, stages = len(manifest.files), manifest.pipeline_parallel_size
        cut = f"tensor parallel size {manifest.tensor_parallel_size}"
        cut += f", {stages} pipeline stages" if stages > 1 else ""
        cut += ", whole experts on each rank" if manifest.expert_parallel else ""
        text = (
            f"verified: {directory} is whole: {files} file{'s' if files > 1 else ''}, "
            f"{report.tensors:,} tensors, {format_bytes(report.nbytes)}, for {cut} in layout "
            f"{manifest.layout}{compared}"
        )
        print(one_line(text))
    elif asked_to_load:
        print("not loaded in vLLM, which does not see most of such problems")


def _show_problems(directory: str, problems: Sequence[str]) -> None:
    for problem in problems[:_MOST_PROBLEMS]:
        print(f"problem: {one_line(problem)}")
    if len(problems) > _MOST_PROBLEMS:
        print(f"... and {len(problems) - _MOST_PROBLEMS:,} more, which --json has")
    if problems:
        count = len(problems)
        text = f"verification failed: {count} problem{'s' if count > 1 else ''} in {directory}"
        print(one_line(text))
