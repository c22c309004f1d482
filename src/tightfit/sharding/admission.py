"""Whether a job may write to a place that is not empty: only where it goes on with itself."""

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NoReturn

from tightfit.checkpoint.files import CONFIG, MANIFEST
from tightfit.errors import OutputError
from tightfit.sharding.differing import refuse_other
from tightfit.sharding.job import Job
from tightfit.sharding.manifest import ORIGINALS, Manifest, StoredFile, StoredTensor
from tightfit.sharding.parts import Part
from tightfit.sharding.ranks import note_rank, rank_manifest, show_ranks
from tightfit.sharding.side_files import side_files

_RANK_PREFIXES = ("model-rank-", "model-pp-")


def check_there(
    where: str,
    names: Collection[str],
    job: Job,
    read_job: Callable[[str], Mapping[str, Any] | None],
    *,
    resume: bool,
    rank_by_rank: bool = True,
) -> None:
    """Go on only in a place that is the beginning of this very job.

    Args:
        where: the place, for messages.
        names: what is there; not empty.
        read_job: gives the job that a file of ours belongs to; None if it says nothing.
        resume: whether to go on with what an earlier call has begun.
        rank_by_rank: whether each file of a rank needs one of that very rank that says it is ours.

    Raises:
        OutputError: it is something else, or already has these ranks.
    """
    ours = {name for name in names if name == MANIFEST or note_rank(name) is not None}
    allowed = {CONFIG, ORIGINALS, *ours, *side_files(job.checkpoint)}
    foreign = [
        name
        for name in sorted(names)
        if not name.startswith(_RANK_PREFIXES)
        and name not in allowed
        and not name.endswith(".partial")
    ]
    if foreign or not ours or not (resume or len(job.ranks) < job.parallel.world_size):
        refuse_occupied(where, unfinished=bool(ours) and not foreign and MANIFEST not in names)
    known: set[int | None] = set()
    for name in sorted(ours - {MANIFEST}):
        if (other := read_job(name)) is not None:
            check_job(where, other, job)
            known.add(note_rank(name) if rank_by_rank else None)
    for part in job.parts:
        rank = part.rank.rank if rank_by_rank else None
        if part.name in names and MANIFEST not in names and rank not in known:
            raise OutputError(
                f"{where} holds {part.name}, and nothing there says that this job wrote it",
                hint="give a new directory, or remove that file yourself",
            )
    if not resume:
        taken = sorted({r for r in job.ranks if rank_manifest(r) in names})
        if taken or MANIFEST in names:
            raise OutputError(
                f"{where} already has rank{'s' if len(taken) > 1 else ''} {show_ranks(taken)}"
                if taken
                else f"{where} already has all ranks",
                hint="choose others (--ranks), or --resume to write only what is missing",
            )


def refuse_occupied(where: object, *, unfinished: bool) -> NoReturn:
    """Refuse a place with something in it, which may be the beginning of an output.

    Raises:
        OutputError: always.
    """
    raise OutputError(
        f"the output directory {where} "
        + ("holds an unfinished output" if unfinished else "is not empty"),
        hint=(
            "--resume continues it; or give a new directory"
            if unfinished
            else "give a new directory, or remove that one yourself"
        ),
    )


def check_job(where: object, other: Mapping[str, Any] | None, job: Job) -> None:
    """What a file of ours says that it belongs to, if it says anything, has to be this job.

    Raises:
        OutputError: it is another one.
    """
    if other and (difference := job.difference(other)) is not None:
        refuse_other(where, difference)


def check_one_model(where: str, files: Iterable[StoredFile]) -> None:
    """Ranks with the same headers may be of different models: what several hold tells.

    Raises:
        OutputError: two ranks hold different copies of something.
    """
    seen: dict[object, tuple[str, str]] = {}
    for file in files:
        for one in file.tensors:
            if one.pieces:
                known = seen.setdefault(
                    (one.dtype, one.shape, one.fill, one.pieces), (file.name, one.xxh3)
                )
                if known[1] != one.xxh3:
                    raise OutputError(
                        f"{where} holds ranks of different models: {one.name!r} is not the same "
                        f"in {known[0]} and {file.name}",
                        hint="give a new directory to the ranks of each model",
                    )


def is_of(
    files: Iterable[StoredFile], parts: Iterable[Part], size: Callable[[str], int | None]
) -> bool:
    """Whether files are there, and are vouched for as what these parts are."""
    known = {file.name: file for file in files}
    return all(
        part.name in known
        and _described(known[part.name].tensors)
        == [
            (one.tensor.name, one.tensor.dtype, one.tensor.shape, one.offset, one.tensor.pieces)
            for one in part.placed
        ]
        and known[part.name].rank == part.rank.rank
        and known[part.name].nbytes == part.nbytes == size(part.name)
        for part in parts
    )


def check_same(where: str, manifest: Manifest, job: Job, size: Callable[[str], int | None]) -> None:
    """A place that is whole has to be the output of this job; `size` is that of a file there.

    Its weights are yet to be compared.

    Raises:
        OutputError: it is not.
    """
    here = job.identity
    known = {
        "layout": manifest.layout,
        "tensor_parallel_size": manifest.tensor_parallel_size,
        "pipeline_parallel_size": manifest.pipeline_parallel_size,
        "expert_parallel": manifest.expert_parallel,
        "source_fingerprint": manifest.source_fingerprint,
        **({"quantized": manifest.quantized} if manifest.quantized else {}),
    }
    unknown = {key: here[key] for key in here if key not in (*known, "quantized")}
    check_job(where, known | unknown, job)
    if not is_of(manifest.files, job.parts, size):
        raise OutputError(
            f"{where} is whole, and its files are others than this call would write",
            hint="give a new directory, or the same options (--max-shard-size) as there; "
            "`tightfit verify` says whether that one is damaged",
        )


def _described(tensors: Iterable[StoredTensor]) -> list[tuple[object, ...]]:
    return [(one.name, one.dtype, one.shape, one.offset, one.pieces) for one in tensors]
