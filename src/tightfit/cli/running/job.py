"""A planned model that is to run here: what every way of running needs."""

import importlib.util
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import typer

from tightfit.checkpoint.checkpoint import Checkpoint
from tightfit.cli import options as o
from tightfit.cli.output import explained, status
from tightfit.cli.shards import options_of_shards, read_shards, require_runnable
from tightfit.errors import (
    DeviceError,
    ExitCode,
    MissingExtraError,
    TightfitError,
    UsageError,
)
from tightfit.interrupts import uninterrupted
from tightfit.model.spec import ModelSpec
from tightfit.planner.api import plan_model
from tightfit.planner.devices import Device, available_bytes, this_machine
from tightfit.planner.engines.builtin_transformers import by_transformers
from tightfit.planner.nvml import Gpu, this_gpu, visible_gpus
from tightfit.planner.plan import Plan
from tightfit.units import GiB, MiB, format_bytes

if TYPE_CHECKING:
    from tightfit.runtime.options import EngineOptions
    from tightfit.runtime.ranks.world import World
    from tightfit.sharding.manifest import Manifest

T = TypeVar("T")

TAKEN = frozenset(
    {
        "tensor_parallel_size",
        "pipeline_parallel_size",
        "max_model_len",
        "max_num_seqs",
        "max_num_batched_tokens",
        "gpu_memory_utilization",
        "kv_cache_dtype",
        "kv_cache_memory_bytes",
        "block_size",
        "enforce_eager",
        "cudagraph_capture_sizes",
        "max_cudagraph_capture_size",
        "dtype",
        "load_format",
        "model_impl",
        "cpu_offload_gb",
        "assume_full_attention",
    }
)
"""Options of a plan that the builtin runtime takes; the others are vLLM's."""


_IDLE_BYTES = 64 * MiB
"""A GPU that nobody uses may show so much, and a plan has more in reserve."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A plan that fits, and the files it is made of."""

    checkpoint: Checkpoint
    spec: ModelSpec
    plan: Plan
    shards: "Manifest | None"
    directory: Path
    load_format: str
    attention_backend: str = "auto"
    enable_prefix_caching: bool = True

    @property
    def options(self) -> "EngineOptions":
        """What the engine allocates, as the plan resolved it."""
        from tightfit.runtime.options import EngineOptions

        options, blocks = self.plan.options, self.plan.kv_cache.num_blocks
        assert blocks is not None, "a plan that fits has blocks"
        sizes = options.cudagraph_capture_sizes
        return EngineOptions(
            dtype=options.dtype.value,
            kv_cache_dtype=options.kv_cache_dtype.value,
            max_model_len=options.max_model_len.value,
            max_num_seqs=options.max_num_seqs.value,
            max_num_batched_tokens=options.max_num_batched_tokens.value,
            block_size=options.block_size.value,
            num_blocks=blocks,
            cudagraph_capture_sizes=sizes.value if sizes else (),
            enable_prefix_caching=self.enable_prefix_caching,
            attention_backend=self.attention_backend,
            model_impl="transformers"
            if by_transformers(self.spec, options.asked.model_impl)
            else "builtin",
            cpu_offload_bytes=int(options.asked.cpu_offload_gb * GiB),
        )

    def source(self, rank: int) -> dict[str, Any]:
        """Where the weights of a rank come from: arguments of `session.start`."""
        files = None
        if self.shards is not None:
            files = [self.directory / file.name for file in self.shards.rank_files(rank)]
        return {
            "rank_files": files,
            "layout": self.shards.layout if self.shards else "builtin",
            "load_format": self.load_format,
        }


def require_runtime(command: str, extra: str) -> None:
    """Say what to install if the runtime's packages are missing.

    Raises:
        MissingExtraError: one of them is.
    """
    require_packages(command, extra, ("torch", "tokenizers", "jinja2", "numpy"))


def require_packages(command: str, extra: str, packages: tuple[str, ...]) -> None:
    """Say what to install if one of the packages is missing.

    Raises:
        MissingExtraError: one of them is.
    """
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError(command, extra, package)


