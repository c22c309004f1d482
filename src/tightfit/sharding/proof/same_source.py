"""Whether what was written before is of the source that is given now, and not of another like it.

Two models of the same shapes have the same headers. Source files in the state that was noted are
the same; files of a copy, or of an older note, are compared with what was made of them.
"""

from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from tightfit.checkpoint.checkpoint import Checkpoint
from tightfit.checkpoint.source import LocalSource, Source
from tightfit.errors import CheckpointError
from tightfit.sharding.differing import refuse_other
from tightfit.sharding.job import Job, composed
from tightfit.sharding.manifest import Manifest, StoredFile
from tightfit.sharding.origin import States, same_states, source_states
from tightfit.sharding.progress import Progress
from tightfit.sharding.proof.content import differences
from tightfit.units import MiB

_SAMPLES = 8
_SAMPLE_BYTES = 16 * MiB


class SameSource:
    """Refuses ranks that were made of other weights than those of a job.

    `place` is where they are.
    """

    def __init__(self, job: Job, progress: Progress, place: Path | Source) -> None:
        self._job, self._progress, self._place = job, progress, place
        self._proven: set[int] = set()
        self._now: dict[str, list[int | str]] = dict(job.inherited_states)

    def require(
        self, ranks: Mapping[int, Manifest], *, but: Collection[int] = (), sample: bool = False
    ) -> None:
        """Compare ranks, each but once.

        Args:
            ranks: what vouches for them; only the files that it names are compared.
            but: those that were made by this very job.
            sample: look at a few tensors only: that tells two models apart, and proves nothing.

        Raises:
            OutputError: one is of another model, or the model was changed.
            CheckpointError: something cannot be read.
        """
        for rank, manifest in ranks.items():
            if rank in self._proven or rank in but:
                continue
            if not self._is_same(manifest.source_states):
                self._compare(manifest, sample)
            if not sample:
                self._proven.add(rank)

    def _is_same(self, noted: States) -> bool:
        """Whether these are the states of the source now; if they are not, contents decide."""
        if not self._job.inherited_states:
            unknown = noted.keys() - self._now.keys()
            # Asked for once: of a store each costs a request.
            with suppress(CheckpointError):
                self._now |= source_states(self._job.checkpoint.source, unknown)
        return same_states(noted, self._now)

    def _compare(self, manifest: Manifest, sample: bool) -> None:
        place = LocalSource(self._place) if isinstance(self._place, Path) else self._place
        files = [_sampled(file) for file in manifest.files] if sample else manifest.files
        found = first_difference(place, files, self._job, self._progress)
        if found is not None:
            refuse_other(place.label, f"the model has other weights ({found})")


def first_difference(
    place: Source, files: Iterable[StoredFile], job: Job, progress: Progress
) -> str | None:
    """The first tensor that is not made of the job's source, byte by byte; None if all are."""
    source, ranks = job.checkpoint, job.cut_again
    if ranks is not None:
        source = Checkpoint(
            name=source.name,
            source=source.source,
            config=source.config,
            files=(),
            has_weights=True,
            known=ranks.infos,
        )
        try:
            files = [
                replace(
                    file,
                    tensors=tuple(
                        replace(one, pieces=composed(file.name, one.name, one.pieces, ranks))
                        for one in file.tensors
                    ),
                )
                for file in files
            ]
        except CheckpointError as error:
            return error.message
    return next(differences(place, files, source, progress), None)


def _sampled(file: StoredFile) -> StoredFile:
    some = [one for one in file.tensors if one.pieces and 0 < one.nbytes <= _SAMPLE_BYTES]
    return replace(file, tensors=tuple(some[:: max(1, len(some) // _SAMPLES)]))
