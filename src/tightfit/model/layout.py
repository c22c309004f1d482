"""How an engine's parameters are made from checkpoint tensors, and which piece each rank holds.

A `Weight` is one parameter of the engine before it is cut: `Part`s of checkpoint tensors stacked
along the output dimension (`qkv_proj` is made of `q_proj`, `k_proj` and `v_proj`). `rank_tensor`
cuts it for one rank, and gives a `RankTensor`: its shape, and which boxes of which source tensors
fill it. `plan` sums the bytes of rank tensors, `shard` copies their boxes, `run` loads them.

The cuts are vLLM's (`model_executor/layers/linear.py`, `vocab_parallel_embedding.py`): column
parallel layers split their outputs, row parallel ones their inputs, KV heads fewer than ranks are
replicated, everything else is whole on every rank. vLLM demands that everything divides; our own
runtime also takes uneven shares of whole heads, so that 9 heads can be served on 2 ranks.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum
from functools import lru_cache
from itertools import accumulate
from math import prod

from tightfit.errors import LayoutError
from tightfit.model.parallel import Axis as Axis
from tightfit.model.parallel import Parallel as Parallel
from tightfit.model.parallel import Rank as Rank
from tightfit.model.parallel import deal as deal
from tightfit.model.pieces import Piece as Piece
from tightfit.model.pieces import RankTensor as RankTensor


class Cut(Enum):
    """Along which dimension a weight is cut."""

    NONE = "replicated"
    OUTPUT = "output"
    INPUT = "input"


class Stage(Enum):
    """Which pipeline stages hold a weight that belongs to no layer."""

    FIRST = "first"
    LAST = "last"
    BOTH_ENDS = "both ends"
    EVERY = "every stage"
    """vLLM builds towers on all of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Rows `first_row : first_row + rows` of one checkpoint tensor of `source_rows` rows.

    `source` holds `{expert}` in weights that stack experts of which each has its own tensor. An
    `axis` longer than `rows` means padding with zeros at the end (vocabulary).
    """

    source: str
    rows: int
    axis: Axis | None = None
    first_row: int = 0
    source_rows: int = 0
    repeats: bool = False
    """An earlier part holds the same rows: keys that serve as values too."""
    run_rows: int = 0
    """The source interleaves several parts: so many rows at a time are of this one."""
    run_stride: int = 0
    """Rows from the beginning of a run to that of the next."""
    paired: int = 0
    """Of so many rows, a head's, an engine holds the even ones before the odd ones: Llama 4."""

    def runs(self, first: int, rows: int) -> Iterator[tuple[int, int, int]]:
        """(row in the source, rows, how many came before) of each run of `first : first + rows`."""
        if not self.run_rows:
            yield self.first_row + first, rows, 0
            return
        done = 0
        while done < rows:
            run, inside = divmod(first + done, self.run_rows)
            count = min(self.run_rows - inside, rows - done)
            yield self.first_row + run * self.run_stride + inside, count, done
            done += count