def prepare(
    model: str,
    asked: Mapping[str, Any],
    *,
    device: str,
    revision: str | None,
    with_text: bool,
    attention_backend: str = "auto",
    enable_prefix_caching: bool = True,
) -> Job:
    """Plan the model for the builtin runtime, and see to it that it can run here.

    Args:
        model: a checkpoint, or an output of `shard`.
        asked: the options of the plan that were given, by name.
        device: `cpu`, `cuda`, or `auto` for a GPU if there is one.
        revision: of a Hub id.
        with_text: whether a tokenizer will be loaded.
        attention_backend: which kernels attend on a GPU.
        enable_prefix_caching: whether sequences that begin alike share blocks.

    Raises:
        TightfitError: the model cannot be planned or executed, or has no weights.
        typer.Exit: 1 if the plan does not fit.
    """
    for name in sorted(asked.keys() - TAKEN):
        raise UsageError(
            f"--{name.replace('_', '-')} is not an option of the builtin runtime",
            hint="leave it out, or use --engine vllm",
        )
    load_format = asked.get("load_format", "auto")
    if load_format not in ("auto", "dummy"):
        raise UsageError(f"unknown --load-format {load_format!r}", hint="auto or dummy")
    shards = read_shards(model)
    if shards is not None:
        require_runnable(shards, model)
        from tightfit.sharding.proof.headers import require_headers

        require_headers(Path(model), shards)
    wanted = o.plan_options(**_with_sizes({**asked, "engine": "builtin"}, shards, model))
    found = local_device(device)
    if attention_backend != "auto" and found.kind != "cuda":
        raise UsageError(
            f"--attention-backend {attention_backend}, but attention on a CPU is PyTorch's",
            hint="leave it out",
        )
    wanted = replace(wanted, device=found)
    planned = plan_model(
        model, wanted, revision=revision, download=load_format == "auto", with_text=with_text
    )
    if load_format == "auto" and shards is None:
        from tightfit.checkpoint.describe import require_weights

        require_weights(planned.checkpoint, "run")
    require_fit(planned.plan)
    if found.kind == "cuda":
        require_free(planned.plan)
    else:
        require_available(planned.plan)
    return Job(
        checkpoint=planned.checkpoint,
        spec=planned.spec,
        plan=planned.plan,
        shards=shards,
        directory=Path(model),
        load_format=load_format,
        attention_backend=attention_backend,
        enable_prefix_caching=enable_prefix_caching,
    )


def local_device(word: str) -> Device:
    """The device of this machine that `cpu`, `cuda` or `auto` means.

    Raises:
        UsageError: another word, or no GPU.
    """
    if word not in ("auto", "cpu", "cuda"):
        raise UsageError(f"unknown --device {word!r}", hint="auto, cpu or cuda")
    without_cuda = version("torch").endswith("+cpu")
    if word == "cpu" or (word == "auto" and (without_cuda or not visible_gpus())):
        return this_machine()
    if without_cuda:
        raise UsageError(
            f"--device cuda, but torch {version('torch')} is built without CUDA",
            hint="install a torch with CUDA, or use --device cpu",
        )
    return _this_gpu().device()


def require_fit(plan: Plan) -> None:
    """Start nothing that does not fit.

    Raises:
        typer.Exit: 1, after saying why.
    """
    if not plan.verdict.fits:
        print(f"does not fit: {plan.verdict.reason}", file=sys.stderr)
        raise typer.Exit(ExitCode.FINDING)


def require_free(plan: Plan) -> None:
    """Start nothing on a GPU that others use so much that the plan's share is not there.

    Raises:
        DeviceError: it is so.
    """
    gpu = _this_gpu()
    free = gpu.total_bytes - gpu.used_bytes
    needed = max(rank.driver_used_bytes or 0 for rank in plan.ranks)
    if needed > free + _IDLE_BYTES:
        raise DeviceError(
            f"the plan takes {format_bytes(needed)} of a GPU, and {format_bytes(free)} are free: "
            f"other processes use {format_bytes(gpu.used_bytes)}",
            hint="stop them (see nvidia-smi), choose another GPU by CUDA_VISIBLE_DEVICES, or give "
            f"--gpu-memory-utilization {int(100 * free / gpu.total_bytes) / 100:g} or less",
        )


