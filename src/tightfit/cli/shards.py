"""MODEL as an output of `tightfit shard`: its manifest, and the size that it was cut for."""

from pathlib import Path
from typing import TYPE_CHECKING

from tightfit.errors import UnsupportedModelError

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
    from tightfit.sharding.proof.verify import check_tensor_parallel_size

    return check_tensor_parallel_size(shards, asked, model)


def require_runnable(manifest: "Manifest", where: str) -> None:
    """Refuse files that our own runtime cannot serve, which has neither stages nor dealt experts.

    Raises:
        UnsupportedModelError: the files are of such a layout.
    """
    size, stages = manifest.tensor_parallel_size, manifest.pipeline_parallel_size
    flags = f"--load-format sharded_state --tensor-parallel-size {size}"
    if stages > 1:
        why = f"into {stages} pipeline stages"
        flags += f" --pipeline-parallel-size {stages}"
    elif manifest.expert_parallel:
        why = "with whole experts for each rank"
    else:
        return
    flags += " --enable-expert-parallel" if manifest.expert_parallel else ""
    raise UnsupportedModelError(
        f"{where} was cut {why}, and the built-in runtime has tensor parallel ranks only",
        hint=f"`tightfit shard {where} OUT2 --tensor-parallel-size {size * stages}` cuts it again "
        f"for that; or serve it with `vllm serve {where} {flags}`",
    )