@dataclass(frozen=True, slots=True, kw_only=True)
class Weight:
    """One parameter of the engine, before it is cut.

    Its whole shape is `[experts,] rows[, columns]`; `dtype` is None for the model's own.
    """

    name: str
    parts: tuple[Part, ...]
    columns: int | None = None
    cut: Cut = Cut.NONE
    input_axis: Axis | None = None
    experts: int = 0
    stacked: bool = False
    """The checkpoint holds all experts in one tensor."""
    transposed: bool = False
    """The checkpoint holds `columns, rows`."""
    where: int | Stage
    """The decoder layer, or the pipeline stage."""
    dtype: str | None = None
    engine_dtype: str | None = None
    """What an engine converts it to, where that is another one: vLLM's float32 decay rates."""
    decay: bool = False
    """An engine holds `-exp(x)` in float32 of what the checkpoint holds: Mamba's `A`."""
    linear: bool = False
    """A matrix that quantization applies to."""
    stored_shape: tuple[int, ...] | None = None
    """Shape of the only checkpoint tensor, where it has other dimensions: convolutions."""
    optional: bool = False
    """Some checkpoints leave it out."""
    dropped: bool = False
    """An engine frees it once its kernels have taken what they need."""
    added_once: bool = False
    """Tensor parallel ranks sum their results: only the first has its values, others zeros."""

    def source_shape(self, part: Part) -> tuple[int, ...]:
        """Shape of the checkpoint tensor of a part."""
        if self.stored_shape is not None:
            return self.stored_shape
        rows = part.source_rows or part.rows
        shape = (rows,) if self.columns is None else (rows, self.columns)
        shape = shape[::-1] if self.transposed else shape
        return (self.experts, *shape) if self.stacked else shape

    def rank_shape(self, rank: Rank) -> tuple[int, ...]:
        """Shape on a rank: `[experts,] rows[, columns]`.

        Raises:
            LayoutError: the layout does not divide this weight.
        """
        rows = sum(self._rows(part, rank)[1] for part in self.parts)
        shape = (rows,) if self.columns is None else (rows, self._columns(rank)[1])
        return (rank.experts(self.experts)[1], *shape) if self.experts else shape

    def part_rows(self, rank: Rank) -> tuple[int, ...]:
        """Rows of each part on a rank.

        Raises:
            LayoutError: the layout does not divide this weight.
        """
        return tuple(self._rows(part, rank)[1] for part in self.parts)

    def census(self, rank: Rank) -> "Census":
        """Count the elements of `rank_shape` by why the rank holds them.

        Raises:
            LayoutError: the layout does not divide this weight.
        """
        elements = prod(self.rank_shape(rank))
        row = elements // sum(self._rows(part, rank)[1] for part in self.parts)
        dealt = self.experts > 0 and rank.parallel.expert_parallel
        inner = self.input_axis if self.cut is Cut.INPUT else None
        whole = self.cut is Cut.NONE or (inner is not None and inner.is_whole(rank))
        whole = whole and rank.tp_rank > 0 and not dealt
        if not self._has_values(rank):
            return Census(elements=elements, padding=elements, copies=0)
        padding = copies = 0
        for part in self.parts:
            first, rows = self._rows(part, rank)
            present = max(0, min(rows, part.rows - first))
            padding += (rows - present) * row
            shared = self.cut is Cut.OUTPUT and part.axis and part.axis.is_copy(rank)
            if part.repeats or whole or (shared and not dealt):
                copies += present * row
        if self.where in (Stage.BOTH_ENDS, Stage.EVERY) and rank.pp_rank > 0:
            copies = elements - padding
        if inner is not None and self.columns is not None:
            first, columns = self._columns(rank)
            absent = columns - max(0, min(columns, self.columns - first))
            padding += elements // columns * absent
        return Census(elements=elements, padding=padding, copies=copies)

    def held_dtype(self, dtype: str) -> str:
        """The dtype in which an engine that computes in `dtype` holds it."""
        return self.engine_dtype or self.dtype or dtype

    def rank_tensor(self, rank: Rank, dtype: str) -> "RankTensor":
        """Cut for one rank; `dtype` is used unless the weight has its own.

        Raises:
            LayoutError: the layout does not divide this weight.
        """
        spans = [self._rows(part, rank) for part in self.parts]
        starts = [0, *accumulate(rows for _, rows in spans)]
        pieces: list[Piece] = []
        for part, (first, rows), at in zip(self.parts, spans, starts, strict=False):
            present = min(rows, part.rows - first)
            if present > 0 and self._has_values(rank):
                pieces += self._pieces(part, first, present, at, rank)
        return RankTensor(
            name=self.name,
            parameter=self.name,
            dtype="F32" if self.decay else self.dtype or dtype,
            shape=self.held_shape(rank),
            pieces=tuple(replace(p, decay=True) for p in pieces) if self.decay else tuple(pieces),
        )

    def held_shape(self, rank: Rank) -> tuple[int, ...]:
        """Shape on a rank with all dimensions that the checkpoint gives it.

        Raises:
            LayoutError: the layout does not divide this weight.
        """
        shape = self.rank_shape(rank)
        if self.stored_shape is None or self.experts:
            return shape
        return (shape[0] // self._rows_of_one, *self.stored_shape[1:])

    @property
    def _rows_of_one(self) -> int:
        """Rows of this description in one step of the first dimension of `stored_shape`."""
        if self.stored_shape is None or self.experts:
            return 1
        return prod(self.stored_shape[1:]) // (self.columns or 1)

    def _pieces(self, part: Part, first: int, rows: int, at: int, rank: Rank) -> Iterator["Piece"]:
        if part.paired:
            yield from self._every_other(part, first, rows, at)
            return
        for row, count, before in part.runs(first, rows):
            yield from self._boxes(part, row, count, at + before, rank)

    def _every_other(self, part: Part, first: int, rows: int, at: int) -> Iterator["Piece"]:
        """The even rows of each head, then its odd ones."""
        assert self.columns is not None
        assert self.cut is not Cut.INPUT
        shape, half = self.source_shape(part), part.paired // 2
        assert first % part.paired == rows % part.paired == 0
        for row in range(0, rows, part.paired):
            for odd in (0, 1):
                yield Piece(
                    source=part.source,
                    source_shape=shape,
                    view=(shape[0] // 2, 2 * shape[1]),
                    start=((first + row) // 2, odd * self.columns),
                    shape=(half, self.columns),
                    at=(at + row + odd * half, 0),
                )

    def _boxes(self, part: Part, row: int, rows: int, at: int, rank: Rank) -> Iterator["Piece"]:
        """One box, or one for each expert, of consecutive rows of a source."""
        source_shape = self.source_shape(part)
        if self.stored_shape is not None and not self.experts:
            unit = self._rows_of_one
            assert self.cut is not Cut.INPUT
            yield Piece(
                source=part.source,
                source_shape=source_shape,
                start=(row // unit, *(0 for _ in source_shape[1:])),
                shape=(rows // unit, *source_shape[1:]),
                at=(at // unit, *(0 for _ in source_shape[1:])),
            )
            return
        start: tuple[int, ...] = (row,)
        shape: tuple[int, ...] = (rows,)
        where: tuple[int, ...] = (at,)
        if self.columns is not None:
            column, columns = self._columns(rank)
            columns = min(columns, self.columns - column)
            if columns <= 0:
                return
            start, shape, where = (row, column), (rows, columns), (at, 0)
        turned = self.transposed and self.columns is not None
        if turned:
            start, shape = start[::-1], shape[::-1]
        first_expert, experts = rank.experts(self.experts) if self.experts else (0, 1)
        if self.stacked and self.stored_shape is None:
            yield Piece(
                source=part.source,
                source_shape=source_shape,
                start=(first_expert, *start),
                shape=(experts, *shape),
                at=(0, *where),
                transposed=turned,
            )
            return
        flat = source_shape[0] // self.experts if self.stacked else 0
        for expert in range(experts):
            number = first_expert + expert
            yield Piece(
                source=part.source.format(expert=number) if self.experts else part.source,
                source_shape=source_shape,
                start=(start[0] + number * flat, *start[1:]),
                shape=shape,
                at=(expert, *where) if self.experts else where,
                transposed=turned,
            )

    def _rows(self, part: Part, rank: Rank) -> tuple[int, int]:
        if part.axis is None:
            return 0, part.rows
        if self.cut is not Cut.OUTPUT or self._keeps_width(rank):
            return 0, part.axis.rows
        return part.axis.span(rank.for_experts() if self.experts else rank)

    def _columns(self, rank: Rank) -> tuple[int, int]:
        assert self.columns is not None
        if self.cut is not Cut.INPUT or self.input_axis is None or self._keeps_width(rank):
            return 0, self.columns
        return self.input_axis.span(rank.for_experts() if self.experts else rank)

    def _has_values(self, rank: Rank) -> bool:
        return not self.added_once or rank.tp_rank == 0 or self._keeps_width(rank)

    def _keeps_width(self, rank: Rank) -> bool:
        """Experts are dealt whole."""
        return self.experts > 0 and rank.parallel.expert_parallel


@dataclass(frozen=True, slots=True, kw_only=True)
class Census:
    """Elements of a weight on one rank.

    Summed over all ranks, `elements - padding - copies` is what the checkpoint holds.
    """

    elements: int
    padding: int
    copies: int
    """Held by a lower rank as well."""


@lru_cache(maxsize=1024)
def pipeline_layers(num_layers: int, pipeline_parallel_size: int, pp_rank: int) -> range:
    """The layers of a pipeline stage (vLLM's `distributed/utils.py: get_pp_indices`).

    A remainder goes to the stages before the last one, backwards.

    Raises:
        LayoutError: fewer layers than stages.
    """
    if pipeline_parallel_size > num_layers:
        raise LayoutError(
            f"pipeline parallel size {pipeline_parallel_size} is more than "
            f"num_hidden_layers = {num_layers}",
            hint=f"use at most {num_layers}",
        )
    base, remainder = divmod(num_layers, pipeline_parallel_size)
    sizes = [base] * pipeline_parallel_size
    for i in range(2, remainder + 2):
        sizes[-i] += 1
    first = sum(sizes[:pp_rank])
    return range(first, first + sizes[pp_rank])


def on_rank(weight: Weight, rank: Rank, num_layers: int) -> bool:
    """Whether the pipeline stage of a rank holds a weight."""
    stages = rank.parallel.pipeline_parallel_size
    if isinstance(weight.where, int):
        return weight.where in pipeline_layers(num_layers, stages, rank.pp_rank)
    first, last = rank.pp_rank == 0, rank.pp_rank == stages - 1
    return {
        Stage.FIRST: first,
        Stage.LAST: last,
        Stage.BOTH_ENDS: first or last,
        Stage.EVERY: True,
    }[weight.where]
