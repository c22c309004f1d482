"""`tightfit quantize`: write the checkpoint that a job describes, and vouch for it."""

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from errno import EACCES
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from tightfit.checkpoint.checkpoint import Checkpoint
from tightfit.checkpoint.disk import output_error
from tightfit.checkpoint.files import CONFIG, INDEX
from tightfit.checkpoint.source import Source, is_remote, local_path_of, open_source
from tightfit.errors import OutputError, UsageError, VerificationError
from tightfit.executors import Executor
from tightfit.model.layout import Parallel
from tightfit.quantize.computed_source import ComputedSource
from tightfit.quantize.differing import difference
from tightfit.quantize.job import QuantizeJob
from tightfit.quantize.manifest import (
    JOURNAL,
    NAME,
    VERB,
    Manifest,
    digest,
    problems_beside,
    read_manifest,
)
from tightfit.quantize.recipe_file import document_of
from tightfit.sharding.admission import check_job, refuse_occupied
from tightfit.sharding.boxes import whole_tensor
from tightfit.sharding.copies import plan_copies
from tightfit.sharding.differing import refuse_other
from tightfit.sharding.manifest import stored_file
from tightfit.sharding.origin import (
    States,
    cut_fingerprint,
    same_states,
    source_fingerprint,
    source_states,
)
from tightfit.sharding.parts import Checksums, natural
from tightfit.sharding.plain import PlainJob, plain_parts
from tightfit.sharding.plain_output import PlainOutput
from tightfit.sharding.progress import Progress
from tightfit.sharding.proof.content import damages
from tightfit.sharding.proof.headers import file_problems
from tightfit.sharding.proof.same_source import first_difference
from tightfit.sharding.ranks import job_of, note_rank
from tightfit.sharding.shard import write_parts
from tightfit.sharding.side_files import copied_side_files, side_files
from tightfit.sharding.stream.source_files import SourceFiles

_PART = re.compile(r"model(?:-\d{5,}-of-\d{5,})?\.safetensors")


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteJob(PlainJob):
    """The files that a `QuantizeJob` comes to; `origin` is its model, in the noted states."""

    verb: str = VERB
    origin: Checkpoint
    origin_states: States = field(default_factory=dict)
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

    def difference(self, there: Mapping[str, Any]) -> str | None:
        """How the job that something is of differs from this one, as options of `quantize`."""
        return difference(there, self.identity)

    @property
    def beside(self) -> Mapping[str, str]:
        """Checksums of all other files, by name."""
        texts = {CONFIG: self.config_text} | ({} if self.index is None else {INDEX: self.index})
        copied = copied_side_files(self.checkpoint)
        return {
            **{name: digest([text.encode()]) for name, text in texts.items()},
            **{one.name: digest(one.blocks()) for one in copied},
        }

    def noted(self) -> "WriteJob":
        """The same, which knows the states of the files of its model, if it did not."""
        if self.origin_states:
            return self
        return replace(self, origin_states=source_states(self.origin.source, self.origin.files))

    def manifest(self, checksums: Checksums) -> bytes:
        """What vouches for the files: how they were made, and a checksum of every tensor."""
        return Manifest(
            source_name=self.checkpoint.name,
            source_states=self.origin_states,
            recipe=self.recipe,
            job=self.identity,
            beside=self.beside,
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
    origin_states: States = MappingProxyType({}),
) -> WriteJob:
    """Distribute the tensors over files; `calibration` is what values depend on beside weights.

    `origin_states` are those of the model's files before it was calibrated, if it was.
    """
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
        origin=job.checkpoint,
        origin_states=origin_states,
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
    `notice` is told what an interruption leaves.

    Returns:
        False if all of it was there already.

    Raises:
        OutputError: `out` holds something else, or cannot be written.
        VerificationError: it is finished, and damaged.
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
    job = job.noted()
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
            try:
                written = _write_here(job, out, progress, resume=resume, executor=executor)
            except KeyboardInterrupt:
                if resume:
                    notice(f"{out} has what is complete, and the same command goes on with it")
                raise
        if not written:
            _require_same(job, open_source(out), progress)
    return written


