"""Which tensors of the output are still to be written, and when each is complete."""

from bisect import bisect_right
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace

from tightfit.sharding.copies import Copy, Decay, TensorCopies, Turn
from tightfit.sharding.gather import Gather
from tightfit.sharding.parts import Part, Placed

Key = tuple[int, int]
"""Number of the part, and of the tensor in it."""


class Pending:
    """The work that is left once what is `proven` is taken out of it."""

    def __init__(
        self,
        parts: Sequence[Part],
        copies: Iterable[TensorCopies],
        gathers: Iterable[Gather],
        proven: Collection[tuple[str, str]],
    ) -> None:
        self._parts = parts
        self._starts = [[one.offset for one in part.placed] for part in parts]
        self._proven = {
            (number, i)
            for number, part in enumerate(parts)
            for i, one in enumerate(part.placed)
            if (part.name, one.tensor.name) in proven
        }
        groups = [self._without_proven(group) for group in copies]
        self.copies = tuple(group for group in groups if group.nbytes)
        self.gathers = tuple(
            g for g in gathers if self._key(g.target, g.offset) not in self._proven
        )
        self._left: Counter[Key] = Counter()
        for group in self.copies:
            self._left.update(self._touched(group))
        for gather in self.gathers:
            self._left.update(self._touched(gather))

    @property
    def nbytes(self) -> int:
        """Bytes to copy, and to hash afterwards."""
        copied = sum(group.nbytes for group in self.copies)
        gathered = sum(gather.nbytes for gather in self.gathers)
        return copied + gathered + sum(one.tensor.nbytes for _, one in self.unproven())

    def unproven(self) -> Iterator[tuple[int, Placed]]:
        """All tensors that are to be written, with the numbers of their parts."""
        for number, part in enumerate(self._parts):
            for i, one in enumerate(part.placed):
                if (number, i) not in self._proven:
                    yield number, one

    def without_source(self) -> Iterator[tuple[int, Placed]]:
        """Those of them into which nothing is copied: constants, and nothing but padding."""
        for number, part in enumerate(self._parts):
            for i, one in enumerate(part.placed):
                if (number, i) not in self._proven and not self._left[number, i]:
                    yield number, one

    def finish(self, unit: TensorCopies | Gather) -> Iterator[tuple[int, Placed]]:
        """The tensors that are complete now that a unit of work is done."""
        for number, i in self._touched(unit):
            self._left[number, i] -= 1
            if not self._left[number, i]:
                yield number, self._parts[number].placed[i]

    def _touched(self, unit: TensorCopies | Gather) -> set[Key]:
        if isinstance(unit, Gather):
            return {self._key(unit.target, unit.offset)}
        return {self._key(one.target, one.target_offset) for one in _members(unit)}

    def _key(self, target: int, offset: int) -> Key:
        return target, bisect_right(self._starts[target], offset) - 1

    def _without_proven(self, group: TensorCopies) -> TensorCopies:
        if not self._proven:
            return group

        def left(one: Copy | Turn | Decay) -> bool:
            return self._key(one.target, one.target_offset) not in self._proven

        return replace(
            group,
            copies=tuple(filter(left, group.copies)),
            turns=tuple(filter(left, group.turns)),
            decays=tuple(filter(left, group.decays)),
        )


def _members(group: TensorCopies) -> Iterator[Copy | Turn | Decay]:
    yield from group.copies
    yield from group.turns
    yield from group.decays
