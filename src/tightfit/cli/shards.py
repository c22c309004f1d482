"""MODEL as an output of `tightfit shard`: its manifest, and the size that it was cut for."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tightfit.sharding.manifest import Manifest


def read_shards(model: str) -> "Manifest | None":
    """The manifest of a sharded directory; None for anything else.

    Raises:
        VerificationError: there are rank files, but no readable manifest.
    """
    directory = Path(model)
    patterns = ("model-rank-*-part-*.safetensors", "model-pp-*-tp-*-part-*.safetensors")
    if not directory.is_dir() or not any(list(directory.glob(pattern)) for pattern in patterns):
        return None
    from tightfit.sharding.manifest import read_manifest

    return read_manifest(directory)


def tensor_parallel_size(asked: int | None, shards: "Manifest | None", model: str) -> int:
    """The size that was asked for, or that of the shards, or 1.

    Raises:
        VerificationError: the shards were cut for another size than was asked for.
    """
    if shards is None:
        return 1 if asked is None else asked
    from tightfit.sharding.verify import check_tensor_parallel_size

    return check_tensor_parallel_size(shards, asked, model)
