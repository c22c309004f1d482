"""Jobs that write a plain checkpoint, which anything loads: one rank, and an index of its files."""

import json
from collections.abc import Iterable
from dataclasses import dataclass

from tightfit.checkpoint.files import CONFIG, INDEX
from tightfit.model.layout import Rank, RankTensor
from tightfit.sharding.job import Job
from tightfit.sharding.parts import Checksums, Part, fill, make_part
from tightfit.sharding.ranks import plain_manifest
from tightfit.sharding.side_files import config_text

# transformers refuses files that do not say so.
_METADATA = {"format": "pt"}


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainJob(Job):
    """A job of one rank, whose parts are named as transformers names them."""

    verb: str = "merge"
    """What it does, for messages and the names of its own files."""

    @property
    def manifest_name(self) -> str:
        """What vouches for the files, of jobs that write such a thing."""
        return plain_manifest(self.verb)

    @property
    def config_text(self) -> str:
        """What makes a checkpoint of the files."""
        return config_text(self.checkpoint.config)

    def manifest(self, checksums: Checksums) -> bytes | None:
        """What vouches for the files, if anything; `checksums` are by file and tensor name."""
        return None

    @property
    def index(self) -> str | None:
        """What says which tensor is in which file, if they are several."""
        return _index(self.parts) if len(self.parts) > 1 else None

    @property
    def needed(self) -> frozenset[str]:
        """The files without which it is not complete."""
        beside = {CONFIG} if self.index is None else {CONFIG, INDEX}
        return frozenset(beside | {part.name for part in self.parts})


def plain_parts(tensors: Iterable[RankTensor], max_shard_bytes: int) -> tuple[Part, ...]:
    """The files of a plain checkpoint."""
    groups = fill(tensors, max_shard_bytes)
    return tuple(
        make_part(_file_name(number, len(groups)), Rank(), members, metadata=_METADATA)
        for number, members in enumerate(groups)
    )


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
