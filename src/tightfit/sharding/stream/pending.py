"""Which tensors of the output are still to be written, and when each is complete."""

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from tightfit.sharding.copies import Copy, Decay, TensorCopies, Turn
from tightfit.sharding.gather import Gather
from tightfit.sharding.parts import Part, Placed

Key = tuple[int, int]
"""Number of the part, and of the tensor in it."""


Unit = TensorCopies | Gather


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """All that goes into some tensors, and into no others."""

    units: tuple[Unit, ...]
    keys: tuple[Key, ...]

    @property
    def nbytes(self) -> int:
        """Bytes that are written."""
        return sum(unit.nbytes for unit in self.units)


class Pending:
    """The work that is left once what is `proven` is taken out of it."""

    def __init__(
        self,
        parts: Sequence[Part],
        copies: Iterable[TensorCopies],
        gathers: Iterable[Gather],
        proven: Collection[tuple[str, str]],
        bundles: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self._bundles = bundles
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
        self.gathers = tuple(g for g in gathers if self.key(g.target, g.offset) not in self._proven)
        units: list[Unit] = [*self.copies, *self.gathers]
        self._filled = {key for unit in units for key in self._touched(unit)}

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

    def without_source(self) -> Iterator[Key]:
        """Those of them into which nothing is copied: constants, and nothing but padding."""
        for number, part in enumerate(self._parts):
            for i in range(len(part.placed)):
                if (number, i) not in self._proven and (number, i) not in self._filled:
                    yield number, i

    def placed(self, key: Key) -> Placed:
        """The tensor itself."""
        number, i = key
        return self._parts[number].placed[i]

    def tasks(self) -> tuple[Task, ...]:
        """Work that is independent of all other, the largest first.

        Within a task units are in the order in which they fill their tensors.
        """
        units: list[Unit] = [*self.copies, *self.gathers]
        first: dict[Key | str, int] = {}
        parent = list(range(len(units)))

        def root(i: int) -> int:
            while parent[i] != i:
                parent[i] = i = parent[parent[i]]
            return i

        touched = [sorted(self._touched(unit)) for unit in units]
        for i, keys in enumerate(touched):
            tied: list[Key | str] = [*keys, *self._bundle(units[i])]
            for key in tied:
                parent[root(i)] = root(first.setdefault(key, i))
        found: defaultdict[int, list[int]] = defaultdict(list)
        for i in range(len(units)):
            found[root(i)].append(i)
        tasks = []
        for members in found.values():
            members.sort(key=lambda i: _first_place(units[i]))
            filled = dict.fromkeys(key for i in members for key in touched[i])
            tasks.append(Task(units=tuple(units[i] for i in members), keys=tuple(filled)))
        return tuple(sorted(tasks, key=lambda task: -task.nbytes))

    def _bundle(self, unit: Unit) -> tuple[str, ...]:
        if isinstance(unit, Gather) or unit.source.name not in self._bundles:
            return ()
        return (self._bundles[unit.source.name],)

    def _touched(self, unit: Unit) -> set[Key]:
        if isinstance(unit, Gather):
            return {self.key(unit.target, unit.offset)}
        return {self.key(one.target, one.target_offset) for one in _members(unit)}

    def key(self, target: int, offset: int) -> Key:
        """The tensor that a place in a part belongs to."""
        return target, bisect_right(self._starts[target], offset) - 1

    def _without_proven(self, group: TensorCopies) -> TensorCopies:
        if not self._proven:
            return group

        def left(one: Copy | Turn | Decay) -> bool:
            return self.key(one.target, one.target_offset) not in self._proven

        return replace(
            group,
            copies=tuple(filter(left, group.copies)),
            turns=tuple(filter(left, group.turns)),
            decays=tuple(filter(left, group.decays)),
        )


def _first_place(unit: Unit) -> tuple[int, int]:
    if isinstance(unit, Gather):
        return unit.target, unit.offset
    return min((one.target, one.target_offset) for one in _members(unit))


def _members(group: TensorCopies) -> Iterator[Copy | Turn | Decay]:
    yield from group.copies
    yield from group.turns
    yield from group.decays
