"""`tightfit merge`: the Hugging Face checkpoint back from the files of all ranks, byte for byte.

Padding and copies are dropped; every tensor has the bytes and the name that it had in the source.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from tightfit.checkpoint.checkpoint import Checkpoint
from tightfit.checkpoint.files import INDEX
from tightfit.checkpoint.writer import OutputDirectory, check_free_space
from tightfit.errors import CheckpointError
from tightfit.model.layout import Piece, Rank, RankTensor
from tightfit.sharding.agreement import check_rank_files
from tightfit.sharding.boxes import key, whole
from tightfit.sharding.copies import TensorCopies
from tightfit.sharding.gather import Gather, copied_bytes, plan, run_gather
from tightfit.sharding.parts import Part, fill, make_part, natural
from tightfit.sharding.progress import Progress
from tightfit.sharding.rank_files import RankFiles, open_rank_files
from tightfit.sharding.side_files import config_text, copy_side_files
from tightfit.sharding.stream import SourceFiles, run_copies

# transformers refuses files that do not say so.
_METADATA = {"format": "pt"}


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeJob:
    """Everything about a merge before the first weight is read.

    `not_returned` are tensors of the source that engines do not load, and that rank files have
    never held.
    """

    ranks: RankFiles
    parts: tuple[Part, ...]
    copies: tuple[TensorCopies, ...]
    gathers: tuple[Gather, ...]
    not_returned: tuple[str, ...]

    @property
    def output_bytes(self) -> int:
        """Bytes of all weight files."""
        return sum(part.nbytes for part in self.parts)


def prepare_merge(checkpoint: Checkpoint, *, max_shard_bytes: int) -> MergeJob:
    """Decide what goes where.

    Raises:
        CheckpointError: it is not sharded, or parts of a tensor are missing.
        VerificationError: the files are not what their manifest says.
        LayoutError: there is no manifest, and no known layout fits.
    """
    if not checkpoint.is_sharded:
        raise CheckpointError(
            f"{checkpoint.name} is not sharded: there is nothing to merge",
            hint="give a directory that `tightfit shard`, or vLLM's own script, has written",
        )
    ranks = open_rank_files(checkpoint)
    left_out = ranks.manifest.left_out if ranks.manifest is not None else {}
    names = {**ranks.sources, **ranks.originals}
    tensors = [_whole(name, name, ranks) for name in names]
    tensors += [_whole(name, twin, ranks) for name, twin in left_out.items() if twin is not None]
    tensors.sort(key=lambda tensor: natural(tensor.name))
    groups = fill(tensors, max_shard_bytes)
    parts = tuple(
        make_part(_file_name(number, len(groups)), Rank(), members, metadata=_METADATA)
        for number, members in enumerate(groups)
    )
    copies, gathers = plan([_as_seen(part, ranks, left_out) for part in parts], ranks.infos)
    return MergeJob(
        ranks=ranks,
        parts=parts,
        copies=copies,
        gathers=gathers,
        not_returned=tuple(name for name, twin in left_out.items() if twin is None),
    )


def merge(job: MergeJob, directory: Path, progress: Progress) -> None:
    """Check the rank files, and write the checkpoint, all or nothing.

    Raises:
        OutputError: the directory is not empty, or cannot be written.
        VerificationError: a tensor is damaged, or ranks hold different copies of it.
        CheckpointError: a rank file is truncated, or changed meanwhile.
    """
    check_free_space(directory, job.output_bytes)
    checkpoint = job.ranks.checkpoint
    with OutputDirectory(directory) as output, SourceFiles(checkpoint.source) as files:
        check_rank_files(job.ranks, files, progress)
        targets = [output.create(part.name, part.nbytes) for part in job.parts]
        for part, target in zip(job.parts, targets, strict=True):
            os.pwrite(target.fd, part.header, 0)
        progress.phase("copying", copied_bytes(job.copies, job.gathers))
        run_copies(job.copies, files, [target.fd for target in targets], progress.advance)
        for gather in job.gathers:
            run_gather(gather, files, targets[gather.target].fd, progress.advance)
        files.check_unchanged()
        copy_side_files(checkpoint, output, config_text(checkpoint.config))
        if len(job.parts) > 1:
            output.write_text(INDEX, _index(job.parts))
        output.commit()


def _whole(name: str, source: str, ranks: RankFiles) -> RankTensor:
    """A tensor of the source, from wherever its boxes are."""
    if source in ranks.originals:
        info = ranks.originals[source]
        pieces: tuple[Piece, ...] = (whole(info, key(info)),)
    elif source in ranks.sources:
        info = ranks.sources[source]
        if any(one.piece.decay for one in ranks.held[source]):
            raise CheckpointError(
                f"{ranks.checkpoint.name} holds what an engine computes of {source!r}, and not "
                f"{source!r} itself",
                hint="only directories of `tightfit shard` keep such tensors; merge one of those",
            )
        view = ranks.view(source)
        seen = info if view is None else replace(info, shape=view)
        pieces = ranks.compose(replace(whole(seen, source), view=view))
    else:
        raise CheckpointError(
            f"{ranks.checkpoint.name} has nothing of {source!r}, of which {name!r} is a copy",
            hint="shard the model again",
        )
    return RankTensor(name=name, parameter=None, dtype=info.dtype, shape=info.shape, pieces=pieces)


def _as_seen(part: Part, ranks: RankFiles, twins: Mapping[str, str | None]) -> Part:
    """The part with the shapes in which pieces speak of its tensors."""
    placed = []
    for one in part.placed:
        name = one.tensor.name
        view = ranks.view(twins.get(name) or name) if name not in ranks.originals else None
        shape = view or one.tensor.shape
        placed.append(replace(one, tensor=replace(one.tensor, shape=shape)))
    return replace(part, placed=tuple(placed))


def _file_name(number: int, count: int) -> str:
    if count == 1:
        return "model.safetensors"
    return f"model-{number + 1:05}-of-{count:05}.safetensors"


def _index(parts: tuple[Part, ...]) -> str:
    placed = [(one.tensor, part.name) for part in parts for one in part.placed]
    document = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor, _ in placed)},
        "weight_map": {tensor.name: file for tensor, file in placed},
    }
    return json.dumps(document, indent=2, sort_keys=True) + "\n"
