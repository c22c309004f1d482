"""One run of one rank, from files to a report: what the command line calls.

The order is the order of the ledger: the process with its libraries and its process group; weights;
persistent buffers; the KV cache at its planned size; the worst step; then the prompts. So every
component of the plan is measured by itself, and what is generated afterwards proves that it works.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import TypedDict

import torch
from torch import Tensor

from tightfit.checkpoint.checkpoint import Checkpoint
from tightfit.errors import ExitCode, TightfitError
from tightfit.model.blocks.attention import Attention, Rope
from tightfit.model.blocks.mlp import DenseMLP
from tightfit.model.layout import Parallel, Rank
from tightfit.model.parameters import check_parallel, parameters, plain_parameters
from tightfit.model.spec import Layer, ModelSpec
from tightfit.model.stored import rank_tensors, stored_layout
from tightfit.runtime.dist import World
from tightfit.runtime.engine import Engine
from tightfit.runtime.files import TORCH_DTYPES
from tightfit.runtime.layers import Weights
from tightfit.runtime.loader import load_checkpoint, load_dummy, load_rank_files
from tightfit.runtime.memory import CpuLedger, MemoryLedger
from tightfit.runtime.options import EngineOptions, SamplingParams
from tightfit.runtime.parameters import rank_parameters, require_executable
from tightfit.runtime.quantized import executions, rank_weights
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
        tensor_parallel_size=world.size,
        uneven=rank_files is None or stored_layout(layout).uneven,
    )
    check_parallel(spec, parallel)
    require_executable(spec)
    rank = parallel.ranks()[world.rank]
    ledger = CpuLedger()
    dtype = TORCH_DTYPES[options.dtype]
    started = perf_counter()

    needed = rank_parameters(spec, plain_parameters(spec), rank, options.dtype)

    def load() -> dict[str, Tensor]:
        place: _Place = {"dtype": dtype, "device": world.device, "dtypes": needed.dtypes}
        if rank_files is not None:
            names = {tensor.parameter for tensor in needed.tensors}
            stored = rank_tensors(spec, rank, stored_layout(layout))
            expected = [tensor for tensor in stored if tensor.parameter in names]
            return load_rank_files(rank_files, expected, **place)
        if load_format == "dummy":
            return load_dummy(needed.tensors, seed=options.seed, **place)
        return load_checkpoint(checkpoint, needed.settled(checkpoint.tensors()), **place)

    with ledger.phase("process_baseline"), together(world):
        _exercise_libraries(options, world)
        text = Text(checkpoint) if needs_text and world.rank == 0 else None
    with ledger.phase("weights"), together(world):
        tensors = load()
    with ledger.phase("repacked_weights"), together(world):
        weights = rank_weights(needed, tensors, repack=_repacks(dtype, world))
    worker = Worker(spec, rank, options, weights, world=world, ledger=ledger)
    worker.warm_up()
    return Session(
        engine=Engine(worker),
        text=text,
        world=world,
        ledger=ledger,
        weights_tensor_bytes=sum(tensor.nbytes for tensor in tensors.values()),
        load_seconds=perf_counter() - started,
        executions=executions(weights),
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
        engine.add(i, ids, sampling, frozenset(stop_ids))

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
    )


@contextmanager
def together(world: World) -> Iterator[None]:
    """Let all ranks fail if one of them does, before the others wait for it in a collective.

    Raises:
        TightfitError: that of the first rank that has one.
    """
    failure: TightfitError | None = None
    try:
        yield
    except TightfitError as error:
        failure = error
    told = [failure.message, failure.hint, int(failure.exit_code)] if failure else None
    for told_by_rank in map(json.loads, world.gather_bytes(json.dumps(told).encode())):
        if failure is not None and told_by_rank == told:
            raise failure
        if told_by_rank is not None:
            message, hint, code = told_by_rank
            theirs = TightfitError(message, hint=hint)
            theirs.exit_code = ExitCode(code)
            raise theirs


def _repacks(dtype: torch.dtype, world: World) -> bool:
    return dtype == torch.bfloat16 and world.device.type == "cpu"


def _measure(session: Session) -> RankMeasurement:
    readings = session.ledger.readings
    activations, logits = readings["activations"], readings["logits_and_sampler"]
    components = {"process_baseline": readings["process_baseline"].after_bytes}
    for name in ("weights", "repacked_weights", "persistent_buffers", "kv_cache"):
        components[name] = readings[name].kept_bytes
    components["activations"] = activations.transient_bytes
    # Logits take the place of activations that are freed before, as in the plan.
    components["logits_and_sampler"] = max(0, logits.peak_bytes - activations.peak_bytes)
    loading = ("process_baseline", "weights", "repacked_weights")
    return RankMeasurement(
        rank=session.world.rank,
        components=components,
        resident_bytes=max(r.peak_bytes for n, r in readings.items() if n not in loading),
        loading_peak_bytes=max(readings[name].peak_bytes for name in loading),
        weights_tensor_bytes=session.weights_tensor_bytes,
        kv_cache_tensor_bytes=session.engine.worker.cache.nbytes,
    )


def _exercise_libraries(options: EngineOptions, world: World) -> None:
    """Run a toy model, so that code pages and the libraries' own buffers count as the process.

    It is just large enough for MKL and oneDNN to take the paths, and the packing buffers, that they
    take for large matrices.
    """
    attention = Attention(
        num_heads=2 * world.size,
        num_kv_heads=world.size,
        head_dim=64,
        rope=Rope(theta=1e4, rotary_dim=64, max_position_embeddings=64),
        scale=0.125,
    )
    mlp = DenseMLP(intermediate_size=2048 * world.size, activation="silu")
    spec = ModelSpec(
        architecture="toy",
        model_type="toy",
        dtype=options.dtype,
        hidden_size=512,
        vocab_size=64 * world.size,
        layers=(Layer(mixers=(attention,), mlp=mlp),),
        max_position_embeddings=64,
        norm_eps=1e-5,
    )
    toy = replace(
        options,
        max_model_len=256,
        max_num_seqs=4,
        max_num_batched_tokens=256,
        num_blocks=4,
        block_size=16,
    )
    parallel = Parallel(tensor_parallel_size=world.size)
    rank: Rank = parallel.ranks()[world.rank]
    dtype = TORCH_DTYPES[options.dtype]
    tensors = tuple(weight.rank_tensor(rank, spec.dtype) for weight in parameters(spec))
    weights = load_dummy(tensors, dtype=dtype, device=world.device, seed=0)
    Worker(spec, rank, toy, Weights(tensors=weights), world=world, ledger=CpuLedger()).warm_up()


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
