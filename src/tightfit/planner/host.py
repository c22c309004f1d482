"""What vLLM's processes take of the memory of one host: all ranks, engine cores and API servers.

Sources, relative to the vLLM 0.32 package: `model_executor/model_loader/weight_utils.py`,
`multimodal/cache/factories.py`, `entrypoints/cli/serve.py`, `v1/worker/gpu/states.py`,
`v1/worker/gpu/mm/rope.py`, `v1/worker/gpu_input_batch.py`, `v1/worker/block_table.py`,
`model_executor/offloader/uva.py`, `config/cache.py`.

The sum of the components is what a container's memory counter may reach. The page cache is in it,
which the kernel gives back when something else needs the memory; `needed_bytes` leaves it out.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from math import prod

from tightfit.model.layout import Parallel, Rank
from tightfit.model.spec import ModelSpec, ropes
from tightfit.planner.engines.base import Deployed
from tightfit.planner.engines.vllm_host import (
    BASELINE_PROVENANCE,
    LIBRARY_BYTES,
    PROCESS_BYTES,
    Processes,
    worker_bytes,
)
from tightfit.planner.kv_cache import KVLayout
from tightfit.planner.options import PlanOptions, Resolved
from tightfit.planner.plan import Component, Origin
from tightfit.planner.weights import held
from tightfit.units import GiB, cdiv, dtype_bytes, format_bytes

MM_PROCESSOR_CACHE_GB = 4.0
"""`config/multimodal.py`."""
PAGE_CACHE = "page_cache_bytes"
"""`detail` of `loading_peak`: what the kernel can drop."""


def host_components(
    spec: ModelSpec,
    parallel: Parallel,
    options: PlanOptions,
    resolved: Resolved,
    deployed: Deployed,
    *,
    safetensors_load_strategy: str | None = None,
    largest_file_bytes: int | None = None,
) -> tuple[Component, ...]:
    """The host's components, by the names of `plan.HOST_COMPONENTS`; what is zero is left out.

    All ranks and replicas are on one host.

    Args:
        spec: the model as the engine builds it.
        parallel: its layout.
        options: what the user asked for.
        resolved: the same with the defaults filled in.
        deployed: the ranks of a replica.
        safetensors_load_strategy: vLLM's option; `eager` reads files whole.
        largest_file_bytes: of the checkpoint; None counts it as one file.
    """
    cpu = options.device is not None and options.device.kind == "cpu"
    ranks = len(deployed.weights_by_rank) * parallel.data_parallel_size
    processes = Processes.of(parallel, options, cpu=cpu)
    found = [
        _loading_peak(
            spec,
            parallel,
            options,
            resolved.dtype.value,
            deployed,
            _eager_bytes(safetensors_load_strategy, largest_file_bytes, deployed.checkpoint_bytes),
            cpu=cpu,
        ),
        _process_baseline(processes, options, cpu=cpu),
        _mm_processor_cache(spec, parallel, options, processes),
        None if cpu else _pinned_buffers(spec, resolved, ranks, deployed.kv),
        None if cpu else _cpu_offload(options, parallel, deployed.offloaded_by_rank),
        None if cpu else _kv_offload(options, parallel),
        _cpu_kv_cache(deployed.pool_bytes, ranks) if cpu else None,
    ]
    return tuple(one for one in found if one is not None and one.planned_bytes)


def needed_bytes(host: Sequence[Component]) -> int:
    """What the host must have, and the kernel cannot drop."""
    return sum(one.planned_bytes - one.detail.get(PAGE_CACHE, 0) for one in host)


def _component(
    name: str,
    size: int,
    formula: str,
    *,
    origin: Origin = "derived",
    detail: Mapping[str, int] | None = None,
) -> Component:
    return Component(
        name=name, planned_bytes=size, origin=origin, formula=formula, detail=detail or {}
    )


def _eager_bytes(strategy: str | None, largest_file: int | None, checkpoint_bytes: int) -> int:
    """`load(f.read())` holds a file, and the copies of its tensors, at a time."""
    if strategy != "eager":
        return 0
    return 2 * min(largest_file or checkpoint_bytes, checkpoint_bytes)


def _loading_peak(
    spec: ModelSpec,
    parallel: Parallel,
    options: PlanOptions,
    dtype: str,
    deployed: Deployed,
    eager_bytes: int,
    *,
    cpu: bool,
) -> Component:
    """Files are mapped, so that they are in the page cache once, whichever ranks read them."""
    replicas, weights_by_rank = parallel.data_parallel_size, deployed.weights_by_rank
    ranks = len(weights_by_rank) * replicas
    if options.load_format == "dummy":
        read, copied, formula = 0, 0, "dummy weights: nothing is read"
    elif options.load_format == "sharded_state":
        # Replicas read the same files.
        read, copied = sum(weights_by_rank), 0
        formula = (
            f"bound: page cache of the files of {len(weights_by_rank)} ranks, each read by its "
            f"own rank only: {read}"
        )
    else:
        read = deployed.checkpoint_bytes
        copied = ranks * (eager_bytes or _largest_tensor(spec, parallel, dtype))
        what = "an eagerly read file and its tensors" if eager_bytes else "the largest parameter"
        formula = (
            f"bound: page cache of the checkpoint, which each of {ranks} ranks reads whole: {read} "
            f"+ {what} of each rank, while it is cut or converted: {copied}"
        )
    weights = sum(weights_by_rank) * replicas if cpu else 0
    if weights:
        formula += f" + the weights themselves, which stay in the host's memory: {weights}"
    return _component(
        "loading_peak",
        read + copied + weights,
        formula,
        detail={PAGE_CACHE: read, "read_by_a_rank_bytes": _read(options, weights_by_rank, read)},
    )


def _read(options: PlanOptions, weights_by_rank: Sequence[int], read: int) -> int:
    return max(weights_by_rank) if options.load_format == "sharded_state" else read


@lru_cache(maxsize=64)
def _largest_tensor(spec: ModelSpec, parallel: Parallel, dtype: str) -> int:
    """Slices of columns are copied before they go to the device, and other dtypes converted.

    (torch, `Copy.cu: copy_requires_temporaries`; experts that the checkpoint holds one by one come
    one by one.)
    """
    rank = Rank(parallel=parallel)
    largest = 0
    for weight in held(spec, rank):
        shape = weight.rank_shape(rank)
        if weight.experts and not weight.stacked:
            shape = shape[1:]
        largest = max(largest, dtype_bytes(weight.held_dtype(dtype), prod(shape)))
    return largest


def _process_baseline(processes: Processes, options: PlanOptions, *, cpu: bool) -> Component:
    eager = options.enforce_eager or options.optimization_level == 0
    worker, worker_formula = worker_bytes(cpu=cpu, eager=eager, several=processes.workers > 1)
    library = LIBRARY_BYTES["cpu" if cpu else "cuda"]
    plain = processes.front + processes.cores + processes.others
    private = plain * PROCESS_BYTES + processes.workers * worker
    shared = 0 if processes.separate_workers else processes.workers * PROCESS_BYTES
    named = {
        "API server or caller": processes.front,
        "engine core": processes.cores,
        "parent or coordinator": processes.others,
    }
    formula = (
        " + ".join(f"{count} x {name}" for name, count in named.items() if count)
        + f", {format_bytes(PROCESS_BYTES)} each, + {processes.workers} x {format_bytes(worker)} "
        f"({worker_formula})"
    )
    if shared:
        formula += ", in the process of its engine core"
    formula += f" + {format_bytes(library)} of libraries, mapped once; {BASELINE_PROVENANCE}"
    return _component("process_baseline", private - shared + library, formula, origin="calibrated")


def _mm_processor_cache(
    spec: ModelSpec, parallel: Parallel, options: PlanOptions, processes: Processes
) -> Component | None:
    """Processed images and videos, until the cache is full; `multimodal/cache/factories.py`."""
    size = options.mm_processor_cache_gb
    gib = MM_PROCESSOR_CACHE_GB if size is None else size
    if not spec.towers or options.language_model_only or not gib:
        return None
    kind = options.mm_processor_cache_type
    if processes.front > 1 or parallel.data_parallel_size > 1:
        copies = processes.front
        where = f"in each of {copies} API processes, as there are several or several engines"
    elif kind == "shm":
        copies, where = 1, "in one ring of shared memory (/dev/shm), which all workers map"
    else:
        copies, where = 1, "in the engine core; the API process keeps only what it has sent"
    return _component(
        "mm_processor_cache",
        int(gib * GiB) * copies,
        f"bound, reached when it is full: mm_processor_cache_gb = {gib:g} GiB x {copies}: the "
        f"tensors are {where}",
    )


def _pinned(size: int) -> int:
    """torch's allocator of pinned memory rounds a block up to a power of two."""
    return 1 << (size - 1).bit_length() if size else 0


