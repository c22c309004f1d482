"""The directory that ranks are written to: nothing in it looks whole until everything is proven.

Rank files are `.partial` until all of a call are complete and on disk. Then they get their names,
and last comes what vouches for them: the manifest, or those of single ranks until all have come. A
call that fails removes what it made, unless it was told to resume: then, and after a kill, journals
say what need not be done again.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tightfit.checkpoint.disk import is_about, output_error, reserve, sync_directory
from tightfit.checkpoint.files import MANIFEST
from tightfit.errors import OutputError
from tightfit.interrupts import uninterrupted
from tightfit.sharding.admission import check_one_model, check_same, check_there, is_of
from tightfit.sharding.attempts import Attempts
from tightfit.sharding.complete import complete_rank, complete_ranks, size_in
from tightfit.sharding.job import Job
from tightfit.sharding.journal import Journal
from tightfit.sharding.manifest import Manifest, read_manifest
from tightfit.sharding.origin import States
from tightfit.sharding.parts import Checksums, Part
from tightfit.sharding.progress import Progress
from tightfit.sharding.proof.same_source import SameSource
from tightfit.sharding.ranks import rank_journal, rank_manifest, read_job
from tightfit.sharding.regular import holds, open_regular
from tightfit.sharding.side_files import SideFile


class ShardOutput:
    """A directory of rank files, as one call sees it.

    On entering, `whole` is the manifest of a directory in which nothing is left to do, and `ranks`
    are those that this call writes. `beside` are the side files, which calls with some of the ranks
    may leave alone in the directory. Use `open`, `note` and `commit` in this order.

    Raises:
        OutputError: on entering, if the directory holds something else, or another process writes
            these ranks; later, if something cannot be written.
        VerificationError: what is there already is damaged.
    """

    def __init__(
        self, path: Path, job: Job, progress: Progress, *, resume: bool, beside: Iterable[SideFile]
    ) -> None:
        self.path, self._job, self._resume = path, job, resume
        self._beside, self._same = tuple(beside), SameSource(job, progress, path)
        self.whole: Manifest | None = None
        self.ranks: tuple[int, ...] = ()
        self.proven: Checksums = {}
        self._partly = len(job.ranks) < job.parallel.world_size
        self._journals: dict[int, Journal] = {}
        self._fds: dict[str, int] = {}
        self._made: list[Path] = []
        self._directories: list[Path] = []
        self._committed = False

    def __enter__(self) -> Self:
        try:
            with self._errors(self.path, 0):
                self._enter()
        except BaseException:
            self._leave()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._leave()
        if not self._committed and isinstance(error, OSError) and is_about(error, self.path):
            raise output_error(error, self.path, 0, left=self.left) from error

    def journal_name(self, rank: int) -> str:
        """Where what is complete is noted."""
        return rank_journal(rank)

    def todo(self) -> tuple[Part, ...]:
        """The parts that this call writes."""
        return tuple(part for part in self._job.parts if part.rank.rank in self.ranks)

    def needed_bytes(self) -> int:
        """Bytes of them that are not yet on disk."""
        held = sum(self.attempts(rank).held_bytes() for rank in self.ranks)
        for part in self.todo():
            for path in (self.partial(part), self.path / part.name):
                with suppress(OSError):
                    held += min(part.nbytes, os.stat(path).st_blocks * 512)
        return max(0, sum(part.nbytes for part in self.todo()) - held)

    def start(self, sources: States) -> dict[tuple[str, str], str]:
        """Lock the ranks; returns the checksums that earlier runs have noted."""
        noted: dict[tuple[str, str], str] = {}
        with self._errors(self.path, 0):
            for rank in self.ranks:
                path = self.path / self.journal_name(rank)
                with uninterrupted():
                    self._journals[rank] = Journal(
                        path, rank, self._job, sources, resume=self._resume
                    )
                self._forget(rank)
                self.attempts(rank).remove()
                noted |= self._journals[rank].noted
        return noted

    def _forget(self, rank: int) -> None:
        """Whatever vouched for a rank does so no more, as its files are about to change."""
        path = self.path / rank_manifest(rank)
        there, found = os.path.lexists(path), complete_rank(self.path, rank, self._job)
        complete = found is not None and self._is_mine(rank, found)
        if os.path.lexists(self.path / MANIFEST) or (there and (not self._resume or complete)):
            raise OutputError(
                f"another process has written rank {rank} to {self.path} meanwhile",
                hint="run the same command again with --resume",
            )
        if there:
            os.unlink(path)
            sync_directory(self.path)

    def attempts(self, rank: int) -> Attempts:
        """Where tasks try to write the parts of a rank."""
        return Attempts(self.path / self.journal_name(rank))

    def open(self, part: Part) -> tuple[int, bool]:
        """A descriptor of the unfinished file in its full size, and whether it was there before."""
        partial = self.partial(part)
        with self._errors(self.path / part.name, part.nbytes):
            before = self.begun(part)
            # 0666, which the umask restricts: servers run as other users.
            fd = self._fds[part.name] = open_regular(partial, os.O_RDWR | os.O_CREAT)
            if os.fstat(fd).st_size > part.nbytes:
                os.ftruncate(fd, part.nbytes)
            reserve(fd, part.nbytes)
        return fd, before

    def begun(self, part: Part) -> bool:
        """Whether an earlier call has left the unfinished file."""
        final, partial = self.path / part.name, self.partial(part)
        with self._errors(final, 0):
            if self._resume and os.path.lexists(final):
                # Named by a commit that did not come to its end.
                os.rename(final, partial)
            before = os.path.lexists(partial)
            if not before:
                self._made.append(partial)
            elif not self._resume:
                raise OutputError(
                    f"{partial} was left by another run",
                    hint="--resume continues it; or remove it yourself",
                )
        return before

    def take(self, part: Part, name: str) -> None:
        """Make a successful attempt the unfinished file, which is on disk and complete."""
        partial = self.partial(part)
        with self._errors(self.path / part.name, part.nbytes):
            self.attempts(part.rank.rank).take(part, name, partial)

    def note(self, part: Part, tensor: str, checksum: str) -> None:
        """A tensor is complete."""
        self._journals[part.rank.rank].note(part.name, tensor, checksum)

    def check_side_files(self) -> None:
        """What all ranks share, and another call may have written, has to be the same.

        Raises:
            OutputError: there is another file of that name.
        """
        for one in self._beside:
            self._has(one)

    def write_side_files(self) -> None:
        """Write those that are not there yet; raises as `check_side_files`."""
        for one in self._beside:
            with self._errors(self.path / one.name, one.nbytes):
                if not self._has(one):
                    self._write(self.path / one.name, one.blocks())

    def _has(self, one: SideFile) -> bool:
        final = self.path / one.name
        with self._errors(final, one.nbytes):
            same = holds(final, one.blocks())
            if same is None:
                return False
            if not same:
                raise OutputError(
                    f"{final} is there already, and differs from the source's",
                    hint="give a new directory",
                )
        return True

    def commit(self, manifest: Manifest) -> Manifest:
        """Bring everything to disk and give it its names; `manifest` is of the ranks of the job.

        Returns:
            The manifest of the ranks that are there now.
        """
        with self._errors(self.path, 0):
            others = complete_ranks(self.path, self._job) if self._partly else {}
            of_others = [file for one in others.values() for file in one.files]
            check_one_model(str(self.path), [*of_others, *manifest.files])
            if len({*others, *self._job.ranks}) == self._job.parallel.world_size:
                self._same.require(others, but=self.ranks)
            self._name_parts()
            if not self._partly:
                self._write(self.path / MANIFEST, [_encoded(manifest.to_json())])
            else:
                for rank in self.ranks:
                    document = manifest.only(rank).to_json()
                    lines = [_encoded({"job": dict(self._job.identity)}), b"\n", _encoded(document)]
                    self._write(self.path / rank_manifest(rank), lines)
                self._committed = True
                manifest = self._united(manifest)
            self._committed = True
            self._tidy(manifest)
        return manifest

    def unite(self, manifest: Manifest) -> Manifest:
        """What `commit` does last, for a call that finds nothing left to write."""
        with self._errors(self.path, 0):
            manifest = self._united(manifest)
            self._committed = True
            self._tidy(manifest)
        return manifest

    def _name_parts(self) -> None:
        for fd in self._fds.values():
            os.fsync(fd)
        for part in self.todo():
            final = self.path / part.name
            if os.path.lexists(final):
                raise OutputError(
                    f"{final} has appeared while the output was written",
                    hint="let one process at a time write a rank",
                )
            self._made.append(final)
            os.rename(self.partial(part), final)
        sync_directory(self.path)

    def _enter(self) -> None:
        path = self.path
        if path.exists() and not path.is_dir():
            raise OutputError(f"the output {path} is an existing file", hint="give a new directory")
        names = {p.name for p in path.iterdir()} if path.is_dir() else set()
        if names:
            self._check_there(names)
        for directory in reversed([p for p in (path, *path.parents) if not p.exists()]):
            self._directories.append(directory)
            with suppress(FileExistsError):
                os.mkdir(directory)
        if MANIFEST in names:
            manifest = read_manifest(path)
            check_same(str(path), manifest, self._job, partial(size_in, path))
            self._same.require({rank: manifest.only(rank) for rank in self._job.ranks})
            self.whole = manifest
            self._committed = True
            self._tidy(manifest)
            return
        done = set()
        for rank, manifest in complete_ranks(path, self._job).items():
            if rank not in self._job.ranks:
                # All of it only when all ranks have come: here it is to refuse another model early.
                self._same.require({rank: manifest}, sample=True)
            elif self._is_mine(rank, manifest):
                self._same.require({rank: manifest})
                done.add(rank)
                for file in manifest.files:
                    self.proven |= {(file.name, one.name): one.xxh3 for one in file.tensors}
        self.ranks = tuple(rank for rank in self._job.ranks if rank not in done)

    def _is_mine(self, rank: int, manifest: Manifest) -> bool:
        parts = [part for part in self._job.parts if part.rank.rank == rank]
        return is_of(manifest.files, parts, partial(size_in, self.path))

    def _check_there(self, names: set[str]) -> None:
        """Go on only in a directory that is the beginning of this very job."""
        if names <= {one.name for one in self._beside}:
            self.check_side_files()
            return
        check_there(
            str(self.path),
            names,
            self._job,
            lambda name: read_job(self.path / name),
            resume=self._resume,
        )

    def _united(self, manifest: Manifest) -> Manifest:
        """The manifest of all ranks that have come; if these are all, write it."""
        found = complete_ranks(self.path, self._job)
        world_size = self._job.parallel.world_size
        if len(found) < world_size and os.path.exists(self.path / MANIFEST):
            # Somebody else brought the last rank at the same moment.
            return read_manifest(self.path)
        files = tuple(file for one in found.values() for file in one.files)
        check_one_model(str(self.path), files)
        united = manifest.with_files(files).with_states(one.source_states for one in found.values())
        if len(found) == world_size:
            self._same.require(found, but=self.ranks)
            try:
                self._write(self.path / MANIFEST, [_encoded(united.to_json())])
            except FileNotFoundError:
                # Somebody else saw the last rank at the same moment, and has already tidied up.
                if not os.path.exists(self.path / MANIFEST):
                    raise
        return united

    def _tidy(self, manifest: Manifest) -> None:
        """Remove what is of no use any more."""
        for journal in self._journals.values():
            journal.close(remove=True)
        if manifest.missing_ranks or not os.path.exists(self.path / MANIFEST):
            return
        for rank in range(self._job.parallel.world_size):
            for name in (rank_manifest(rank), rank_journal(rank)):
                with suppress(OSError):
                    os.unlink(self.path / name)
        for path in self.path.glob("*.rank*.partial"):
            with suppress(OSError):
                os.unlink(path)

    def _write(self, final: Path, blocks: Iterable[bytes]) -> None:
        """A small file, which appears whole."""
        partial = final.with_name(f"{final.name}.rank{self._job.ranks[0]}.partial")
        self._made.append(partial)
        with suppress(FileNotFoundError):
            os.unlink(partial)
        fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            for data in blocks:
                view = memoryview(data)
                while view:
                    view = view[os.write(fd, view) :]
            os.fsync(fd)
        finally:
            os.close(fd)
        if not self._partly or final.name.startswith("tightfit-"):
            self._made.append(final)
        os.rename(partial, final)
        sync_directory(self.path)

    def partial(self, part: Part) -> Path:
        """The unfinished file."""
        return self.path / f"{part.name}.partial"

    @uninterrupted()
    def _leave(self) -> None:
        for fd in self._fds.values():
            with suppress(OSError):
                os.close(fd)
        self._fds.clear()
        for rank in self._journals:
            self.attempts(rank).remove()
        keep = self._committed or self._resume
        if not keep:
            # While the ranks are still locked: then the next may make files of these names.
            for path in reversed(self._made):
                with suppress(OSError):
                    os.unlink(path)
        for journal in self._journals.values():
            journal.close(remove=not keep or self._committed)
        if not keep:
            for directory in reversed(self._directories):
                with suppress(OSError):
                    os.rmdir(directory)

    @property
    def left(self) -> str:
        """What an error leaves behind, in words."""
        return "--resume continues what is there" if self._resume else "nothing was left behind"

    @contextmanager
    def _errors(self, path: Path, nbytes: int) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise output_error(error, path, nbytes, left=self.left) from error


def _encoded(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode()
