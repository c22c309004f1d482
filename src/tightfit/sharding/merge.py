"""`tightfit merge`: the Hugging Face checkpoint back from the files of all ranks, byte for byte.

Padding and copies are dropped; every tensor has the bytes and the name that it had in the source.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from tightfit.checkpoint.checkpoint import Checkpoint, open_checkpoint
from tightfit.checkpoint.source import LocalSource
from tightfit.errors import CheckpointError, OutputError
from tightfit.model.layout import Parallel, Piece, RankTensor
from tightfit.sharding.boxes import key, whole
from tightfit.sharding.gather import plan
from tightfit.sharding.origin import cut_fingerprint, source_fingerprint
from tightfit.sharding.parts import Part, natural
from tightfit.sharding.plain import PlainJob, plain_parts
from tightfit.sharding.plain_output import PlainOutput
from tightfit.sharding.progress import Progress
from tightfit.sharding.proof.compare import same_bytes
from tightfit.sharding.proof.content import differences
from tightfit.sharding.rank_files import RankFiles, open_rank_files
from tightfit.sharding.shard import write_parts
from tightfit.sharding.side_files import copied_side_files
from tightfit.sharding.stream.source_files import SourceFiles


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeJob(PlainJob):
    """Everything about a merge before the first weight is read: one rank, of all the others.

    `twins` are tensors of the source that are stored only as others, of which they are copies.
    `not_returned` are those that engines do not load, and that rank files have never held.
    """

    cut_again: RankFiles
    twins: Mapping[str, str]
    not_returned: tuple[str, ...]


def prepare_merge(checkpoint: Checkpoint, *, max_shard_bytes: int) -> MergeJob:
    """Decide what goes where.

    Raises:
        CheckpointError: it is not sharded, or parts of a tensor are missing.
        VerificationError: the files are not what their manifest says.
        LayoutError: there is no manifest, and no known layout fits.
    """
    if not checkpoint.is_sharded:
        raise CheckpointError(
            f"{checkpoint.name} is not sharded: there is nothing to merge",
            hint="give a directory that `tightfit shard`, or vLLM's own script, has written",
        )
    copied_side_files(checkpoint)
    ranks = open_rank_files(checkpoint)
    left_out = ranks.manifest.left_out if ranks.manifest is not None else {}
    names = {**ranks.sources, **ranks.originals}
    tensors = [_whole(name, name, ranks) for name in names]
    tensors += [_whole(name, twin, ranks) for name, twin in left_out.items() if twin is not None]
    tensors.sort(key=lambda tensor: natural(tensor.name))
    parts = plain_parts(tensors, max_shard_bytes)
    copies, gathers = plan([_as_seen(part, ranks, left_out) for part in parts], ranks.infos)
    manifest = ranks.manifest
    return MergeJob(
        checkpoint=checkpoint,
        parallel=Parallel(),
        ranks=(0,),
        max_shard_bytes=max_shard_bytes,
        parts=parts,
        copies=copies,
        gathers=gathers,
        cut_again=ranks,
        source_fingerprint=(
            source_fingerprint(ranks.infos) if manifest is None else manifest.source_fingerprint
        ),
        cut_fingerprint=cut_fingerprint(one.tensor for part in parts for one in part.placed),
        twins={name: twin for name, twin in left_out.items() if twin is not None},
        not_returned=tuple(name for name, twin in left_out.items() if twin is None),
    )


def merge(job: MergeJob, directory: Path, progress: Progress, *, resume: bool = False) -> bool:
    """Check the rank files, and write the checkpoint, all or nothing.

    With `resume` only what is missing in the directory is written, and what is there stays
    whatever happens.

    Returns:
        False if all of it was there already.

    Raises:
        OutputError: the directory holds something else, or cannot be written.
        VerificationError: a tensor is damaged, or ranks hold different copies of it.
        CheckpointError: a rank file is truncated, or changed meanwhile.
    """
    checkpoint = job.checkpoint
    with (
        PlainOutput(
            directory, job, progress, resume=resume, beside=copied_side_files(checkpoint)
        ) as output,
        SourceFiles(checkpoint.source) as files,
    ):
        if output.finished:
            _require_same(job, directory, progress)
            return False
        output.check_side_files()
        checksums = write_parts(job, output, files, progress)
        output.write_side_files()
        output.finish(checksums)
    return True


def _require_same(job: MergeJob, directory: Path, progress: Progress) -> None:
    """Hold a finished merge against the rank files: it may be one of another model.

    Raises:
        OutputError: it is.
    """
    found = next(_differences(job, directory, progress), None)
    if found is not None:
        raise OutputError(
            f"{directory} holds something else than a merge of {job.checkpoint.name}: {found}",
            hint="give a new directory, or remove that one yourself",
        )


def _differences(job: MergeJob, directory: Path, progress: Progress) -> Iterator[str]:
    there = LocalSource(directory)
    for part in job.parts:
        good = there.size(part.name) == part.nbytes
        if not good or there.read(part.name, 0, len(part.header)) != part.header:
            yield f"{part.name} has another header"
            return
    manifest, merged = job.cut_again.manifest, open_checkpoint(str(directory))
    if manifest is None:
        yield "there is no manifest to compare it with"
        return
    yield from differences(job.checkpoint.source, manifest.files, merged, progress)
    infos = merged.tensors()
    with SourceFiles(there) as files:
        for name, twin in job.twins.items():
            if not same_bytes(infos[name], infos[twin], files):
                yield f"{name!r} differs from {twin!r}"


def _whole(name: str, source: str, ranks: RankFiles) -> RankTensor:
    """A tensor of the source, from wherever its boxes are."""
    if source in ranks.originals:
        info = ranks.originals[source]
        pieces: tuple[Piece, ...] = (whole(info, key(info)),)
    elif source in ranks.sources:
        info = ranks.sources[source]
        if any(one.piece.decay for one in ranks.held[source]):
            raise CheckpointError(
                f"{ranks.checkpoint.name} holds what an engine computes of {source!r}, and not "
                f"{source!r} itself",
                hint="only directories of `tightfit shard` keep such tensors; merge one of those",
            )
        view = ranks.view(source)
        seen = info if view is None else replace(info, shape=view)
        pieces = ranks.compose(replace(whole(seen, source), view=view))
    else:
        raise CheckpointError(
            f"{ranks.checkpoint.name} has nothing of {source!r}, of which {name!r} is a copy",
            hint="shard the model again",
        )
    return RankTensor(name=name, parameter=None, dtype=info.dtype, shape=info.shape, pieces=pieces)


def _as_seen(part: Part, ranks: RankFiles, twins: Mapping[str, str | None]) -> Part:
    """The part with the shapes in which pieces speak of its tensors."""
    placed = []
    for one in part.placed:
        name = one.tensor.name
        view = ranks.view(twins.get(name) or name) if name not in ranks.originals else None
        shape = one.tensor.shape if view is None else view
        placed.append(replace(one, tensor=replace(one.tensor, shape=shape)))
    return replace(part, placed=tuple(placed))
