"""The remedies that `advice` tries: each with steps from the mildest on, and what it costs."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from tightfit.planner.devices import CATALOGUE
from tightfit.planner.options import PlanOptions
from tightfit.planner.plan import Plan
from tightfit.units import GiB, MiB, cdiv


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One change, as one would type it, and as options."""

    change: str
    options: dict[str, Any] = field(default_factory=dict)
    costs: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Remedy:
    """Steps of one kind, the mildest first."""

    costs: str
    steps: tuple[Step, ...]


def remedies(plan: Plan, options: PlanOptions, shortage_bytes: int) -> Iterator[Remedy]:
    """Everything that may help this plan; trying says whether it does."""
    yield from _more_devices(plan, options)
    yield from _smaller_numbers(plan, options)
    yield from _shorter(plan, options, shortage_bytes)
    yield from _smaller_steps(plan, options)
    yield from _graphs(plan, options)
    yield from _multimodal(plan, options)
    yield from _lora(options)
    yield from _elsewhere(plan, options, shortage_bytes)
    yield from _other_pool(plan, options, shortage_bytes)


def _more_devices(plan: Plan, options: PlanOptions) -> Iterator[Remedy]:
    ranks = len(plan.ranks)

    def steps(name: str) -> tuple[Step, ...]:
        size = getattr(options, name)
        return tuple(
            Step(
                change=f"--{name.replace('_', '-')} {size * factor}",
                options={name: size * factor},
                costs=f"{ranks * factor} devices instead of {ranks}, and {words[name]}",
            )
            for factor in (2, 4, 8)
        )

    words = {
        "tensor_parallel_size": "an exchange between them in every layer",
        "pipeline_parallel_size": "every token passes through the stages one after the other",
    }
    for name in words:
        yield Remedy(costs="", steps=steps(name))
    size = options.tensor_parallel_size
    if size > 1 and not options.enable_expert_parallel:
        step = Step(change="--enable-expert-parallel", options={"enable_expert_parallel": True})
        yield Remedy(costs="ranks wait for the one with the most popular experts", steps=(step,))
    if size > 1 and options.decode_context_parallel_size == 1:
        yield Remedy(
            costs="an exchange of attention results in every layer",
            steps=tuple(
                Step(
                    change=f"--decode-context-parallel-size {n}",
                    options={"decode_context_parallel_size": n},
                )
                for n in (2, 4, 8)
                if size % n == 0
            ),
        )


_SCHEMES = {
    "fp8": "rounds weights and activations to 8 bits while loading: a little accuracy",
    "w8a16": "a checkpoint quantized to 8-bit weights: hardly any accuracy",
    "w4a16": "a checkpoint quantized to 4-bit weights, groups of 128: some accuracy",
    "nvfp4": "a checkpoint quantized to 4-bit floats: some accuracy, and fast on Blackwell only",
}


def _smaller_numbers(plan: Plan, options: PlanOptions) -> Iterator[Remedy]:
    if options.quantization is None:
        for scheme, costs in _SCHEMES.items():
            step = Step(change=f"--quantization {scheme}", options={"quantization": scheme})
            yield Remedy(costs=costs, steps=(step,))
    if plan.options.dtype.value == "F32":
        yield Remedy(
            costs="half the bits of float32 everywhere",
            steps=(Step(change="--dtype bfloat16", options={"dtype": "bfloat16"}),),
        )
    if plan.kv_cache.dtype in ("BF16", "F16", "F32"):
        yield Remedy(
            costs="keys and values of 8 bits: a little accuracy, and fewer attention kernels",
            steps=(Step(change="--kv-cache-dtype fp8", options={"kv_cache_dtype": "fp8"}),),
        )
    for name in ("mamba_cache_dtype", "mamba_ssm_cache_dtype"):
        if getattr(options, name) == "auto":
            step = Step(change=f"--{name.replace('_', '-')} float16", options={name: "float16"})
            yield Remedy(costs="states of 16 bits: a little accuracy", steps=(step,))


