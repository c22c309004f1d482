"""`tightfit verify PLAIN --against MODEL`: do two plain checkpoints hold the same tensors?

Their files may be cut in other ways, and have their tensors in another order.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from tightfit.checkpoint.checkpoint import Checkpoint
from tightfit.checkpoint.describe import require_weights
from tightfit.sharding.progress import Progress
from tightfit.sharding.proof.compare import same_bytes
from tightfit.sharding.proof.content import InTurn, in_threads
from tightfit.sharding.stream.source_files import SourceFiles


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainReport:
    """What was compared, and every difference that was found."""

    tensors: int
    nbytes: int
    problems: tuple[str, ...]

    def to_json(self, directory: str) -> dict[str, object]:
        """The report in schema 1."""
        return {
            "schema": 1,
            "directory": directory,
            "ok": not self.problems,
            "tensors": self.tensors,
            "total_bytes": self.nbytes,
            "compared_with_source": True,
            "problems": list(self.problems),
        }


def verify_plain(checkpoint: Checkpoint, against: Checkpoint, progress: Progress) -> PlainReport:
    """Compare names, shapes, dtypes and every byte.

    Raises:
        CheckpointError: one of them has no weights, or cannot be read.
    """
    require_weights(against, "verify")
    mine = checkpoint.tensors()
    return PlainReport(
        tensors=len(mine),
        nbytes=sum(info.nbytes for info in mine.values()),
        problems=tuple(_differences(checkpoint, against, progress)),
    )


def _differences(one: Checkpoint, other: Checkpoint, progress: Progress) -> Iterator[str]:
    mine, theirs = one.tensors(), other.tensors()
    for name in theirs.keys() - mine.keys():
        yield f"{one.name} lacks {name!r}, which {other.name} has"
    for name in mine.keys() - theirs.keys():
        yield f"{other.name} has no {name!r}"
    alike = []
    for name in sorted(mine.keys() & theirs.keys()):
        here, there = ((info.dtype, info.shape) for info in (mine[name], theirs[name]))
        if here == there:
            alike.append(name)
        else:
            yield f"{name!r} is {here[0]} {list(here[1])}, and {there[0]} {list(there[1])} there"
    progress.phase("comparing", sum(mine[name].nbytes for name in alike))
    advance = InTurn(progress.advance)
    with SourceFiles(one.source) as files, SourceFiles(other.source) as other_files:
        for opened, tensors in (files, mine), (other_files, theirs):
            for file in sorted({tensors[name].file for name in alike}):
                # Once, before several threads ask for it.
                opened.descriptor(file)

        def difference(name: str) -> str | None:
            same = same_bytes(mine[name], theirs[name], files, other_files)
            advance(mine[name].nbytes)
            return None if same else f"{mine[name].file}: {name!r} differs from {other.name}"

        yield from filter(None, in_threads(difference, alike, advance=advance))
