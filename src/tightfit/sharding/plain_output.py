"""The directory of a plain checkpoint: nothing in it loads until everything is proven.

Engines look for no manifest in it. Its config comes last, without which no engine reads anything,
and its journal goes after that: a directory with a journal is an unfinished one.
"""

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from tightfit.checkpoint.files import CONFIG, INDEX
from tightfit.sharding.admission import check_job, refuse_occupied
from tightfit.sharding.output import ShardOutput
from tightfit.sharding.parts import Checksums
from tightfit.sharding.plain import PlainJob
from tightfit.sharding.progress import Progress
from tightfit.sharding.ranks import plain_journal, read_job
from tightfit.sharding.side_files import SideFile, side_files


class PlainOutput(ShardOutput):
    """A directory of a plain checkpoint.

    On entering, `finished` says that what vouches for it is there, or else all files of this job,
    and no journal: whether they hold what they should is yet to be seen. Use `open`, `note` and
    `finish` in this order.
    """

    finished = False

    def __init__(
        self,
        path: Path,
        job: PlainJob,
        progress: Progress,
        *,
        resume: bool,
        beside: Iterable[SideFile],
    ) -> None:
        super().__init__(path, job, progress, resume=resume, beside=beside)
        self._plain = job
        self._journal = plain_journal(job.verb)

    def journal_name(self, rank: int) -> str:
        """Where what is complete is noted."""
        return self._journal

    def finish(self, checksums: Checksums) -> None:
        """Bring everything to disk and give it its names, the config at last."""
        job = self._plain
        with self._errors(self.path, 0):
            self._name_parts()
            if job.index is not None:
                self._write(self.path / INDEX, [job.index.encode()])
            if (manifest := job.manifest(checksums)) is not None:
                self._write(self.path / job.manifest_name, [manifest])
            self._write(self.path / CONFIG, [job.config_text.encode()])
            self._committed = True
            for journal in self._journals.values():
                journal.close(remove=True)
            for path in self.path.glob("*.rank0.partial"):
                with suppress(OSError):
                    os.unlink(path)

    def _check_there(self, names: set[str]) -> None:
        path, parts = self.path, {part.name for part in self._job.parts}
        allowed = {CONFIG, INDEX, *parts, *side_files(self._job.checkpoint)}
        foreign = {name for name in names - allowed if not name.endswith(".partial")}
        foreign -= {self._journal, self._plain.manifest_name}
        begun = self._journal in names and not foreign
        finished = self._journal not in names and (
            self._plain.manifest_name in names or (not foreign and names >= self._plain.needed)
        )
        if begun and self._resume:
            check_job(path, read_job(path / self._journal), self._plain)
        elif finished and self._resume:
            self.finished = True
            # Nothing of it is ours to remove.
            self._committed = True
        else:
            refuse_occupied(path, unfinished=begun)
