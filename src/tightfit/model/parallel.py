"""Parallel layouts: their ranks, and how rows or columns in whole units go to them.

The rules are vLLM's (`model_executor/layers/linear.py`, `distributed/parallel_state.py`); our own
runtime also deals uneven shares.
"""

from dataclasses import dataclass, replace

from tightfit.errors import LayoutError
from tightfit.units import cdiv


@dataclass(frozen=True, slots=True, kw_only=True)
class Parallel:
    """The sizes of a parallel layout, and whether shares may differ in size.

    Data parallel replicas hold alike ranks, except that experts are dealt to the ranks of all
    replicas: by width, or whole ones if `expert_parallel`.
    """

    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    data_parallel_size: int = 1
    expert_parallel: bool = False
    uneven: bool = False

    @property
    def world_size(self) -> int:
        """All ranks of a replica."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    @property
    def expert_ranks(self) -> int:
        """Ranks that share the experts of a layer."""
        return self.tensor_parallel_size * self.data_parallel_size

    def ranks(self) -> tuple["Rank", ...]:
        """Every rank, in vLLM's order: tensor parallel ranks are neighbours."""
        return tuple(
            Rank(tp_rank=tp, pp_rank=pp, parallel=self)
            for pp in range(self.pipeline_parallel_size)
            for tp in range(self.tensor_parallel_size)
        )

    def for_experts(self) -> "Parallel":
        """The layout as the width of experts sees it: replicas share it like ranks."""
        return replace(self, tensor_parallel_size=self.expert_ranks, data_parallel_size=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rank:
    """One rank of a layout."""

    tp_rank: int = 0
    pp_rank: int = 0
    parallel: Parallel = Parallel()

    @property
    def rank(self) -> int:
        """Its number among all ranks."""
        return self.pp_rank * self.parallel.tensor_parallel_size + self.tp_rank

    @property
    def is_first_stage(self) -> bool:
        """Whether tokens enter here."""
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether logits come out here."""
        return self.pp_rank == self.parallel.pipeline_parallel_size - 1

    def for_experts(self) -> "Rank":
        """The rank among all that share the experts; it is of the first replica."""
        if self.parallel.data_parallel_size == 1:
            return self
        return replace(self, parallel=self.parallel.for_experts())

    def experts(self, count: int) -> tuple[int, int]:
        """First expert and number of experts; vLLM gives a remainder to the first ranks.

        Raises:
            LayoutError: fewer experts than ranks.
        """
        if not self.parallel.expert_parallel:
            return 0, count
        ranks = self.parallel.expert_ranks
        if count < ranks:
            raise LayoutError(f"{ranks} ranks share experts, and there are {count}")
        each, more = divmod(count, ranks)
        first = self.tp_rank * each + min(self.tp_rank, more)
        return first, each + (self.tp_rank < more)


def deal(count: int, shares: int, index: int, *, uneven: bool) -> tuple[int, int] | None:
    """Share `count` things: (first, number) for share `index`; None when it cannot be done."""
    if count < shares or (count % shares and not uneven):
        return None
    first = count * index // shares
    return first, count * (index + 1) // shares - first


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """Rows (or columns) that go to ranks in whole units, such as heads.

    `groups` are units that stay together as long as there are enough groups for the ranks: the
    query heads of one KV head. With more ranks than groups every group belongs to several ranks,
    which share its units, or hold the same ones if the axis is `replicated` (the KV heads).
    """

    label: str
    units: int
    unit_rows: int = 1
    groups: int | None = None
    replicated: bool = False
    whole_unless: int | None = None
    """Whole on every rank unless their number divides this: vision towers of vLLM that fall back
    to data parallelism when their heads cannot be dealt."""
    block: int = 1
    """So many rows of the units are one row here: the scales or the words of quantized weights."""
    block_of: str = "rows"
    """What the blocks are of, for messages."""
    local_blocks: bool = False
    """Blocks begin anew on every rank: scales that an engine computes after cutting."""
    padded: int = 0
    """Shares are multiples of this, and the last ones are filled with zeros: MXFP4 experts."""
    at_least: int = 0
    """Smaller shares are filled with zeros up to this: Kimi's experts."""

    def is_whole(self, rank: Rank) -> bool:
        """Whether nothing is dealt, because `whole_unless` applies."""
        divisor = self.whole_unless
        return divisor is not None and divisor % rank.parallel.tensor_parallel_size > 0

    @property
    def rows(self) -> int:
        """All rows, before they are dealt."""
        return cdiv(self.units * self.unit_rows, self.block)

    def span(self, rank: Rank) -> tuple[int, int]:
        """First row and number of rows of a rank.

        Raises:
            LayoutError: the units cannot be dealt to that many ranks.
        """
        ranks, uneven = rank.parallel.tensor_parallel_size, rank.parallel.uneven
        if self.is_whole(rank):
            return 0, self.rows
        total = self.units * self.unit_rows
        if self.padded:
            each = cdiv(cdiv(total, self.padded), ranks) * self.padded // self.block
            return rank.tp_rank * each, each
        if ranks > 1 and total // ranks < self.at_least and not total % ranks:
            each = self.at_least // self.block
            return rank.tp_rank * each, each
        groups = self.groups or self.units
        per_group = self.units // groups
        share: tuple[int, int] | None = None
        if ranks <= groups or self.groups is None:
            if groups_dealt := deal(groups, ranks, rank.tp_rank, uneven=uneven):
                share = groups_dealt[0] * per_group, groups_dealt[1] * per_group
        elif ranks % groups == 0:
            group, index = divmod(rank.tp_rank, ranks // groups)
            if self.replicated:
                share = group * per_group, per_group
            elif units_dealt := deal(per_group, ranks // groups, index, uneven=uneven):
                share = group * per_group + units_dealt[0], units_dealt[1]
        if share is None:
            what = f"{self.label} = {self.units}"
            raise LayoutError(
                f"tensor parallel size {ranks} does not divide {what}"
                if self.units % ranks or groups == self.units
                else f"tensor parallel size {ranks} does not fit the {groups} groups (KV heads) of "
                f"{what}: one has to divide the other"
            )
        first, rows = share[0] * self.unit_rows, share[1] * self.unit_rows
        if self.local_blocks:
            return first // self.block, cdiv(rows, self.block)
        if first % self.block or (rows % self.block and first + rows < total):
            raise LayoutError(
                f"tensor parallel size {ranks} does not divide the {total:,} {self.block_of} into "
                f"whole blocks of {self.block}"
            )
        return first // self.block, cdiv(rows, self.block)

    def is_copy(self, rank: Rank) -> bool:
        """Whether a lower rank of the same stage holds the same rows."""
        if self.is_whole(rank):
            return rank.tp_rank > 0
        groups = self.groups or self.units
        copies = rank.parallel.tensor_parallel_size // groups
        return self.replicated and copies > 1 and rank.tp_rank % copies > 0

    def in_blocks(self, block: int, block_of: str) -> "Axis":
        """The axis of what stands for blocks of `block` rows, which ranks have to get whole."""
        return replace(self, block=self.block * block, block_of=block_of)
