"""MODEL as an output of `tightfit shard`: its manifest, and the layout that it was cut for."""

import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tightfit.errors import UnsupportedModelError, UsageError, VerificationError

if TYPE_CHECKING:
    from tightfit.model.parallel import Parallel
    from tightfit.sharding.manifest import Manifest


def read_shards(model: str) -> "Manifest | None":
    """The manifest of a sharded directory; None for anything else.

    Raises:
        VerificationError: there are rank files, but no readable manifest.
    """
    directory = Path(model)
    patterns = ("model-rank-*-part-*.safetensors", "model-pp-*-tp-*-part-*.safetensors")
    if not os.path.isdir(directory) or not any(
        list(directory.glob(pattern)) for pattern in patterns
    ):
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


def options_of_shards(
    asked: Mapping[str, Any], shards: "Manifest | None", model: str
) -> dict[str, Any]:
    """What `plan` was asked, and what follows from the files.

    Raises:
        VerificationError: the shards were cut for another layout than was asked for.
    """
    size = tensor_parallel_size(asked.get("tensor_parallel_size"), shards, model)
    found = {**asked, "tensor_parallel_size": size}
    if shards is None:
        return found
    cut = {
        "pipeline_parallel_size": shards.pipeline_parallel_size,
        "enable_expert_parallel": shards.expert_parallel,
    }
    for name, value in cut.items():
        if asked.get(name) not in (None, value):
            raise VerificationError(
                f"{model} was sharded with {name} = {value}, not {asked[name]}",
                hint="plan without that option, or shard the model again",
            )
        if value != (1 if name == "pipeline_parallel_size" else False):
            found[name] = value
    if asked.get("engine") in (None, "vllm") and asked.get("load_format") is None:
        found["load_format"] = "sharded_state"
    return found


def require_one_layout(axes: Sequence[str], model: str) -> None:
    """Refuse to sweep over what the files of a sharded model decide.

    Raises:
        UsageError: one of the axes does.
    """
    for axis in axes:
        name = axis.partition("=")[0].strip().lstrip("-").replace("-", "_")
        if name in ("tensor_parallel_size", "pipeline_parallel_size", "enable_expert_parallel"):
            raise UsageError(
                f"--sweep {axis}: {model} is sharded, for one layout",
                hint="sweep over the plain checkpoint",
            )


def served(out: str, layout: "Parallel | Manifest") -> str:
    """The command by which vLLM serves a directory of rank files."""
    return f"vllm serve {shlex.quote(out)} {served_with(layout)}"


def served_with(layout: "Parallel | Manifest", load_format: str = "sharded_state") -> str:
    """The flags of that command."""
    stages = layout.pipeline_parallel_size
    flags = f"--load-format {load_format} --tensor-parallel-size {layout.tensor_parallel_size}"
    flags += f" --pipeline-parallel-size {stages}" if stages > 1 else ""
    return flags + (" --enable-expert-parallel" if layout.expert_parallel else "")


def require_runnable(manifest: "Manifest", where: str) -> None:
    """Refuse files that our own runtime cannot serve, which cuts experts and does not deal them.

    Raises:
        UnsupportedModelError: the files are of such a layout.
    """
    if not manifest.expert_parallel:
        return
    size = manifest.tensor_parallel_size
    raise UnsupportedModelError(
        f"{where} was cut with whole experts for each rank, and the built-in runtime gives every "
        "rank a slice of each",
        hint=f"`tightfit shard {where} OUT2 --tensor-parallel-size {size}` cuts it again "
        f"for that; or serve it with `{served(where, manifest)}`",
    )
