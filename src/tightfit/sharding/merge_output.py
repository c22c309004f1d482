"""The directory that a merge writes to: nothing in it loads until everything is proven.

It has no manifest to vouch for it. Its config comes last, without which no engine reads anything,
and its journal goes after that: a directory with a journal is an unfinished one.
"""

import os
from contextlib import suppress

from tightfit.checkpoint.files import CONFIG, INDEX
from tightfit.errors import OutputError
from tightfit.sharding.output import ShardOutput
from tightfit.sharding.ranks import read_job
from tightfit.sharding.side_files import side_files

JOURNAL = "tightfit-merge.journal"


class MergeOutput(ShardOutput):
    """A directory of a plain checkpoint.

    On entering, `finished` says that all files of this merge are there, and no journal: whether
    they hold what they should is yet to be seen. Use `open`, `note` and `finish` in this order.
    """

    finished = False

    def journal_name(self, rank: int) -> str:
        """Where what is complete is noted."""
        return JOURNAL

    def finish(self, config: str, index: str | None) -> None:
        """Bring everything to disk and give it its names, the config at last."""
        with self._errors(self.path, 0):
            self._name_parts()
            if index is not None:
                self._write(self.path / INDEX, [index.encode()])
            self._write(self.path / CONFIG, [config.encode()])
            self._committed = True
            for journal in self._journals.values():
                journal.close(remove=True)
            for path in self.path.glob("*.rank0.partial"):
                with suppress(OSError):
                    os.unlink(path)

    def _check_there(self, names: set[str]) -> None:
        path, parts = self.path, {part.name for part in self._job.parts}
        allowed = {CONFIG, INDEX, JOURNAL, *parts, *side_files(self._job.checkpoint)}
        foreign = {name for name in names - allowed if not name.endswith(".partial")}
        begun = JOURNAL in names and not foreign
        if begun and self._resume:
            mine, other = self._job.identity, read_job(path / JOURNAL)
            for key in mine:
                if other is not None and other.get(key) != mine[key]:
                    raise OutputError(
                        f"{path} is the beginning of another merge: its {key} is "
                        f"{other.get(key)!r:.80}, and not {mine[key]!r}",
                        hint="give a new directory, or the same options and source as there",
                    )
        elif self._resume and not foreign and parts <= names and CONFIG in names:
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
