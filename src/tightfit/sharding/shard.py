"""`tightfit shard`: carry out a prepared job, and vouch for what it wrote."""

import resource
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from math import prod
from pathlib import Path

from tightfit.checkpoint.disk import check_free_space
from tightfit.checkpoint.files import CONFIG
from tightfit.executors import Executor
from tightfit.model.pieces import element
from tightfit.sharding.job import Job
from tightfit.sharding.job import ShardJob as ShardJob
from tightfit.sharding.job import prepare as prepare
from tightfit.sharding.manifest import Manifest, make_manifest
from tightfit.sharding.origin import States
from tightfit.sharding.output import ShardOutput
from tightfit.sharding.parts import Checksums, Part, Placed
from tightfit.sharding.progress import Progress as Progress
from tightfit.sharding.progress import checksum as checksum
from tightfit.sharding.proof.agreement import check_rank_files
from tightfit.sharding.side_files import SideFile, config_text, copied_side_files
from tightfit.sharding.spread import spread
from tightfit.sharding.stream.one_pass import one_pass
from tightfit.sharding.stream.pending import Pending
from tightfit.sharding.stream.source_files import BUFFER_BYTES, SourceFiles, write_all
from tightfit.units import dtype_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharded:
    """The manifest of the ranks that are there now, and whether any was written by this call."""

    manifest: Manifest
    fresh: bool


def shard(
    job: ShardJob,
    directory: Path,
    progress: Progress,
    *,
    resume: bool = False,
    executor: Executor | None = None,
) -> Sharded:
    """Write the rank files, the side files and the manifest, all or nothing.

    Of a job with some of the ranks the directory is whole once all have come. With `resume` only
    what is missing in the directory is written, and what is there stays whatever happens.
    An `executor` gets one task per part; without one, one pass over the source writes all parts.

    Raises:
        OutputError: the directory holds something else, or cannot be written.
        CheckpointError: a source file is truncated, or changed meanwhile.
        VerificationError: the source is sharded itself, and damaged.
        TaskLostError: workers of the executor died, again and again.
    """
    beside, states = _side_files(job), job.noted_states
    with (
        ShardOutput(directory, job, progress, resume=resume, beside=beside) as output,
        SourceFiles(job.checkpoint.source) as files,
    ):
        if output.whole is not None:
            return Sharded(manifest=output.whole, fresh=False)
        if not output.ranks:
            manifest = output.unite(manifest_for(job, states, output.proven))
            return Sharded(manifest=manifest, fresh=False)
        output.check_side_files()
        checksums = write_parts(job, output, files, progress, executor)
        output.write_side_files()
        manifest = output.commit(manifest_for(job, states, checksums))
        return Sharded(manifest=manifest, fresh=True)


def write_parts(
    job: Job,
    output: ShardOutput,
    files: SourceFiles,
    progress: Progress,
    executor: Executor | None = None,
) -> Checksums:
    """Write the parts of an entered output, all but what is proven to be there.

    Returns:
        The checksums of all tensors of the parts.
    """
    check_free_space(output.path, output.needed_bytes())
    _allow_files(2 * len(job.parts) + len(job.checkpoint.files))
    states = job.states
    for name in states:
        # Opened before anything is copied, so that every change from now on is seen.
        files.descriptor(name)
    checksums = dict(output.proven)
    noted = output.start(states)
    if job.cut_again is not None:
        check_rank_files(job, files, progress)
    if executor is not None:
        checksums |= spread(job, output, noted, states, progress, executor)
        files.check_unchanged()
        return checksums
    opened = {part.name: output.open(part) for part in output.todo()}
    targets = [opened[p.name][0] if p.name in opened else -1 for p in job.parts]
    checksums |= _prove(job.parts, targets, noted, progress)
    pending = Pending(job.parts, job.copies, job.gathers, checksums.keys(), job.bundles)
    for part in output.todo():
        write_all(opened[part.name][0], [memoryview(part.header)], 0)
    for number, one in pending.unproven():
        _write_fill(one, targets[number], clear=opened[job.parts[number].name][1])
    progress.phase("copying", pending.nbytes)

    with closing(one_pass(pending, files, targets, progress)) as complete:
        for (number, i), found in complete:
            part = job.parts[number]
            name = part.placed[i].tensor.name
            checksums[part.name, name] = found
            output.note(part, name, found)
    files.check_unchanged()
    return checksums


def manifest_for(job: ShardJob, states: States, checksums: Checksums) -> Manifest:
    """The manifest of the ranks of a job; `states` are its `noted_states` before it began."""
    return make_manifest(
        layout=job.layout.name,
        architecture=job.spec.architecture,
        parallel=job.parallel,
        source_name=job.source_name,
        source_fingerprint=job.source_fingerprint,
        source_states=states,
        left_out=job.left_out,
        quantized=job.quantized,
        parts=job.parts,
        checksums=checksums,
    )


def _prove(
    parts: Iterable[Part],
    targets: Iterable[int],
    noted: Mapping[tuple[str, str], str],
    bars: Progress,
) -> Checksums:
    """Hash what an earlier run has noted as complete; what is as noted is not done again."""
    todo = [
        (part.name, one, target)
        for part, target in zip(parts, targets, strict=True)
        for one in part.placed
        if target >= 0 and (part.name, one.tensor.name) in noted
    ]
    if todo:
        bars.phase("checking", sum(one.tensor.nbytes for _, one, _ in todo))
    found: Checksums = {}
    for name, one, target in todo:
        digest = checksum(target, one.offset, one.tensor.nbytes, bars.advance)
        if digest == noted[name, one.tensor.name]:
            found[name, one.tensor.name] = digest
    return found


def _write_fill(one: Placed, target: int, *, clear: bool) -> None:
    """What no copy writes: constants; new files hold zeros, and others (`clear`) anything."""
    tensor = one.tensor
    if tensor.fill:
        assert not tensor.pieces
        filled = element(tensor.fill, tensor.dtype) * prod(tensor.shape)
        write_all(target, [memoryview(filled)], one.offset)
    elif clear:
        copied = sum(dtype_bytes(tensor.dtype, prod(piece.shape)) for piece in tensor.pieces)
        zeros = memoryview(bytes(BUFFER_BYTES if copied < tensor.nbytes else 0))
        for at in range(0, tensor.nbytes if zeros else 0, BUFFER_BYTES):
            write_all(target, [zeros[: min(BUFFER_BYTES, tensor.nbytes - at)]], one.offset + at)


def config_to_write(job: ShardJob) -> bytes:
    """The text of the config that goes with the ranks."""
    config = dict(job.checkpoint.config)
    if config.get("tie_word_embeddings", True) and not job.spec.tie_word_embeddings:
        # Engines decide by the config alone whether a sharded checkpoint is tied.
        config["tie_word_embeddings"] = False
    return config_text(config).encode()


def _side_files(job: ShardJob) -> tuple[SideFile, ...]:
    text = config_to_write(job)
    config = SideFile(name=CONFIG, nbytes=len(text), read=lambda start, stop: text[start:stop])
    return (*copied_side_files(job.checkpoint), config)


def _allow_files(count: int) -> None:
    """Every part is open at once, and most systems allow more than they do at first."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + 256
    if soft < wanted and (hard == resource.RLIM_INFINITY or soft < hard):
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
