"""`tightfit shard` to a distant store: part by part, and the manifest last.

Stores have neither renames nor locks, and take files as a whole: a part is there or it is not. Each
that is complete gets a note beside it, with its checksums and what the store says of it. A note
proves a part as long as the store says the same; where it says no more than the size, the part is
read again and hashed. So nothing that is complete is sent twice, whatever stopped the work.
"""

import json
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any

import xxhash

from tightfit.checkpoint.checkpoint import Checkpoint
from tightfit.checkpoint.files import CONFIG, MANIFEST
from tightfit.checkpoint.remote_output import BLOCK_BYTES, RemoteDirectory, encoded
from tightfit.checkpoint.store import FIRST_WAIT_SECONDS, diagnose
from tightfit.errors import CheckpointError, OutputError, TightfitError, VerificationError
from tightfit.sharding.admission import check_job, check_one_model, check_same, check_there
from tightfit.sharding.job import Job, ShardJob
from tightfit.sharding.manifest import Manifest, StoredFile, manifest_of
from tightfit.sharding.origin import States, source_states
from tightfit.sharding.parts import Checksums, Part
from tightfit.sharding.progress import Progress
from tightfit.sharding.proof.agreement import check_rank_files
from tightfit.sharding.proof.same_source import SameSource
from tightfit.sharding.ranks import note_rank, part_note, rank_manifest
from tightfit.sharding.shard import Sharded, config_to_write, manifest_for
from tightfit.sharding.side_files import copied_side_files
from tightfit.sharding.stream.by_part import PartWork, plan_parts, write_parts
from tightfit.sharding.stream.source_files import SourceFiles

PARTS_AT_A_TIME = 8
_ATTEMPTS = 3


def shard_to(
    job: ShardJob,
    url: str,
    progress: Progress,
    *,
    resume: bool = False,
    notice: Callable[[str], None] = lambda _: None,
) -> Sharded:
    """Write the rank files, the side files and the manifest to an fsspec URL.

    What is complete stays whatever happens, and `resume` goes on with it. `notice` is told what
    an interruption leaves.

    Raises:
        OutputError: there is something else, or it cannot be written.
        CheckpointError: a source file is truncated, or changed meanwhile.
        VerificationError: the source is sharded itself, and damaged.
    """
    place, states = RemoteDirectory(url), job.noted_states
    same = SameSource(job, progress, place.source)
    names = place.names()
    if names:
        check_there(
            place.label,
            names,
            job,
            lambda name: _document(place, name, 0).get("job"),
            resume=resume,
            rank_by_rank=False,
        )
    if MANIFEST in names:
        manifest = manifest_of(_document(place, MANIFEST, 0), f"{place.label}/{MANIFEST}")
        check_same(place.label, manifest, job, lambda name: place.source.size(name))
        same.require({rank: manifest.only(rank) for rank in job.ranks})
        return Sharded(manifest=manifest, fresh=False)
    # All of the others only when all ranks have come: here it is to refuse another model early.
    same.require(_other_ranks(job, place, names), sample=True)
    place.prepare()
    upload = Upload(job=job, place=place)
    upload.run(names, progress, notice)
    copy_side_files(job.checkpoint, place)
    place.write(CONFIG, [config_to_write(job)])
    manifest = manifest_for(job, states, upload.checksums)
    return Sharded(manifest=_vouch(job, place, manifest, same), fresh=upload.fresh)