def _shorter(plan: Plan, options: PlanOptions, shortage_bytes: int) -> Iterator[Remedy]:
    length = plan.options.max_model_len.value
    longest = plan.verdict.max_model_len_that_fits or 0
    lengths = [longest] if 0 < longest < length else [length // 2] if shortage_bytes <= 0 else []
    yield Remedy(
        costs="longer requests are refused",
        steps=tuple(
            Step(change=f"--max-model-len {n}", options={"max_model_len": n})
            for n in lengths
            if n > 0
        ),
    )
    if options.disable_hybrid_kv_cache_manager:
        step = Step(
            change="no --disable-hybrid-kv-cache-manager",
            options={"disable_hybrid_kv_cache_manager": False},
        )
        yield Remedy(costs="nothing, unless a KV connector needs it", steps=(step,))
    if options.async_scheduling is not False:
        step = Step(change="--no-async-scheduling", options={"async_scheduling": False})
        yield Remedy(costs="the device waits for the scheduler between steps", steps=(step,))


def _smaller_steps(plan: Plan, options: PlanOptions) -> Iterator[Remedy]:
    def ladder(name: str, now: int, rungs: tuple[int, ...]) -> tuple[Step, ...]:
        flag = "--" + name.replace("_", "-")
        return tuple(Step(change=f"{flag} {n}", options={name: n}) for n in rungs if n < now)

    seqs = plan.options.max_num_seqs.value
    yield Remedy(
        costs="fewer requests at once, the others wait",
        steps=ladder("max_num_seqs", seqs, (512, 256, 128, 64, 32, 16, 8, 4, 2, 1)),
    )
    tokens = plan.options.max_num_batched_tokens.value
    rungs = tuple(n for n in (8192, 4096, 2048, 1024, 512, 256) if n >= (options.max_num_seqs or 1))
    yield Remedy(
        costs="long prompts take more steps, so their first token comes later",
        steps=ladder("max_num_batched_tokens", tokens, rungs),
    )


def _graphs(plan: Plan, options: PlanOptions) -> Iterator[Remedy]:
    sizes = plan.options.cudagraph_capture_sizes
    if sizes is None or not sizes.value:
        return
    largest = max(sizes.value)
    if options.cudagraph_capture_sizes is None:
        yield Remedy(
            costs="larger batches run without a graph, and slower",
            steps=tuple(
                Step(
                    change=f"--max-cudagraph-capture-size {n}",
                    options={"max_cudagraph_capture_size": n},
                )
                for n in (256, 128, 64, 32, 16, 8)
                if n < largest
            ),
        )
        few = tuple(n for n in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512) if n <= largest)
        step = Step(
            change="--cudagraph-capture-sizes " + ",".join(map(str, few)),
            options={"cudagraph_capture_sizes": few, "max_cudagraph_capture_size": None},
        )
        yield Remedy(costs="batches are padded to the next of these sizes", steps=(step,))
    if "cudagraph_mode" not in options.compilation_config:
        for mode, costs in (
            ("PIECEWISE", "attention runs outside the graphs: slower tokens of small models"),
            ("FULL_DECODE_ONLY", "steps with prompts in them run without a graph"),
        ):
            changed = {**options.compilation_config, "cudagraph_mode": mode}
            step = Step(
                change=f"-cc.cudagraph_mode={mode}", options={"compilation_config": changed}
            )
            yield Remedy(costs=costs, steps=(step,))
    step = Step(change="--enforce-eager", options={"enforce_eager": True})
    yield Remedy(costs="no graphs: every step is slower, small batches most", steps=(step,))


_LIMITS: tuple[dict[str, int], ...] = (
    {"image": 1, "video": 0},
    {"image": 1, "video": 0, "audio": 0},
)
_PROCESSOR: tuple[dict[str, Any], ...] = (
    {"max_pixels": 1003520},
    {"max_pixels": 401408},
    {"size": {"shortest_edge": 3136, "longest_edge": 1003520}},
    {"max_dynamic_patch": 4},
    {"max_dynamic_patch": 1},
    {"do_pan_and_scan": False},
)


