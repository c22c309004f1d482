"""Which ranks of a local directory are complete: vouched for by this job, and there in full."""

import os
from contextlib import suppress
from pathlib import Path

from tightfit.errors import VerificationError
from tightfit.sharding.admission import check_job
from tightfit.sharding.job import Job
from tightfit.sharding.manifest import Manifest, manifest_of
from tightfit.sharding.ranks import note_rank, rank_manifest, read_job, read_rank_manifest


def complete_rank(directory: Path, rank: int, job: Job) -> Manifest | None:
    """What vouches for a rank; None if nothing does, or not all of its files are there.

    Raises:
        OutputError: it is of another job.
    """
    path = directory / rank_manifest(rank)
    check_job(str(directory), read_job(path), job)
    with suppress(FileNotFoundError, VerificationError):
        manifest = manifest_of(read_rank_manifest(directory, rank), path)
        there = (size_in(directory, file.name) == file.nbytes for file in manifest.files)
        if all(there) and {file.rank for file in manifest.files} == {rank}:
            return manifest
    return None


def complete_ranks(directory: Path, job: Job) -> dict[int, Manifest]:
    """What vouches for all complete ranks, in their order; raises as `complete_rank`."""
    ranks = {rank for rank in map(note_rank, os.listdir(directory)) if rank is not None}
    found = ((rank, complete_rank(directory, rank, job)) for rank in sorted(ranks))
    return {rank: manifest for rank, manifest in found if manifest is not None}


def size_in(directory: Path, name: str) -> int | None:
    """Bytes of a file; None if there is none."""
    try:
        return os.stat(directory / name).st_size
    except FileNotFoundError:
        return None