@dataclass(slots=True, kw_only=True)
class Upload:
    """The parts of a job on their way."""

    job: Job
    place: RemoteDirectory
    checksums: Checksums = field(default_factory=dict)
    done: set[str] = field(default_factory=set)
    fresh: bool = False
    """Something was sent, and not all of it there already."""

    def run(self, names: Iterable[str], progress: Progress, notice: Callable[[str], None]) -> None:
        """Send all parts but what is proven to be there; `names` are of files that are there.

        `notice` is told what an interruption leaves.
        """
        try:
            self._run(names, progress)
        except KeyboardInterrupt:
            notice(self.safe())
            raise

    def _run(self, names: Iterable[str], progress: Progress) -> None:
        job, source = self.job, self.job.checkpoint.source
        works = plan_parts(job)
        files = sorted({file for work in works for file in work.sources})
        with SourceFiles(source) as opened:
            # Opened before anything is copied, so that every change from now on is seen.
            for file in files:
                opened.descriptor(file)
            states = source_states(source, files)
            self._prove(set(names), states, progress)
            todo = [work for work in works if work.part.name not in self.done]
            self.fresh = bool(todo)
            # What vouched for files that change does so no more.
            ranks = {rank_manifest(work.part.rank.rank) for work in todo}
            self.place.remove(sorted(ranks & set(names)))
            self.place.give_up_uploads(work.part.name for work in todo)
            if job.cut_again is not None and todo:
                check_rank_files(job, opened, progress)
            progress.phase("uploading", sum(work.part.nbytes for work in todo))
            for group in _groups(todo):
                self._send(group, opened, progress)
                opened.check_unchanged()
                for work in group:
                    self._note(work.part, states)

    def safe(self) -> str:
        """What is there for good."""
        count = len(self.job.parts)
        return (
            f"{len(self.done)} of {count} files are complete in {self.place.label}, and the same "
            "command with --resume goes on"
        )

    def _send(self, group: list[PartWork], files: SourceFiles, progress: Progress) -> None:
        what = group[0].part.name
        for attempt in range(_ATTEMPTS):
            told = _Told(progress)
            try:
                with self.place.errors(what, self.safe):
                    try:
                        self._send_once(group, files, told)
                    except TightfitError:
                        raise
                    except Exception as error:
                        if attempt + 1 == _ATTEMPTS or not diagnose(error).transient:
                            raise
                        progress.advance(-told.nbytes)
                        time.sleep(FIRST_WAIT_SECONDS * 4**attempt)
                        continue
            except CheckpointError as error:
                raise CheckpointError(error.message, hint=f"{error.hint}; {self.safe()}") from error
            return

    def _send_once(self, group: list[PartWork], files: SourceFiles, progress: Progress) -> None:
        with ExitStack() as stack:
            sinks = [
                stack.enter_context(self.place.open(work.part.name, work.part.nbytes))
                for work in group
            ]
            for work, sums in zip(group, write_parts(group, files, sinks, progress), strict=True):
                self.checksums |= {(work.part.name, name): sums[name] for name in sums}

    def _note(self, part: Part, states: States) -> None:
        state = self.place.source.state(part.name)
        if state[0] != part.nbytes:
            raise OutputError(
                f"{self.place.label} has {state[0]} bytes of {part.name!r}, and {part.nbytes} "
                "were sent",
                hint="does another process write there? " + self.safe(),
            )
        sums = {one.tensor.name: self.checksums[part.name, one.tensor.name] for one in part.placed}
        header = xxhash.xxh3_128(part.header).hexdigest()
        note = {"sources": states, "state": state, "header": header, "xxh3": sums}
        self.place.write(
            part_note(part.rank.rank, part.name), [encoded({"job": dict(self.job.identity)}, note)]
        )
        self.done.add(part.name)

    def _prove(self, names: set[str], states: States, progress: Progress) -> None:
        noted = [p for p in self.job.parts if {p.name, part_note(p.rank.rank, p.name)} <= names]
        if not noted:
            return
        progress.phase("checking", 0)
        with ThreadPoolExecutor(max_workers=PARTS_AT_A_TIME) as pool:
            proofs = pool.map(lambda part: self._proof(part, states), noted)
            for part, sums in zip(noted, proofs, strict=True):
                if sums is not None:
                    self.done.add(part.name)
                    self.checksums |= {(part.name, name): sums[name] for name in sums}

    def _proof(self, part: Part, states: States) -> Mapping[str, str] | None:
        """The checksums of a part that is as its note says; None if that is not proven."""
        try:
            name = part_note(part.rank.rank, part.name)
            job = _document(self.place, name, 0).get("job")
            note = _document(self.place, name, 1)
            state = self.place.source.state(part.name)
        except (CheckpointError, VerificationError):
            return None
        sums, noted = note.get("xxh3"), note.get("sources")
        known = {one.tensor.name for one in part.placed}
        if not isinstance(sums, dict) or sums.keys() != known or not isinstance(noted, dict):
            return None
        if (
            job != self.job.identity
            or note.get("header") != xxhash.xxh3_128(part.header).hexdigest()
        ):
            return None
        same_source = all(states.get(file) == state for file, state in noted.items())
        if not same_source or note.get("state") != state or state[0] != part.nbytes:
            return None
        if len(state) == 1 and any(self._hash(part, i) != sums[n] for i, n in _tensors(part)):
            return None
        return sums

    def _hash(self, part: Part, number: int) -> str:
        one, digest = part.placed[number], xxhash.xxh3_128()
        end = one.offset + one.tensor.nbytes
        for at in range(one.offset, end, BLOCK_BYTES):
            digest.update(self.place.source.read(part.name, at, min(at + BLOCK_BYTES, end)))
        return digest.hexdigest()