def _write_here(
    job: WriteJob, out: str, progress: Progress, *, resume: bool, executor: Executor | None
) -> bool:
    path, virtual = local_path_of(out), job.checkpoint
    with (
        PlainOutput(
            path, job, progress, resume=resume, beside=copied_side_files(virtual)
        ) as output,
        SourceFiles(virtual.source) as files,
    ):
        if output.finished:
            return False
        output.check_side_files()
        checksums = write_parts(job, output, files, progress, executor)
        output.write_side_files()
        output.finish(checksums)
    return True


def check_out(checkpoint: Checkpoint, out: str, *, resume: bool) -> None:
    """Refuse a place before hours of work that `write` would refuse after them.

    What depends on the recipe is for `is_there` and `write`.

    Raises:
        OutputError: it is a file, cannot be looked into, or holds something else.
    """
    names = _names_in(out)
    if not names:
        return
    noted = {name for name in names if name == JOURNAL or note_rank(name) is not None}
    ours = {CONFIG, INDEX, NAME, *noted, *side_files(checkpoint)}
    foreign = [
        name for name in names - ours if not name.endswith(".partial") and not _PART.fullmatch(name)
    ]
    begun = bool(noted) and not foreign
    if not resume or not (begun or (NAME in names and not noted)):
        refuse_occupied(out, unfinished=begun)


def _names_in(out: str) -> set[str]:
    if is_remote(out):
        from tightfit.checkpoint.remote_output import RemoteDirectory

        return RemoteDirectory(out).names()
    path = local_path_of(out)
    try:
        return set(os.listdir(path))
    except FileNotFoundError:
        above = next(one for one in path.absolute().parents if os.path.exists(one))
        if not os.access(above, os.W_OK | os.X_OK):
            raise output_error(PermissionError(EACCES, os.strerror(EACCES)), path, 0) from None
        return set()
    except NotADirectoryError as error:
        if not os.path.exists(path):
            raise output_error(error, path, 0) from error
        raise OutputError(
            f"the output {path} is an existing file", hint="give a new directory"
        ) from None
    except OSError as error:
        raise output_error(error, path, 0) from error


def is_there(job: WriteJob, out: str, progress: Progress) -> bool:
    """Whether the output is finished; for jobs whose tensors are not all known before calibration.

    Raises:
        OutputError: it is of another job.
        VerificationError: it is damaged.
    """
    names = _names_in(out)
    noted = sorted(name for name in names if name == JOURNAL or note_rank(name) is not None)
    if NAME in names and not noted:
        _require_same(job, open_source(out), progress, but=["cut_fingerprint"])
        return True
    for name in noted:
        there = job_of(open_source(out).read(name))
        check_job(out, there and {**there, **_only(job, ["cut_fingerprint"])}, job)
    return False


def _only(job: WriteJob, keys: Iterable[str]) -> Mapping[str, Any]:
    return {key: job.identity[key] for key in keys}


def _require_same(
    job: WriteJob, place: Source, progress: Progress, *, but: Iterable[str] = ()
) -> None:
    """Prove that what is finished is what this job would write.

    Where the source's files are not in the state that they were in, everything is made again.

    Raises:
        OutputError: it is of another job, or another model.
        VerificationError: it is damaged, or its manifest is.
    """
    manifest = read_manifest(place)
    check_job(place.label, {**manifest.job, **_only(job, but)}, job)
    same = same_states(manifest.source_states, job.noted().origin_states)
    if not same and job.calibration:
        refuse_other(
            place.label,
            "the files of the model were written anew, and what was calibrated cannot be compared",
        )
    found = [*problems_beside(place, manifest)]
    found += [one for file in manifest.files for one in file_problems(place, file)]
    found = found or [*damages(place, manifest.files, progress)]
    if found:
        raise VerificationError(
            f"{place.label} is finished, and damaged: {found[0]}",
            hint="remove it, and quantize the model again; `tightfit verify` lists all damage",
        )
    if not same:
        pieces = {one.tensor.name: one.tensor.pieces for part in job.parts for one in part.placed}
        files = [
            replace(
                file, tensors=tuple(replace(t, pieces=pieces.get(t.name, ())) for t in file.tensors)
            )
            for file in manifest.files
        ]
        if (difference := first_difference(place, files, job, progress)) is not None:
            refuse_other(place.label, f"the model has other weights ({difference})")


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Matrices are encoded several at a time, each by one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