def _pinned_buffers(
    spec: ModelSpec, resolved: Resolved, ranks: int, kv: KVLayout | None
) -> Component:
    n, length = resolved.max_num_seqs.value, resolved.max_model_len.value
    m = resolved.max_num_batched_tokens.value
    sizes = f"N = {n}, L = {length}"
    if resolved.model_runner is None or resolved.model_runner.value == "v2":
        parts = {"tokens of all requests 4 x N x L": _pinned(4 * n * length)}
        if _has_image_positions(spec):
            parts["positions in three dimensions 12 x N x L"] = _pinned(12 * n * length)
    else:
        embeddings = m * spec.hidden_size * dtype_bytes(resolved.dtype.value)
        parts = {
            "tokens of all requests 5 x N x L (not pinned)": 5 * n * length,
            "input embeddings M x H x b": _pinned(embeddings),
        }
        if kv is not None:
            table = _pinned(4 * n * cdiv(length, kv.block_size))
            parts[f"block tables of {len(kv.groups)} groups"] = len(kv.groups) * table
        sizes += f", M = {m}"
    return _component(
        "pinned_buffers",
        ranks * sum(parts.values()),
        f"{sizes}; {ranks} ranks x ("
        + " + ".join(f"{name}: {size}" for name, size in parts.items())
        + "), each rounded up to a power of two if pinned; tables of a few KiB are left out",
    )