def _multimodal(plan: Plan, options: PlanOptions) -> Iterator[Remedy]:
    names = {component.name for rank in plan.ranks for component in rank.components}
    if options.language_model_only or plan.model.is_encoder_decoder:
        return
    step = Step(change="--language-model-only", options={"language_model_only": True})
    yield Remedy(costs="no images, video or audio at all", steps=(step,))
    if not names & {"vision_encoder", "encoder_cache"}:
        return
    for name, values, costs in (
        ("limit_mm_per_prompt", _LIMITS, "requests with more or other inputs are refused"),
        ("mm_processor_kwargs", _PROCESSOR, "images are scaled down, and details are lost"),
    ):
        before: dict[str, Any] = dict(getattr(options, name))
        flag = "--" + name.replace("_", "-")
        yield Remedy(
            costs=costs,
            steps=tuple(
                Step(change=f"{flag} '{json.dumps(value)}'", options={name: before | value})
                for value in values
            ),
        )
    if options.mm_encoder_tp_mode == "data":
        step = Step(
            change="--mm-encoder-tp-mode weights", options={"mm_encoder_tp_mode": "weights"}
        )
        yield Remedy(costs="the encoder exchanges results between ranks", steps=(step,))


def _lora(options: PlanOptions) -> Iterator[Remedy]:
    if not options.enable_lora:
        return
    if options.max_lora_rank > 8:
        step = Step(change="--max-lora-rank 8", options={"max_lora_rank": 8})
        yield Remedy(costs="adapters of a higher rank are refused", steps=(step,))
    if options.max_loras > 1:
        step = Step(change="--max-loras 1", options={"max_loras": 1})
        yield Remedy(costs="one adapter in a batch", steps=(step,))


def _elsewhere(plan: Plan, options: PlanOptions, shortage_bytes: int) -> Iterator[Remedy]:
    weights = max(rank.component("weights").planned_bytes for rank in plan.ranks)
    amount = cdiv(max(shortage_bytes, 0), GiB) + 1
    if shortage_bytes > 0 and amount * GiB <= weights and plan.verdict.fits is False:
        total = options.cpu_offload_gb + amount
        yield Remedy(
            costs="so much of the weights crosses PCIe in every step: many times slower",
            steps=tuple(
                Step(change=f"--cpu-offload-gb {n:g}", options={"cpu_offload_gb": n})
                for n in (total, total + 1, total + 2)
            ),
        )
    device = plan.device
    if device is None or device.name not in CATALOGUE or plan.verdict.fits is not False:
        return
    larger = [
        one
        for one in CATALOGUE.values()
        if one.kind == device.kind
        and not one.alone
        and one.bfloat16 >= device.bfloat16
        and one.total_bytes >= device.total_bytes + shortage_bytes
    ]
    yield Remedy(
        costs="a larger device",
        steps=tuple(Step(change=f"--gpu {one.name}", options={"device": one}) for one in larger),
    )


def _other_pool(plan: Plan, options: PlanOptions, shortage_bytes: int) -> Iterator[Remedy]:
    if options.num_gpu_blocks_override is not None:
        change = "no --num-gpu-blocks-override"
        step = Step(change=change, options={"num_gpu_blocks_override": None})
        yield Remedy(costs="the KV cache is what the budget leaves", steps=(step,))
        return
    given = options.kv_cache_memory_bytes
    if given is not None:
        smaller = (given - shortage_bytes) // MiB * MiB
        if 0 < smaller < given:
            step = Step(
                change=f"--kv-cache-memory-bytes {smaller}",
                options={"kv_cache_memory_bytes": smaller},
            )
            yield Remedy(costs="fewer tokens in the KV cache", steps=(step,))
        step = Step(change="no --kv-cache-memory-bytes", options={"kv_cache_memory_bytes": None})
        yield Remedy(costs="the KV cache is what the budget leaves", steps=(step,))
        return
    now = plan.options.gpu_memory_utilization.value
    yield Remedy(
        costs="less is left for other processes, and for what the engine does not count",
        steps=tuple(
            Step(
                change=f"--gpu-memory-utilization {share}",
                options={"gpu_memory_utilization": share},
            )
            for share in (0.95, 0.97, 0.98)
            if share > now
        ),
    )
