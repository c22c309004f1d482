"""Everything about a sharding job before the first byte is read: what goes where, and how."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from tightfit import __version__
from tightfit.checkpoint.checkpoint import Checkpoint
from tightfit.checkpoint.describe import describe, require_weights
from tightfit.checkpoint.header import TensorInfo
from tightfit.errors import CheckpointError, LayoutError, UnsupportedModelError, UsageError
from tightfit.model.aliases import require_own_names
from tightfit.model.layout import Parallel, Piece, Rank, RankTensor
from tightfit.model.parameters import check_parallel, parameters
from tightfit.model.spec import ModelSpec
from tightfit.model.stored import StoredLayout, rank_tensors
from tightfit.model.stored.loadable import check_quantization, loading_notes
from tightfit.sharding.boxes import key, whole, whole_tensor
from tightfit.sharding.copies import TensorCopies, plan_copies
from tightfit.sharding.differing import difference_of
from tightfit.sharding.gather import Gather, copied_bytes, plan
from tightfit.sharding.manifest import ORIGINALS
from tightfit.sharding.origin import States, cut_fingerprint, source_fingerprint, source_states
from tightfit.sharding.parts import Part, make_part, make_parts, natural
from tightfit.sharding.rank_files import RankFiles, open_rank_files
from tightfit.sharding.side_files import copied_side_files
from tightfit.units import MiB

_KEPT_BYTES = 256 * MiB
"""What engines do not load is kept beside the ranks up to this size: all of it, or nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Parts to write, and what to copy into them, before the first byte is read.

    `ranks` of `parallel` are those that are written. `cut_again` is the source where that is a
    sharded directory itself. `source_fingerprint` is of the
    plain checkpoint, and `cut_fingerprint` of all ranks, those that are not written included.
    """

    checkpoint: Checkpoint
    parallel: Parallel
    ranks: tuple[int, ...]
    max_shard_bytes: int
    parts: tuple[Part, ...]
    copies: tuple[TensorCopies, ...]
    gathers: tuple[Gather, ...] = ()
    cut_again: RankFiles | None = None
    source_fingerprint: str
    cut_fingerprint: str
    bundles: Mapping[str, str] = field(default_factory=dict)
    """Source tensors that are best read at the same time, as they are computed together."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """What has to be the same to go on with what another call has begun."""
        return {
            "tightfit": __version__,
            "max_shard_bytes": self.max_shard_bytes,
            "source_fingerprint": self.source_fingerprint,
            "cut_fingerprint": self.cut_fingerprint,
        }

    def difference(self, there: Mapping[str, Any]) -> str | None:
        """How the job that something is of differs from this one, in words; None if it does not.

        Args:
            there: its `identity`.
        """
        here = self.identity
        found = (
            difference_of(key, there.get(key), here.get(key))
            for key in dict.fromkeys(("quantized", *here))
            if there.get(key) != here.get(key)
        )
        return next(found, None)

    @property
    def states(self) -> States:
        """Those of the source files that are read now.

        Raises:
            CheckpointError: one is not there.
        """
        names = {group.source.file for group in self.copies}
        names |= {one.file for gather in self.gathers for one in gather.slices}
        return source_states(self.checkpoint.source, names)

    @property
    def inherited_states(self) -> States:
        """Those of the plain checkpoint that a sharded source was made of, if it says them."""
        manifest = None if self.cut_again is None else self.cut_again.manifest
        return {} if manifest is None else manifest.source_states

    @property
    def noted_states(self) -> States:
        """Those that go with the output."""
        return self.inherited_states or self.states

    @property
    def output_bytes(self) -> int:
        """Bytes of all files of weights."""
        return sum(part.nbytes for part in self.parts)

    @property
    def copied_bytes(self) -> int:
        """Bytes of them that come from the source."""
        return copied_bytes(self.copies, self.gathers)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardJob(Job):
    """A job of `shard`; `source_name` and `left_out` are for the manifest."""

    spec: ModelSpec
    layout: StoredLayout
    source_name: str
    left_out: Mapping[str, str | None]
    quantized: Mapping[str, Any] = field(default_factory=dict)
    """How the source is quantized on the way, if it is."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """The layout as well, and what is made of the weights."""
        return {
            **({"quantized": dict(self.quantized)} if self.quantized else {}),
            "layout": self.layout.name,
            "tensor_parallel_size": self.parallel.tensor_parallel_size,
            "pipeline_parallel_size": self.parallel.pipeline_parallel_size,
            "expert_parallel": self.parallel.expert_parallel,
            "world_size": self.parallel.world_size,
            **super(ShardJob, self).identity,
        }

    @property
    def notes(self) -> tuple[str, ...]:
        """What an engine will do with the files that nobody would expect."""
        return (*self.layout.notes, *loading_notes(self.spec, self.parallel))


def prepare(
    checkpoint: Checkpoint,
    layout: StoredLayout,
    *,
    tensor_parallel_size: int,
    pipeline_parallel_size: int = 1,
    expert_parallel: bool = False,
    max_shard_bytes: int,
    ranks: Collection[int] | None = None,
    bundles: Mapping[str, str] = MappingProxyType({}),
    quantized: Mapping[str, Any] = MappingProxyType({}),
) -> ShardJob:
    """Decide what goes where; `ranks` are those to write, or all.

    With `expert_parallel` ranks have whole experts, as vLLM deals them out: linearly. Of a
    checkpoint that is computed while it is read, `bundles` are the tensors that are computed
    together, and `quantized` says how.

    Raises:
        CheckpointError: the source lacks weights, or they are not what config.json says.
        LayoutError: the model cannot be cut that way.
        UnsupportedModelError: the architecture, or its quantization, cannot be sharded yet.
        UsageError: there is no such rank.
    """
    copied_side_files(checkpoint)
    cut_again = open_rank_files(checkpoint) if checkpoint.is_sharded else None
    if cut_again is None:
        require_weights(checkpoint, "shard")
    spec = describe(checkpoint).spec
    require_own_names(spec)
    if not spec.verified_for_sharding:
        raise UnsupportedModelError(
            f"sharding {spec.architecture} is not supported: vLLM's names of its parameters have "
            "not been verified",
            hint="plan it with `tightfit plan`",
        )
    parallel = Parallel(
        tensor_parallel_size=tensor_parallel_size,
        pipeline_parallel_size=pipeline_parallel_size,
        expert_parallel=expert_parallel and tensor_parallel_size > 1,
        uneven=layout.uneven,
    )
    if spec.quantization is not None:
        check_quantization(spec, layout, expert_parallel=parallel.expert_parallel)
    if expert_parallel:
        _check_experts(spec, layout)
    layout.check(spec, parallel)
    try:
        check_parallel(spec, parallel)
    except LayoutError as error:
        if spec.quantization is not None or parallel.expert_parallel:
            raise
        try:
            check_parallel(spec, replace(parallel, uneven=True))
        except LayoutError as worse:
            # Our own runtime cannot do it either, and takes other sizes than that engine.
            raise LayoutError(worse.message, hint=error.hint) from None
        hint = f"{error.hint}; or --layout builtin, which `tightfit run` loads"
        raise LayoutError(error.message, hint=hint) from None
    chosen = _chosen(ranks, parallel)
    sources = checkpoint.tensors() if cut_again is None else cut_again.sources
    shapes = {name: info.shape for name, info in sources.items()}
    tensors = {
        rank: [tensor.settled(shapes) for tensor in rank_tensors(spec, rank, layout)]
        for rank in parallel.ranks()
    }
    parts = [
        part
        for rank in chosen
        for part in make_parts(
            rank, [_with_source_dtype(t, sources) for t in tensors[rank]], max_shard_bytes
        )
    ]
    if cut_again is None:
        pieces = [p for some in tensors.values() for tensor in some for p in tensor.pieces]
        originals, left_out = _originals(spec, sources, pieces)
    else:
        originals = sorted(cut_again.originals.values(), key=lambda info: natural(info.name))
        left_out = dict(cut_again.manifest.left_out) if cut_again.manifest is not None else {}
    if originals and chosen[0].rank == 0:
        # After the other files of the rank, so that the order does not depend on who writes what.
        at = sum(part.rank.rank == 0 for part in parts)
        parts.insert(at, _whole(chosen[0], originals))
    gathers: tuple[Gather, ...] = ()
    if cut_again is None:
        copies = plan_copies(parts, sources)
    else:
        copies, gathers = plan(_from_ranks(parts, cut_again), cut_again.infos)
    manifest = cut_again.manifest if cut_again is not None else None
    return ShardJob(
        checkpoint=checkpoint,
        spec=spec,
        layout=layout,
        parallel=parallel,
        ranks=tuple(rank.rank for rank in chosen),
        max_shard_bytes=max_shard_bytes,
        parts=tuple(parts),
        copies=copies,
        gathers=gathers,
        cut_again=cut_again,
        bundles=bundles,
        quantized=quantized if manifest is None else manifest.quantized,
        source_name=checkpoint.name if manifest is None else manifest.source_name,
        source_fingerprint=(
            source_fingerprint(sources) if manifest is None else manifest.source_fingerprint
        ),
        cut_fingerprint=cut_fingerprint(one for some in tensors.values() for one in some),
        left_out=left_out,
    )


def _check_experts(spec: ModelSpec, layout: StoredLayout) -> None:
    if not any(weight.experts for weight in parameters(spec)):
        raise UsageError(
            f"{spec.architecture} has no experts to deal out",
            hint="leave out --enable-expert-parallel",
        )
    if layout.name == "builtin":
        raise UsageError(
            "the built-in runtime gives every rank a slice of each expert",
            hint="leave out --enable-expert-parallel, or choose a layout of vLLM",
        )


def _chosen(ranks: Collection[int] | None, parallel: Parallel) -> tuple[Rank, ...]:
    if ranks is None:
        return parallel.ranks()
    size = parallel.world_size
    wrong = [rank for rank in ranks if not 0 <= rank < size]
    if wrong or not ranks:
        raise UsageError(
            f"there is no rank {wrong[0]}" if wrong else "no rank was chosen",
            hint=f"ranks go from 0 to {size - 1} (--ranks 0-{size - 1})",
        )
    return tuple(rank for rank in parallel.ranks() if rank.rank in ranks)


def _originals(
    spec: ModelSpec, tensors: Mapping[str, TensorInfo], pieces: Iterable[Piece]
) -> tuple[list[TensorInfo], dict[str, str | None]]:
    """What is kept as it was, and what is left out with the name of its twin if it has one."""
    computed: set[str] = set()
    copied: set[str] = set()
    for piece in pieces:
        (computed if piece.decay else copied).add(piece.source)
    kept, known = [tensors[name] for name in computed], computed | copied
    extra = [info for name, info in tensors.items() if name not in known]
    left_out: dict[str, str | None] = {}
    head = f"{spec.names.head}.weight"
    if spec.tie_word_embeddings and head in tensors and head not in copied:
        left_out[head] = f"{spec.names.embedding}.weight"
        extra = [info for info in extra if info.name != head]
    if sum(info.nbytes for info in extra) <= _KEPT_BYTES:
        kept += extra
    else:
        left_out |= {info.name: None for info in extra}
    return sorted(kept, key=lambda info: natural(info.name)), dict(sorted(left_out.items()))


def _whole(rank: Rank, originals: Iterable[TensorInfo]) -> Part:
    return make_part(ORIGINALS, rank, [whole_tensor(info) for info in originals])


def _from_ranks(parts: Iterable[Part], ranks: RankFiles) -> list[Part]:
    """The same parts, with the pieces where the files of other ranks hold them."""
    found: list[Part] = []
    for part in parts:
        placed = []
        for one in part.placed:
            pieces = composed(part.name, one.tensor.name, one.tensor.pieces, ranks)
            placed.append(replace(one, tensor=replace(one.tensor, pieces=pieces)))
        found.append(replace(part, placed=tuple(placed)))
    return found


def composed(
    file: str, tensor: str, pieces: Iterable[Piece], ranks: RankFiles
) -> tuple[Piece, ...]:
    """What a tensor of a rank's file is made of, as boxes of tensors of other ranks' files.

    Raises:
        CheckpointError: those files do not hold all of it.
    """
    if file != ORIGINALS:
        return tuple(found for piece in pieces for found in ranks.compose(piece))
    if tensor not in ranks.originals:
        raise CheckpointError(
            f"{ranks.checkpoint.name} has no {tensor!r} in {ORIGINALS}",
            hint="shard the model again, or give the model that it was made from",
        )
    info = ranks.originals[tensor]
    return (whole(info, key(info)),)


def _with_source_dtype(tensor: RankTensor, sources: Mapping[str, TensorInfo]) -> RankTensor:
    """Keep the dtype of the source, whatever config.json says; engines cast on loading."""
    if any(piece.decay for piece in tensor.pieces):
        return tensor
    for piece in tensor.pieces:
        if piece.source not in sources:
            raise CheckpointError(
                f"there is nothing of {piece.source!r}, which {tensor.name!r} is made of",
                hint="files are missing, or config.json belongs to another model",
            )
    dtypes = {sources[piece.source].dtype for piece in tensor.pieces}
    if len(dtypes) > 1:
        raise CheckpointError(
            f"the parts of {tensor.name!r} have different dtypes: {', '.join(sorted(dtypes))}",
            hint="save the model in one dtype",
        )
    dtype = dtypes.pop() if dtypes else tensor.dtype
    if dtype == "F8_E8M0" and tensor.dtype == "U8":
        raise UnsupportedModelError(
            f"the parts of {tensor.name!r} have the dtype {dtype}, and vLLM would not take their "
            "bits, but round their values to whole numbers",
            hint="shard a checkpoint that stores such scales as U8",
        )
    return replace(tensor, dtype=dtype)
