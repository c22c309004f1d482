"""Boxes of source tensors that rank files hold, and how they make up any other box.

Merging and cutting again are the same thing: a tensor that is wanted is a box of a checkpoint's
tensor, and rank files hold other boxes of it. Their intersections are what has to be copied. What
several ranks hold has one owner, the first of them; the others are copies, and have to agree.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod

from tightfit.checkpoint.header import TensorInfo
from tightfit.errors import CheckpointError
from tightfit.model.layout import Piece, RankTensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """A tensor of a rank file, and the box of a source tensor that a piece of it holds."""

    tensor: TensorInfo
    piece: Piece


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """The elements from `start` up to `stop` of a source tensor."""

    start: tuple[int, ...]
    stop: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Its extents."""
        return tuple(b - a for a, b in zip(self.start, self.stop, strict=True))

    def common(self, other: "Box") -> "Box | None":
        """What both hold; None for nothing."""
        start = tuple(map(max, self.start, other.start))
        stop = tuple(map(min, self.stop, other.stop))
        if any(a >= b for a, b in zip(start, stop, strict=True)):
            return None
        return Box(start=start, stop=stop)

    def without(self, inner: "Box") -> Iterator["Box"]:
        """The rest around a box that lies inside this one, as disjoint boxes."""
        start, stop = list(self.start), list(self.stop)
        for i, (first, last) in enumerate(zip(inner.start, inner.stop, strict=True)):
            if start[i] < first:
                yield Box(start=tuple(start), stop=(*stop[:i], first, *stop[i + 1 :]))
            if last < stop[i]:
                yield Box(start=(*start[:i], last, *start[i + 1 :]), stop=tuple(stop))
            start[i], stop[i] = first, last


@dataclass(frozen=True, slots=True, kw_only=True)
class Owned:
    """A box of a source tensor, and the only place where it is read."""

    box: Box
    held: Held


@dataclass(frozen=True, slots=True, kw_only=True)
class Replica:
    """A box that `copy` holds as well as `owner`."""

    box: Box
    owner: Held
    copy: Held


def box_of(piece: Piece) -> Box:
    """The box of the source that a piece takes."""
    stop = tuple(a + n for a, n in zip(piece.start, piece.shape, strict=True))
    return Box(start=piece.start, stop=stop)


def own(held: Iterable[Held]) -> tuple[tuple[Owned, ...], tuple[Replica, ...]]:
    """Give every element to the first that holds it, and list what others hold again."""
    owned: list[Owned] = []
    replicas: list[Replica] = []
    for one in held:
        rest = [box_of(one.piece)]
        for before in tuple(owned):
            left: list[Box] = []
            for box in rest:
                common = box.common(before.box)
                if common is None:
                    left.append(box)
                    continue
                replicas.append(Replica(box=common, owner=before.held, copy=one))
                left += box.without(common)
            rest = left
            if not rest:
                break
        owned += (Owned(box=box, held=one) for box in rest if 0 not in box.shape)
    return tuple(owned), tuple(replicas)


def compose(wanted: Piece, owned: Iterable[Owned]) -> tuple[tuple[Piece, ...], int]:
    """Take a piece from where its elements are.

    Returns:
        Pieces whose sources are tensors of rank files (`key`), with the dimensions of those, and
        how many of the wanted elements nobody holds.

    Raises:
        CheckpointError: only what was computed of them is held.
    """
    outer = box_of(wanted)
    found: list[Piece] = []
    left = _count(outer)
    for one in owned:
        if not left:
            break
        common = outer.common(one.box)
        if common is not None:
            found.append(_through(common, one.held, wanted))
            left -= _count(common)
    return tuple(found), left


def whole(info: TensorInfo, source: str) -> Piece:
    """The piece that is all of a tensor, under the name `source`."""
    zeros = tuple(0 for _ in info.shape)
    return Piece(source=source, source_shape=info.shape, start=zeros, shape=info.shape, at=zeros)


def whole_tensor(info: TensorInfo) -> RankTensor:
    """A tensor that is written as it is."""
    return RankTensor(
        name=info.name,
        parameter=None,
        dtype=info.dtype,
        shape=info.shape,
        pieces=(whole(info, info.name),),
    )


def place(box: Box, held: Held) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Start and shape of a box of the source, inside the tensor that holds it."""
    return _land(box, held.piece)


def key(tensor: TensorInfo) -> str:
    """A name for a tensor of a rank file: equal names are in all ranks."""
    return f"{tensor.file}\0{tensor.name}"


def fits(piece: Piece, shape: tuple[int, ...]) -> bool:
    """Whether the boxes of a piece lie inside its source and a target of this shape.

    Manifests come from a file; nothing that is planned from them checks it again.
    """
    source = piece.source_shape if piece.view is None else piece.view
    there = piece.shape
    if piece.transposed:
        there = (*there[:-2], *there[-2:][::-1])
    depth = len(shape) - len(there)
    return (
        depth >= 0
        and len(piece.start) == len(there) == len(source)
        and len(piece.at) == len(shape)
        and (not piece.transposed or len(there) >= 2)
        and prod(source) == prod(piece.source_shape)
        and _inside(piece.at, (1,) * depth + there, shape)
        and _inside(piece.start, piece.shape, source)
        # Rates are computed of whole rows.
        and not (piece.decay and (piece.transposed or piece.shape[1:] != source[1:]))
        and not (piece.decay and piece.shape[1:] != shape[1:])
    )


def _inside(start: tuple[int, ...], shape: tuple[int, ...], whole: tuple[int, ...]) -> bool:
    return all(a + n <= m for a, n, m in zip(start, shape, whole, strict=True))


def _through(box: Box, held: Held, wanted: Piece) -> Piece:
    if held.piece.decay and not wanted.decay:
        raise CheckpointError(
            f"{held.tensor.file}: {held.tensor.name!r} holds decay rates, from which nobody gets "
            f"the exact values of {wanted.source!r} back",
            hint="shard the model again, from the checkpoint that it was made of",
        )
    start, shape = _land(box, held.piece)
    at, _ = _land(box, wanted)
    return Piece(
        source=key(held.tensor),
        source_shape=held.tensor.shape,
        start=start,
        shape=shape,
        at=at,
        transposed=held.piece.transposed != wanted.transposed,
        decay=wanted.decay and not held.piece.decay,
    )


def _land(box: Box, piece: Piece) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Where a box inside a piece's own lands in the piece's target, and with which shape."""
    inside = tuple(a - b for a, b in zip(box.start, piece.start, strict=True))
    shape = box.shape
    if piece.transposed:
        inside = (*inside[:-2], inside[-1], inside[-2])
        shape = (*shape[:-2], shape[-1], shape[-2])
    depth = len(piece.at) - len(inside)
    moved = (*(0 for _ in range(depth)), *inside)
    at = tuple(a + b for a, b in zip(piece.at, moved, strict=True))
    return at, (*(1 for _ in range(depth)), *shape)


def _count(box: Box) -> int:
    count = 1
    for extent in box.shape:
        count *= extent
    return count