def _has_image_positions(spec: ModelSpec) -> bool:
    """Whether tokens have positions in time, height and width: the rope's table is longer then."""
    longest = max((rope.max_position_embeddings for rope in ropes(spec.layers)), default=0)
    return bool(spec.towers) and longest > spec.max_position_embeddings


def _cpu_offload(
    options: PlanOptions, parallel: Parallel, offloaded_by_rank: Sequence[int]
) -> Component | None:
    moved = sum(offloaded_by_rank) * parallel.data_parallel_size
    if not moved:
        return None
    return _component(
        "cpu_offload",
        moved,
        f"weights of the layers, in their order, until cpu_offload_gb = {options.cpu_offload_gb:g} "
        f"GiB a rank are reached: {moved} on {len(offloaded_by_rank) * parallel.data_parallel_size}"
        " ranks, pinned. A lower bound: a tensor takes the next power of two, less than twice as "
        "much",
        detail={"most_bytes": 2 * moved},
    )


def _kv_offload(options: PlanOptions, parallel: Parallel) -> Component | None:
    gib = options.kv_offloading_size
    if not gib:
        return None
    engines = parallel.data_parallel_size
    return _component(
        "kv_offload",
        int(gib * GiB) * engines,
        f"kv_offloading_size = {gib:g} GiB over all ranks of an engine x {engines} engines",
    )


def _cpu_kv_cache(pool_bytes: int, ranks: int) -> Component:
    return _component(
        "cpu_kv_cache",
        pool_bytes * ranks,
        f"the KV cache of the CPU backend: {pool_bytes} on each of {ranks} ranks",
    )
