"""The files of one rank: which tensors are in which part, and at which offset.

Everything about the output is known before a byte is read: names, sizes, headers, offsets.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from tightfit.checkpoint.header import encode_header
from tightfit.model.layout import Rank, RankTensor

PAGE_BYTES = 4096

Checksums = dict[tuple[str, str], str]
"""The 128-bit XXH3 of tensors, by file and name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """A tensor at its place: `offset` counts from the start of the file."""

    tensor: RankTensor
    offset: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One file of a rank, complete but for the data."""

    name: str
    rank: Rank
    header: bytes
    placed: tuple[Placed, ...]

    @property
    def nbytes(self) -> int:
        """Size of the file."""
        return len(self.header) + sum(one.tensor.nbytes for one in self.placed)


def file_name(rank: Rank, part: int) -> str:
    """vLLM's names (`model_loader/sharded_state_loader.py`)."""
    if rank.parallel.pipeline_parallel_size > 1:
        return f"model-pp-{rank.pp_rank}-tp-{rank.tp_rank}-part-{part}.safetensors"
    return f"model-rank-{rank.tp_rank}-part-{part}.safetensors"


def make_parts(rank: Rank, tensors: Iterable[RankTensor], max_shard_bytes: int) -> tuple[Part, ...]:
    """Fill parts of at most `max_shard_bytes` of data; a larger tensor gets a part of its own."""
    return tuple(
        make_part(file_name(rank, number), rank, members)
        for number, members in enumerate(fill(tensors, max_shard_bytes))
    )


def fill(tensors: Iterable[RankTensor], max_shard_bytes: int) -> list[list[RankTensor]]:
    """Distribute tensors over files, in their order."""
    parts: list[list[RankTensor]] = [[]]
    room = max_shard_bytes
    for tensor in tensors:
        if tensor.nbytes > room and parts[-1]:
            parts.append([])
            room = max_shard_bytes
        parts[-1].append(tensor)
        room -= tensor.nbytes
    return parts


def make_part(
    name: str,
    rank: Rank,
    tensors: Sequence[RankTensor],
    *,
    metadata: Mapping[str, str] | None = None,
) -> Part:
    """Give the tensors of one file their places."""
    # safetensors allows no gaps. In descending order of alignment every tensor begins at a multiple
    # of its own, and large ones at a page: good for mmap, direct reads and reflinks.
    ordered = sorted(tensors, key=lambda tensor: -_alignment(tensor.nbytes))
    entries = [(t.name, t.dtype, t.shape, t.nbytes) for t in ordered]
    header = encode_header(entries, metadata=metadata)
    placed: list[Placed] = []
    offset = len(header)
    for tensor in ordered:
        placed.append(Placed(tensor=tensor, offset=offset))
        offset += tensor.nbytes
    return Part(name=name, rank=rank, header=header, placed=tuple(placed))


def _alignment(nbytes: int) -> int:
    """The largest power of two that divides a size, at most a page."""
    return min(nbytes & -nbytes, PAGE_BYTES) if nbytes else PAGE_BYTES


def natural(name: str) -> tuple[tuple[int, str], ...]:
    """To sort names by: layer 2 before layer 10."""
    return tuple((int(w), "") if w.isdecimal() else (-1, w) for w in re.split(r"(\d+)", name))