def require_available(plan: Plan) -> None:
    """Start nothing on a CPU whose memory others use: the system would kill one of us.

    Raises:
        DeviceError: so much is not available.
    """
    needed = sum(rank.total_bytes for rank in plan.ranks)
    available = available_bytes()
    if available is not None and needed > available:
        raise DeviceError(
            f"the plan takes {format_bytes(needed)} of this machine's memory, and "
            f"{format_bytes(available)} are available",
            hint="end what uses it, or lower --max-num-seqs, --max-model-len or "
            "--kv-cache-memory-bytes",
        )


def _this_gpu() -> Gpu:
    return this_gpu(int(os.environ.get("LOCAL_RANK", 0)))


def launch_other_ranks(job: Job, *, grace_seconds: int = 30) -> None:
    """Start the ranks of a job that has several, unless this process is one of them.

    Args:
        job: what they are to do.
        grace_seconds: what they may take to end after a signal.

    Raises:
        typer.Exit: with the code of the ranks, once they are through.
        RankFailedError: a rank died.
    """
    from tightfit.runtime.ranks.launch import is_rank, launch_ranks

    size = len(job.plan.ranks)
    if size == 1 or is_rank():
        return
    command = [sys.executable, "-m", "tightfit", *sys.argv[1:]]
    code = launch_ranks(command, size, grace_seconds=grace_seconds)
    if code == ExitCode.INTERRUPTED:
        print("\ninterrupted", file=sys.stderr)
    raise typer.Exit(code)


def in_world(job: Job, action: Callable[["World"], T], *, quiet: bool = False) -> T:
    """Load and do something as a rank among others, while a terminal says so unless `quiet`.

    Raises:
        TightfitError: as it happened, or as `device_errors` tells it; a rank among several ends.
    """
    with uninterrupted():
        from tightfit.runtime.device_errors import told
        from tightfit.runtime.ranks.world import World

    assert job.plan.device is not None
    stages = job.plan.options.pipeline_parallel_size.value
    first = int(os.environ.get("RANK", 0)) == 0
    if first and not quiet:
        status("loading the model, and executing its worst step ...")
    try:
        with World.from_environment(job.plan.device.kind, stages=stages) as world:
            return action(world)
    except BaseException as error:
        device_error = told(error) if isinstance(error, Exception) else None
        if len(job.plan.ranks) > 1:
            _end_rank(device_error or error, first=first)
        if device_error is None:
            raise
        raise device_error from None
    finally:
        status()


def _end_rank(error: BaseException, *, first: bool) -> NoReturn:
    """End this process at once, which the other ranks notice, each in its own way.

    NCCL's kernels and threads may wait for a rank that is lost, and Python's end for them.
    """
    # What all ranks know is told by rank 0; only the rank itself knows what its device did.
    if isinstance(error, TightfitError) and not (first or isinstance(error, DeviceError)):
        code = error.exit_code
    elif (explanation := explained(error)) is not None:
        code = explanation
    else:
        traceback.print_exception(error)
        code = ExitCode.FINDING
    with suppress(OSError):
        sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _with_sizes(asked: Mapping[str, Any], shards: "Manifest | None", model: str) -> dict[str, Any]:
    """The options, and the sizes of torchrun, of the shards, or of the options, which must agree.

    Raises:
        UsageError: torchrun started another number of ranks.
    """
    started = int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ else None
    if started is not None and shards is None and "tensor_parallel_size" not in asked:
        size = max(1, started // asked.get("pipeline_parallel_size", 1))
        asked = {**asked, "tensor_parallel_size": size}
    found = options_of_shards(asked, shards, model)
    size, stages = found["tensor_parallel_size"], found.get("pipeline_parallel_size", 1)
    if started not in (None, size * stages):
        raise UsageError(
            f"tensor parallel size {size} and {stages} pipeline stages are {size * stages} ranks, "
            f"but torchrun started {started}",
            hint=f"start {size * stages}, over all nodes",
        )
    return found
