"""The directory of a plain checkpoint: nothing in it loads until everything is proven.

Engines look for no manifest in it. Its config comes last, without which no engine reads anything,
and its journal goes after that: a directory with a journal is an unfinished one.
"""

import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from tightfit.checkpoint.files import CONFIG, INDEX
from tightfit.errors import OutputError
from tightfit.sharding.output import ShardOutput
from tightfit.sharding.plain import PlainJob
from tightfit.sharding.ranks import read_job
from tightfit.sharding.side_files import SideFile, side_files


class PlainOutput(ShardOutput):
    """A directory of a plain checkpoint.

    On entering, `finished` says that all files of this job are there, and no journal: whether
    they hold what they should is yet to be seen. Use `open`, `note` and `finish` in this order.
    """

    finished = False

    def __init__(
        self, path: Path, job: PlainJob, *, resume: bool, beside: Iterable[SideFile]
    ) -> None:
        super().__init__(path, job, resume=resume, beside=beside)
        self._plain = job
        self._journal = f"tightfit-{job.verb}.journal"

    def journal_name(self, rank: int) -> str:
        """Where what is complete is noted."""
        return self._journal

    def finish(self, checksums: Mapping[tuple[str, str], str]) -> None:
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
        if begun and self._resume:
            mine, other = self._job.identity, read_job(path / self._journal)
            for key in mine:
                if other is not None and other.get(key) != mine[key]:
                    raise OutputError(
                        f"{path} is the beginning of another {self._plain.verb}: its {key} is "
                        f"{other.get(key)!r:.80}, and not {mine[key]!r:.80}",
                        hint="give a new directory, or the same options and source as there",
                    )
        elif self._resume and not foreign and names >= self._plain.needed:
            self.finished = True
            # Nothing of it is ours to remove.
            self._committed = True
        else:
            raise OutputError(
                f"the output directory {path} "
                + ("holds an unfinished output" if begun else "is not empty"),
                hint=(
                    "--resume continues it; or give a new directory"
                    if begun
                    else "give a new directory, or remove that one yourself"
                ),
            )
