"""Directories to which ranks come one by one: what is there, and what is missing.

Also the names of our own files, in these and in plain checkpoints.

A rank that is complete leaves `tightfit-rank-N.json`, the manifest of its files alone. Whoever
brings the last one makes `tightfit-manifest.json` of them, and the directory is whole.
"""

import json
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tightfit.checkpoint.source import Source
from tightfit.errors import OutputError, UsageError, VerificationError
from tightfit.sharding.regular import read_regular

_OURS = re.compile(r"tightfit-rank-(\d{1,6})(?:\.(json|journal)|-.+\.safetensors\.json)")
_RANGE = re.compile(r"(\d{1,6})(?:-(\d{1,6}))?")
_LARGEST_BYTES = 2**30
_LONGEST_LINE_BYTES = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrived:
    """Ranks of a directory without a manifest: complete ones, and those that were begun.

    `world_size` is None if nothing says it.
    """

    complete: tuple[int, ...]
    begun: tuple[int, ...]
    world_size: int | None
    verb: str = "shard"
    """The command that has begun it."""

    @property
    def missing(self) -> tuple[int, ...]:
        """Ranks that are not complete."""
        return tuple(r for r in range(self.world_size or 0) if r not in self.complete)


def rank_manifest(rank: int) -> str:
    """Name of the manifest of one complete rank."""
    return f"tightfit-rank-{rank}.json"


def rank_journal(rank: int) -> str:
    """Name of the journal of a rank that is being written."""
    return f"tightfit-rank-{rank}.journal"


def part_note(rank: int, part: str) -> str:
    """Name of what vouches for one complete file of a rank, on distant stores."""
    return f"tightfit-rank-{rank}-{part}.json"


def plain_manifest(verb: str) -> str:
    """Name of what vouches for a plain checkpoint, where a command writes such a thing."""
    return f"tightfit-{verb}.json"


def plain_journal(verb: str) -> str:
    """Name of the journal of a plain checkpoint that a command is writing."""
    return f"tightfit-{verb}.journal"


def note_rank(name: str) -> int | None:
    """The rank that a journal, a manifest of a rank or a note belongs to; None of other files."""
    match = _OURS.fullmatch(name)
    return None if match is None else int(match[1])


def arrived(source: Source) -> Arrived:
    """What names and first lines say; nothing is checked."""
    complete: set[int] = set()
    begun: set[int] = set()
    sizes: set[int] = set()
    verb = "shard"
    for name in source.files():
        if match := _OURS.fullmatch(name):
            job = job_of(source.read(name, 0, min(source.size(name), _LONGEST_LINE_BYTES)))
            vouched = match[2] == "json" and job is not None
            (complete if vouched else begun).add(int(match[1]))
            size = job.get("world_size") if job is not None else None
            if job is not None and "layout" not in job:
                verb = "quantize" if "recipe" in job else "merge"
            if type(size) is int and 0 < size <= 2**20:
                sizes.add(size)
    return Arrived(
        complete=tuple(sorted(complete)),
        begun=tuple(sorted(begun - complete)),
        world_size=sizes.pop() if len(sizes) == 1 else None,
        verb=verb,
    )


def read_job(path: Path) -> Mapping[str, Any] | None:
    """The job that a journal or the manifest of a rank belongs to; None if it says nothing."""
    try:
        return job_of(read_regular(path, _LONGEST_LINE_BYTES))
    except (OSError, OutputError):
        return None


def job_of(data: bytes) -> Mapping[str, Any] | None:
    """The job in the first line of a file of ours; None if it says nothing."""
    try:
        value = json.loads(data.partition(b"\n")[0])
    except (ValueError, RecursionError):
        return None
    job = value.get("job") if isinstance(value, dict) else None
    return job if isinstance(job, dict) else None


def read_rank_manifest(directory: Path, rank: int) -> Mapping[str, Any]:
    """The document of a complete rank: its job in the first line, its manifest in the second.

    Raises:
        FileNotFoundError: there is none.
        OutputError: it is no regular file.
        VerificationError: it is damaged.
    """
    path = directory / rank_manifest(rank)
    try:
        data = read_regular(path, _LARGEST_BYTES)
        _, _, rest = data.partition(b"\n")
        document = json.loads(rest)
    except (ValueError, RecursionError) as error:
        raise VerificationError(
            f"{path} is damaged: {error}", hint=f"remove it, and write rank {rank} again"
        ) from None
    if not isinstance(document, dict):
        raise VerificationError(
            f"{path} is damaged: it is not an object",
            hint=f"remove it, and write rank {rank} again",
        )
    return document


def not_whole(source: Source) -> VerificationError | None:
    """The error about a directory that was only begun; None if it is not such a directory."""
    directory = source.label
    for verb in ("merge", "quantize"):
        if source.exists(plain_journal(verb)):
            return _unfinished(directory, verb)
    there = arrived(source)
    if not there.complete and not there.begun:
        return None
    if there.world_size is not None and not there.missing:
        return VerificationError(
            f"{directory} is not whole: all ranks have come, and nothing vouches for them together",
            hint="run the same command again with --resume",
        )
    if there.world_size is None:
        return _unfinished(directory, there.verb)
    missing = show_ranks(there.missing)
    return VerificationError(
        f"{directory} is not whole: of {there.world_size} ranks it lacks {missing}"
        + (f" (begun: {show_ranks(there.begun)})" if there.begun else ""),
        hint=f"run `tightfit shard` into it with --ranks {missing} --resume",
    )


def _unfinished(directory: str, verb: str) -> VerificationError:
    return VerificationError(
        f"{directory} is an unfinished output of `tightfit {verb}`",
        hint="run the same command again with --resume",
    )


def parse_ranks(text: str) -> frozenset[int]:
    """Ranks of a text such as `0-3,7`.

    Raises:
        UsageError: it is not one.
    """
    found: set[int] = set()
    for word in text.split(","):
        match = _RANGE.fullmatch(word.strip())
        if match is None or (last := int(match[2] or match[1])) < (first := int(match[1])):
            raise UsageError(f"{text!r} does not name ranks", hint="for example --ranks 0-3,7")
        found.update(range(first, last + 1))
    return frozenset(found)


def show_ranks(ranks: Collection[int]) -> str:
    """`0-3,7`."""
    return ",".join(_runs(sorted(ranks)))


def _runs(ranks: Iterable[int]) -> list[str]:
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], rank]
        else:
            runs.append([rank])
    return [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
