"""`tightfit quantize`: write the checkpoint that a job describes, and vouch for it."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from tightfit.checkpoint.files import CONFIG, INDEX
from tightfit.checkpoint.source import Source, is_remote, local_path_of, open_source
from tightfit.errors import OutputError, UsageError
from tightfit.executors import Executor
from tightfit.model.layout import Parallel
from tightfit.quantize.computed_source import ComputedSource
from tightfit.quantize.job import QuantizeJob
from tightfit.quantize.manifest import NAME, Manifest, digest, problems_beside, read_manifest
from tightfit.quantize.recipe_file import document_of
from tightfit.sharding.boxes import whole_tensor
from tightfit.sharding.copies import plan_copies
from tightfit.sharding.manifest import cut_fingerprint, source_fingerprint, stored_file
from tightfit.sharding.parts import natural
from tightfit.sharding.plain import PlainJob, plain_parts
from tightfit.sharding.plain_output import PlainOutput
from tightfit.sharding.progress import Progress
from tightfit.sharding.proof.content import damages
from tightfit.sharding.proof.headers import file_problems
from tightfit.sharding.shard import Checksums, write_parts
from tightfit.sharding.side_files import copied_side_files
from tightfit.sharding.stream.source_files import SourceFiles


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteJob(PlainJob):
    """The files that a `QuantizeJob` comes to."""

    verb: str = "quantize"
    method: str
    recipe: Mapping[str, Any]
    calibration: Mapping[str, Any]

    @property
    def identity(self) -> Mapping[str, Any]:
        """What is made of the weights as well."""
        section = self.checkpoint.config["quantization_config"]
        # What users know comes first, as messages tell of the first difference.
        return {
            "recipe": json.loads(json.dumps(self.recipe)),
            "method": self.method,
            **super(WriteJob, self).identity,
            "quantization_config": json.loads(json.dumps(section)),
            "calibration": dict(self.calibration),
        }

    @property
    def beside(self) -> Mapping[str, bytes]:
        """What makes a checkpoint of the files."""
        index = {} if self.index is None else {INDEX: self.index.encode()}
        return {**index, CONFIG: self.config_text.encode()}

    def manifest(self, checksums: Mapping[tuple[str, str], str]) -> bytes:
        """What vouches for the files: how they were made, and a checksum of every tensor."""
        return Manifest(
            source_name=self.checkpoint.name,
            recipe=self.recipe,
            job=self.identity,
            beside={name: digest(data) for name, data in self.beside.items()},
            files=tuple(
                replace(file, tensors=tuple(replace(one, pieces=()) for one in file.tensors))
                for file in (stored_file(part, checksums) for part in self.parts)
            ),
        ).encoded()


def write_job(
    job: QuantizeJob,
    *,
    max_shard_bytes: int,
    calibration: Mapping[str, Any] = MappingProxyType({}),
) -> WriteJob:
    """Distribute the tensors over files; `calibration` is what values depend on beside weights."""
    virtual = job.virtual
    infos = virtual.tensors()
    ordered = sorted(infos.values(), key=lambda info: natural(info.name))
    tensors = [whole_tensor(info) for info in ordered]
    parts = plain_parts(tensors, max_shard_bytes)
    source = virtual.source
    assert isinstance(source, ComputedSource)
    return WriteJob(
        checkpoint=virtual,
        parallel=Parallel(),
        ranks=(0,),
        max_shard_bytes=max_shard_bytes,
        parts=parts,
        copies=plan_copies(parts, infos),
        source_fingerprint=source_fingerprint(job.checkpoint.tensors()),
        cut_fingerprint=cut_fingerprint(tensors),
        bundles=source.bundles(),
        method=job.method,
        recipe=document_of(job.wish),
        calibration=calibration,
    )


def write(
    job: WriteJob,
    out: str | Path,
    progress: Progress,
    *,
    resume: bool = False,
    executor: Executor | None = None,
    notice: Callable[[str], None] = lambda _: None,
) -> bool:
    """Write the weights, the side files, the manifest and last the config: all, or nothing.

    With `resume`, and at a URL always, what is complete stays whatever happens; `resume` goes on
    with it, and proves by checksums what is finished. An `executor` gets one task per file.
    `notice` is told what an interruption leaves at a URL.

    Returns:
        False if all of it was there already.

    Raises:
        OutputError: `out` holds something else, or cannot be written.
        CheckpointError: a source file is truncated, holds what cannot be quantized, or changed
            meanwhile.
        TaskLostError: workers of the executor died, again and again.
        UsageError: an executor cannot write to a URL, or something was to be calibrated before.
    """
    out = str(out)
    if job.recipe.get("kv_cache") and not job.calibration:
        raise UsageError(
            "scales of a KV cache depend on what the model sees, and were not given",
            hint="calibrate first, and prepare the job with `given`",
        )
    with one_thread_each():
        if is_remote(out):
            from tightfit.sharding.remote.plain import write_to

            if executor is not None:
                raise UsageError(
                    f"an executor writes to a shared directory, and not to {out}",
                    hint="leave out --executor",
                )
            written = write_to(job, out, progress, resume=resume, notice=notice)
        else:
            written = _write_here(job, out, progress, resume=resume, executor=executor)
    if not written:
        _require_same(job, open_source(out), progress)
    return written


def _write_here(
    job: WriteJob, out: str, progress: Progress, *, resume: bool, executor: Executor | None
) -> bool:
    path, virtual = local_path_of(out), job.checkpoint
    with (
        PlainOutput(path, job, resume=resume, beside=copied_side_files(virtual)) as output,
        SourceFiles(virtual.source) as files,
    ):
        if output.finished:
            return False
        output.check_side_files()
        checksums: Checksums = write_parts(job, output, files, progress, executor)
        output.write_side_files()
        output.finish(checksums)
    return True


def is_there(job: WriteJob, out: str, progress: Progress, *, resume: bool) -> bool:
    """Whether the output is finished; for jobs whose tensors are not all known before calibration.

    Raises:
        OutputError: it holds something else, is damaged, or is not for a call without `resume`.
        VerificationError: its manifest is damaged.
    """
    place = open_source(out) if is_remote(out) or local_path_of(out).is_dir() else None
    names = set() if place is None else set(place.files())
    if place is not None and names and not resume:
        raise OutputError(
            f"the output directory {place.label} is not empty",
            hint="give a new directory; or --resume, if it is the beginning of this output",
        )
    if place is None or not names >= {NAME, CONFIG} or any(n.endswith(".journal") for n in names):
        return False
    _require_same(job, place, progress, but="cut_fingerprint")
    return True


def _require_same(job: WriteJob, place: Source, progress: Progress, *, but: str = "") -> None:
    """Prove that what is finished is what this job would write, as far as checksums can.

    Raises:
        OutputError: it is of another job, or damaged.
        VerificationError: its manifest is.
    """
    manifest = read_manifest(place)
    for key, value in job.identity.items():
        if key != but and manifest.job.get(key) != value:
            raise OutputError(
                f"{place.label} holds another quantized checkpoint: its {key} is "
                f"{manifest.job.get(key)!r:.80}, and not {value!r:.80}",
                hint="give a new directory, or the same options and source as there",
            )
    found = [*problems_beside(place, manifest)]
    found += [one for file in manifest.files for one in file_problems(place, file)]
    found = found or [*damages(place, manifest.files, progress)]
    if found:
        raise OutputError(
            f"{place.label} is finished, and damaged: {found[0]}",
            hint="remove it, and quantize the model again",
        )


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Matrices are encoded several at a time, each by one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
