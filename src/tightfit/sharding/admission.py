"""Whether a job may write to a place that is not empty: only where it goes on with itself."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

from tightfit.checkpoint.files import CONFIG, MANIFEST
from tightfit.errors import OutputError
from tightfit.sharding.job import Job
from tightfit.sharding.manifest import Manifest
from tightfit.sharding.ranks import rank_manifest, show_ranks
from tightfit.sharding.side_files import side_files

_RANK_PREFIXES = ("model-rank-", "model-pp-", "tightfit-")


def check_there(
    where: str,
    names: Collection[str],
    job: Job,
    read_job: Callable[[str], Mapping[str, Any] | None],
    *,
    resume: bool,
) -> None:
    """Go on only in a place that is the beginning of this very job.

    Args:
        where: the place, for messages.
        names: what is there; not empty.
        read_job: gives the job that a file of ours belongs to; None if it says nothing.
        resume: whether to go on with what an earlier call has begun.

    Raises:
        OutputError: it is something else, or already has these ranks.
    """
    ours = {name for name in names if name.startswith("tightfit-")}
    allowed = {CONFIG, *side_files(job.checkpoint)}
    foreign = [
        name
        for name in sorted(names)
        if not name.startswith(_RANK_PREFIXES)
        and name not in allowed
        and not name.endswith(".partial")
    ]
    if foreign or not ours or not (resume or len(job.ranks) < job.parallel.world_size):
        unfinished = ours and not foreign and MANIFEST not in names
        raise OutputError(
            f"the output directory {where} "
            + ("holds an unfinished output" if unfinished else "is not empty"),
            hint=(
                "--resume continues it; or give a new directory"
                if unfinished
                else "give a new directory, or remove that one yourself"
            ),
        )
    mine = job.identity
    for name in sorted(ours - {MANIFEST}):
        other = read_job(name)
        differing = [key for key in mine if other and other.get(key) != mine[key]]
        if differing and other is not None:
            key = differing[0]
            raise OutputError(
                f"{where} holds ranks of another job: its {key} is {other.get(key)!r:.80}, and "
                f"not {mine[key]!r}",
                hint="give a new directory, or the same options and source as there",
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


def check_same(where: str, manifest: Manifest, job: Job, size: Callable[[str], int | None]) -> None:
    """A place that is whole has to be the output of this job; `size` is that of a file there.

    Raises:
        OutputError: it is not.
    """
    files = {file.name: file for file in manifest.files}
    for part in job.parts:
        file = files.get(part.name)
        placed = [(one.tensor.name, one.offset, one.tensor.pieces) for one in part.placed]
        if (
            file is None
            or manifest.source_fingerprint != job.source_fingerprint
            or [(t.name, t.offset, t.pieces) for t in file.tensors] != placed
            or size(part.name) != part.nbytes
        ):
            raise OutputError(
                f"{where} is the output of another job",
                hint="give a new directory; `tightfit verify` says what is in that one",
            )
