"""A plan beside a log, line by line."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from tightfit.planner.plan import Plan, RankPlan
from tightfit.planner.vllm_log.read import VLLMLog

Unit = Literal["bytes", "tokens", "blocks", "sequences"]

PEAK = ("activations", "logits_and_sampler", "moe_workspace", "vision_encoder")
"""What torch's peak of the profile run is made of."""
LOADED = ("weights", "weights_after_load", "lora")
"""What vLLM logs as the model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LogLine:
    """One figure of the plan and of the log; None where one of them does not have it."""

    name: str
    unit: Unit
    planned: float | None
    logged: float | None

    @property
    def difference(self) -> float | None:
        """Planned less logged: positive where the plan has more."""
        if self.planned is None or self.logged is None:
            return None
        return self.planned - self.logged


def compare(plan: Plan, log: VLLMLog) -> list[LogLine]:
    """The lines that the log has, beside what the plan says of the rank that decides."""
    kv, rank, device = plan.kv_cache, plan.ranks[0], plan.device
    loaded = max(_sum(one, LOADED) for one in plan.ranks)
    peak = _sum(rank, PEAK)
    graphs = next((c for c in rank.components if c.name == "cuda_graphs"), None)
    estimate = graphs.planned_bytes if graphs and graphs.inside_budget else 0
    if log.bytes_of("consumed") is not None:
        # Since 0.27 vLLM prints its estimate of the graphs as part of the peak.
        peak += estimate
    captured = graphs.resident_bytes if graphs else 0
    others = [c.planned_bytes for c in rank.components if c.inside_budget and c.name != "kv_cache"]
    non_torch = sum(
        c.planned_bytes
        for c in rank.components
        if c.inside_budget and c.name in ("non_torch", "nccl")
    )
    rows: list[tuple[str, Unit, float | None, float | None]] = [
        ("device", "bytes", device.total_bytes if device else None, log.bytes_of("total")),
        ("budget", "bytes", rank.budget_bytes, log.bytes_of("requested")),
        ("model_load", "bytes", loaded, log.bytes_of("model_load")),
        ("activation_peak", "bytes", peak, log.bytes_of("activation_peak")),
        ("non_torch", "bytes", non_torch, log.bytes_of("non_torch")),
        ("non_kv_total", "bytes", sum(others), log.bytes_of("non_kv_total")),
        ("cuda_graphs_estimate", "bytes", estimate, log.bytes_of("cuda_graphs_estimate")),
        ("cuda_graphs", "bytes", captured, log.bytes_of("cuda_graphs")),
        ("available_kv", "bytes", kv.available_bytes, log.bytes_of("available_kv")),
        ("one_sequence", "bytes", kv.reserved_bytes, log.bytes_of("needed_kv")),
        ("num_gpu_blocks", "blocks", kv.num_blocks, log.number("num_gpu_blocks")),
        ("kv_tokens", "tokens", kv.tokens, log.number("kv_tokens")),
        ("max_concurrency", "sequences", kv.max_concurrency, log.number("max_concurrency")),
        (
            "longest_that_fits",
            "tokens",
            plan.verdict.max_model_len_that_fits,
            log.number("estimated_max_model_len"),
        ),
    ]
    return [
        LogLine(name=name, unit=unit, planned=planned, logged=logged)
        for name, unit, planned, logged in rows
        if logged is not None
    ]


def mismatches(plan: Plan, log: VLLMLog) -> tuple[str, ...]:
    """Where plan and start-up are not of the same thing, which no figure can make good."""
    found = []
    version = log.options.get("engine_version")
    if version is not None and version != plan.engine_version:
        found.append(f"the log is of vLLM {log.version}, the plan of {plan.engine_version}")
    if log.engine == "V0":
        found.append("the log is of the engine before V1, which is not modelled")
    for name in ("tensor_parallel_size", "pipeline_parallel_size", "max_model_len"):
        logged, planned = log.options.get(name), getattr(plan.options, name).value
        if logged not in (None, -1, planned):
            found.append(f"{name} is {logged} in the log, {planned} in the plan")
    total = log.bytes_of("total")
    if total and plan.device and abs(total - plan.device.total_bytes) > 0.01 * total:
        found.append(
            f"the device of the log has {total:,} bytes, that of the plan "
            f"{plan.device.total_bytes:,}"
        )
    return tuple(found)


def _sum(rank: RankPlan, names: Iterable[str]) -> int:
    wanted = set(names)
    return sum(c.planned_bytes for c in rank.components if c.name in wanted)