class _Told:
    """Progress that can be taken back."""

    def __init__(self, progress: Progress) -> None:
        self._progress, self.nbytes = progress, 0

    def phase(self, name: str, total_bytes: int) -> None:
        self._progress.phase(name, total_bytes)

    def advance(self, nbytes: int) -> None:
        self.nbytes += nbytes
        self._progress.advance(nbytes)


def _groups(works: list[PartWork]) -> Iterator[list[PartWork]]:
    """Parts that go up together: the first of all ranks, then the second, and so on."""
    seen: dict[int, int] = {}
    order: list[tuple[int, int, PartWork]] = []
    for work in works:
        rank = work.part.rank.rank
        seen[rank] = seen.get(rank, -1) + 1
        order.append((seen[rank], rank, work))
    order.sort(key=lambda one: one[:2])
    for first in range(0, len(order), PARTS_AT_A_TIME):
        yield [work for _, _, work in order[first : first + PARTS_AT_A_TIME]]


def copy_side_files(checkpoint: Checkpoint, place: RemoteDirectory) -> None:
    """Copy what belongs to a model beside its weights and its config."""
    for one in copied_side_files(checkpoint):
        with place.errors(one.name), place.open(one.name, one.nbytes) as sink:
            for block in one.blocks():
                sink.write(memoryview(block))


def _vouch(job: ShardJob, place: RemoteDirectory, manifest: Manifest, same: SameSource) -> Manifest:
    """Write what vouches for the ranks of this job, and for all of them if all are there."""
    world_size = job.parallel.world_size
    if len(job.ranks) < world_size:
        others = _other_ranks(job, place, place.names())
        check_one_model(place.label, _files(manifest, *others.values()))
        if len(job.ranks) + len(others) == world_size:
            same.require(others)
        for rank in job.ranks:
            lines = encoded({"job": dict(job.identity)}, manifest.only(rank).to_json())
            place.write(rank_manifest(rank), [lines])
        # Again, as others may have come meanwhile.
        others = _other_ranks(job, place, place.names())
        files = _files(manifest, *others.values())
        check_one_model(place.label, files)
        if len(job.ranks) + len(others) == world_size:
            same.require(others)
        manifest = manifest.with_files(tuple(sorted(files, key=lambda file: file.rank)))
        manifest = manifest.with_states(one.source_states for one in others.values())
    if not manifest.missing_ranks:
        place.write(MANIFEST, [encoded(manifest.to_json())])
        place.remove(name for name in place.names() if note_rank(name) is not None)
    return manifest


def _files(*manifests: Manifest) -> list[StoredFile]:
    return [file for one in manifests for file in one.files]


def _other_ranks(
    job: ShardJob, place: RemoteDirectory, names: Collection[str]
) -> dict[int, Manifest]:
    """Manifests of the ranks of other calls that are vouched for, and there in full.

    Raises:
        OutputError: a rank is of another job.
    """
    found: dict[int, Manifest] = {}
    for rank in sorted({r for r in map(note_rank, names) if r is not None} - {*job.ranks}):
        name = rank_manifest(rank)
        with suppress(CheckpointError, VerificationError):
            check_job(place.label, _document(place, name, 0).get("job"), job)
            manifest = manifest_of(_document(place, name, 1), f"{place.label}/{name}")
            sizes = [place.source.size(file.name) == file.nbytes for file in manifest.files]
            if all(sizes) and {file.rank for file in manifest.files} == {rank}:
                found[rank] = manifest
    return found


def _document(place: RemoteDirectory, name: str, line: int) -> dict[str, Any]:
    """One of the documents in a file of ours; empty if it is none.

    Raises:
        CheckpointError: the file cannot be read.
    """
    if not name.endswith(".json"):
        return {}
    lines = place.read(name).split(b"\n")
    try:
        found = json.loads(lines[line])
    except (IndexError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _tensors(part: Part) -> Iterator[tuple[int, str]]:
    for number, one in enumerate(part.placed):
        yield number, one.tensor.name
