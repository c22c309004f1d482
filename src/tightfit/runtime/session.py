"""One run of one rank, from files to a report: what the command line calls.

The order is the order of the ledger: the process with its libraries and its process group; weights;
the KV cache at its planned size; persistent buffers; the worst step; then the prompts. So every
component of the plan is measured by itself, and what is generated afterwards proves that it works.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import TypedDict

import torch

from tightfit.checkpoint.checkpoint import Checkpoint
from tightfit.errors import UsageError
from tightfit.model.layout import Parallel
from tightfit.model.parameters import check_parallel, plain_parameters
from tightfit.model.quantization.schemes import FP8
from tightfit.model.spec import ModelSpec
from tightfit.model.stored import rank_tensors, stored_layout
from tightfit.runtime.agreement import agreed, together
from tightfit.runtime.attention.kv_scales import Scales, load_scales
from tightfit.runtime.baseline import exercise_gpu, exercise_libraries
from tightfit.runtime.engine import Engine
from tightfit.runtime.layers import Weights
from tightfit.runtime.loading.files import TORCH_DTYPES
from tightfit.runtime.loading.loader import load_checkpoint, load_dummy, load_rank_files
from tightfit.runtime.loading.parameters import rank_parameters, require_executable
from tightfit.runtime.memory.ledger import CpuLedger, MemoryLedger
from tightfit.runtime.memory.measured import components, loading_peak_bytes, most_resident_bytes
from tightfit.runtime.models.hf import TransformersModel
from tightfit.runtime.models.hf_loading import empty_model, load_transformers
from tightfit.runtime.options import EngineOptions, SamplingParams
from tightfit.runtime.quantized import executions, rank_weights
from tightfit.runtime.ranks.world import World
from tightfit.runtime.text import Message, Text
from tightfit.runtime.worker import Worker


class _Place(TypedDict):
    dtype: torch.dtype
    device: torch.device
    dtypes: Mapping[str, torch.dtype]


Prompt = str | Sequence[Message] | Sequence[int]
"""Plain text, a conversation, or token ids."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankMeasurement:
    """What one rank used, in bytes.

    `components` has the plan's names. `resident_bytes` is the most that the process held from the
    moment the weights were loaded, and `loading_peak_bytes` the most until then.
    """

    rank: int
    components: dict[str, int]
    resident_bytes: int
    loading_peak_bytes: int
    weights_tensor_bytes: int
    kv_cache_tensor_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """The answer to one prompt. The text, without special tokens, is empty for token ids."""

    prompt_tokens: int
    token_ids: list[int]
    text: str
    finish_reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RunReport:
    """What a run has shown; `generation_seconds` leaves out loading and warming up."""

    ranks: tuple[RankMeasurement, ...]
    completions: tuple[Completion, ...]
    load_seconds: float
    generation_seconds: float
    num_preemptions: int
    executions: Mapping[str, int]
    """How quantized layers are executed, and how many are so; empty if there are none."""
    implementation: str
    """Whose code executed the model."""
    attention: tuple[str, ...]
    """Which kernels attended, and why others did not, where there was a choice."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """A rank that is ready to generate."""

    engine: Engine
    text: Text | None
    world: World
    ledger: MemoryLedger
    weights_tensor_bytes: int
    load_seconds: float
    executions: Mapping[str, int]


def run_rank(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    options: EngineOptions,
    *,
    world: World,
    prompts: Sequence[Prompt] = (),
    sampling: SamplingParams | None = None,
    rank_files: Sequence[Path] | None = None,
    layout: str = "builtin",
    load_format: str = "auto",
    on_text: Callable[[int, str], None] | None = None,
) -> RunReport | None:
    """Load, allocate, warm up, generate and measure. Every rank calls it with equal arguments.

    Args:
        checkpoint: the model, with local files.
        spec: its description.
        options: as the plan resolved them.
        world: this rank and the others.
        prompts: what to answer, all at once; may be empty.
        sampling: how to answer; greedy if not given.
        rank_files: the files that `shard` wrote for this rank, instead of a plain checkpoint.
        layout: the name of the layout in which those were written.
        load_format: `auto`, or `dummy` for random weights.
        on_text: gets (index of the prompt, new text) on rank 0 while it is generated.

    Returns:
        The report of all ranks on rank 0, elsewhere None.

    Raises:
        TightfitError: on all ranks, also if only one of them failed; only rank 0 need show it.
    """
    session = start(
        checkpoint,
        spec,
        options,
        world=world,
        needs_text=not all(map(_is_token_ids, prompts)),
        rank_files=rank_files,
        layout=layout,
        load_format=load_format,
    )
    return generate(session, prompts, sampling or SamplingParams(), on_text)


def start(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    options: EngineOptions,
    *,
    world: World,
    needs_text: bool = False,
    rank_files: Sequence[Path] | None = None,
    layout: str = "builtin",
    load_format: str = "auto",
) -> Session:
    """Everything before the first prompt; arguments and errors are those of `run_rank`."""
    parallel = Parallel(
        tensor_parallel_size=world.tp_size,
        pipeline_parallel_size=world.stages,
        uneven=rank_files is None or stored_layout(layout).uneven,
    )
    check_parallel(spec, parallel)
    rank = parallel.ranks()[world.rank]
    options = agreed(options, world)
    ledger = world.ledger or CpuLedger()
    dtype = TORCH_DTYPES[options.dtype]
    started = perf_counter()
    if others := options.model_impl == "transformers":
        _require_alone(world, rank_files)
    else:
        require_executable(spec)

    with ledger.phase("process_baseline"), together(world):
        empty = empty_model(checkpoint, spec, options) if others else None
        if world.device.type == "cpu":
            exercise_libraries(options, world)
        else:
            exercise_gpu(dtype, world.device)
        text = Text(checkpoint) if needs_text and world.rank == 0 else None
        scales: Scales = ()
        if options.kv_cache_dtype == FP8 and load_format != "dummy":
            scales = load_scales(checkpoint, spec, rank, rank_files=rank_files, layout=layout)
    weights: Weights | TransformersModel
    if others:
        with ledger.phase("weights"), together(world):
            model = load_transformers(
                empty, checkpoint, spec, options, device=world.device, load_format=load_format
            )
        with ledger.phase("repacked_weights"), together(world):
            weights = TransformersModel(spec, model)
            nbytes = weights.nbytes
            ledger.release()
    else:
        needed = rank_parameters(spec, plain_parameters(spec), rank, options.dtype)
        place: _Place = {"dtype": dtype, "device": world.device, "dtypes": needed.dtypes}
        with ledger.phase("weights"), together(world):
            if rank_files is not None:
                names = {tensor.parameter for tensor in needed.tensors}
                stored = rank_tensors(spec, rank, stored_layout(layout))
                expected = [tensor for tensor in stored if tensor.parameter in names]
                tensors = load_rank_files(rank_files, expected, **place)
            elif load_format == "dummy":
                tensors = load_dummy(needed.tensors, seed=options.seed, **place)
            else:
                tensors = load_checkpoint(checkpoint, needed.settled(checkpoint.tensors()), **place)
            nbytes = sum(tensor.nbytes for tensor in tensors.values())
            ledger.release()
        with ledger.phase("repacked_weights"), together(world):
            weights = rank_weights(needed, tensors, repack=_repacks(dtype, world))
            ledger.release()
    with together(world):
        worker = Worker(spec, rank, options, weights, world=world, ledger=ledger, scales=scales)
    worker.warm_up()
    world.loaded()
    return Session(
        engine=Engine(worker),
        text=text,
        world=world,
        ledger=ledger,
        weights_tensor_bytes=nbytes,
        load_seconds=perf_counter() - started,
        executions=executions(weights) if isinstance(weights, Weights) else {},
    )


def generate(
    session: Session,
    prompts: Sequence[Prompt],
    sampling: SamplingParams,
    on_text: Callable[[int, str], None] | None = None,
) -> RunReport | None:
    """Answer all prompts, and report; call it once, on every rank."""
    engine, text, world = session.engine, session.text, session.world
    with together(world):
        requests = b""
        if world.rank == 0:
            ids = [_encode(text, prompt) for prompt in prompts]
            requests = json.dumps([ids, sorted(text.stop_ids) if text else []]).encode()
    prompt_ids, stop_ids = json.loads(world.broadcast_bytes(requests))
    for i, ids in enumerate(prompt_ids):
        # Equal prompts get different answers.
        engine.add(i, ids, replace(sampling, seed=sampling.seed + i), frozenset(stop_ids))

    tokens: list[list[int]] = [[] for _ in prompt_ids]
    texts = ["" for _ in prompt_ids]
    reasons = ["" for _ in prompt_ids]
    streams = [text.detokenizer() if text else None for _ in prompt_ids]
    started = perf_counter()
    with session.ledger.phase("generation"):
        for output in engine.stream():
            i = output.request_id
            tokens[i].append(output.token_id)
            reasons[i] = output.finish_reason or ""
            if (stream := streams[i]) is not None:
                new = "" if output.finish_reason == "stop" else stream.add(output.token_id)
                new += stream.finish() if output.finish_reason else ""
                texts[i] += new
                if new and on_text:
                    on_text(i, new)
    seconds = perf_counter() - started

    measured = json.dumps(asdict(_measure(session))).encode()
    ranks = [json.loads(payload) for payload in world.gather_bytes(measured)]
    if world.rank != 0:
        return None
    return RunReport(
        ranks=tuple(RankMeasurement(**rank) for rank in ranks),
        completions=tuple(
            Completion(
                prompt_tokens=len(prompt_ids[i]),
                token_ids=tokens[i],
                text=texts[i],
                finish_reason=reasons[i],
            )
            for i in range(len(prompt_ids))
        ),
        load_seconds=session.load_seconds,
        generation_seconds=seconds,
        num_preemptions=engine.scheduler.num_preemptions,
        executions=session.executions,
        implementation=engine.worker.decoder.implementation,
        attention=engine.worker.attention.report,
    )


def _require_alone(world: World, rank_files: Sequence[Path] | None) -> None:
    if world.size > 1 or rank_files is not None:
        raise UsageError(
            "--model-impl transformers runs on one rank, from a plain checkpoint: transformers' "
            "own tensor parallelism cuts weights and KV heads in other ways than the plan",
            hint="use --tensor-parallel-size 1 and the model as it was published",
        )


def _repacks(dtype: torch.dtype, world: World) -> bool:
    return dtype == torch.bfloat16 or (dtype == torch.float16 and world.device.type == "cuda")


def _measure(session: Session) -> RankMeasurement:
    ledger = session.ledger
    return RankMeasurement(
        rank=session.world.rank,
        components=components(ledger),
        resident_bytes=most_resident_bytes(ledger),
        loading_peak_bytes=loading_peak_bytes(ledger),
        weights_tensor_bytes=session.weights_tensor_bytes,
        kv_cache_tensor_bytes=session.engine.worker.cache.nbytes,
    )


def _is_token_ids(prompt: Prompt) -> bool:
    return not isinstance(prompt, str) and all(isinstance(item, int) for item in prompt)


def _encode(text: Text | None, prompt: Prompt) -> list[int]:
    if isinstance(prompt, str):
        assert text is not None
        return text.encode(prompt)
    if _is_token_ids(prompt):
        return [item for item in prompt if isinstance(item, int)]
    assert text is not None
    return text.encode_chat([item for item in prompt if not isinstance(item, int)])
