"""How close are plans to start-ups of vLLM that were measured?

usage: plan_accuracy.py [--data data/vllm_gpu_rows.jsonl] [--configs data/configs]

Prints a line per row: what the plan and vLLM's log say of the KV cache, graphs and the driver. The
errors of the KV cache are in % of the device and of the pool; a + promises more than there was.
"""

import argparse
import json
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from tightfit.errors import TightfitError, UsageError
from tightfit.model.families import model_spec
from tightfit.planner.assemble import make_plan
from tightfit.planner.devices import Device
from tightfit.planner.options import PlanOptions
from tightfit.planner.plan import Plan
from tightfit.units import GiB, MiB

HERE = Path(__file__).parent
CONSTANT_BYTES = 2 * GiB
"""All that a simple planner adds to the exact weights of a rank; other planners do no better."""
OPTIONS = {field.name for field in fields(PlanOptions)}


@dataclass(frozen=True)
class Row:
    """A start-up and its plan; GiB, None where the log has no such line."""

    id: str
    kv_planned: float
    kv_constant: float
    kv_measured: float
    total: float
    blocks_planned: int
    blocks_measured: int | None
    concurrency_planned: float
    concurrency_measured: float | None
    graphs_planned: float | None
    graphs_measured: float | None
    driver_planned: float
    driver_measured: float | None

    @property
    def of_device(self) -> float:
        return 100 * (self.kv_planned - self.kv_measured) / self.total

    @property
    def of_pool(self) -> float:
        return 100 * (self.kv_planned - self.kv_measured) / self.kv_measured

    @property
    def graphs_error(self) -> float | None:
        if self.graphs_measured is None or self.graphs_planned is None:
            return None
        return self.graphs_planned - self.graphs_measured

    @property
    def driver_error(self) -> float | None:
        if self.driver_measured is None:
            return None
        return 100 * (self.driver_planned - self.driver_measured) / self.total


def options(row: Mapping[str, Any]) -> PlanOptions:
    """The options of a measured start-up.

    Raises:
        UsageError: an argument that plans do not know.
    """
    args = dict(row["args"])
    unknown = args.keys() - OPTIONS
    if unknown:
        raise UsageError("plans do not know " + ", ".join(sorted(unknown)), hint="leave it out")
    if "cudagraph_capture_sizes" in args:
        args["cudagraph_capture_sizes"] = tuple(args["cudagraph_capture_sizes"])
    runner = row.get("env", {}).get("VLLM_USE_V2_MODEL_RUNNER")
    total = row.get("bytes", {}).get("total") or int(row["total_gib"] * GiB)
    name = "h200-141gb" if "H200" in row["gpu"] else "h100-80gb"
    return PlanOptions(
        engine="vllm",
        engine_version=row["vllm_version"],
        entrypoint="server" if "server" in row.get("entry", "") else "llm",
        device=Device(name=name, total_bytes=total),
        use_v2_model_runner=None if runner is None else runner == "1",
        **{key: value for key, value in args.items() if key in OPTIONS},
    )


def plan_of(row: Mapping[str, Any], configs: Path) -> Plan:
    """The plan of a measured start-up; raises a TightfitError if there can be none."""
    path = configs / f"{row['config']}.json"
    if not path.exists():
        path = configs / row["config"] / "config.json"
    spec = model_spec(json.loads(path.read_text(encoding="utf-8")))
    return make_plan(spec, options(row), name=row["config"])


def by_constant(plan: Plan) -> int:
    """What would be left for the KV cache of the first rank, if it took its weights and 2 GiB."""
    rank = plan.ranks[0]
    assert rank.budget_bytes is not None
    return rank.budget_bytes - rank.component("weights").planned_bytes - CONSTANT_BYTES


def compare(row: Mapping[str, Any], plan: Plan) -> Row:
    """Put a plan beside its measurement."""
    exact, rank = row.get("bytes", {}), plan.ranks[0]
    captured = next((c.resident_bytes for c in rank.components if c.name == "cuda_graphs"), None)
    driver = row.get("nvidia_smi_used_mib_after_load")
    assert plan.kv_cache.available_bytes is not None
    assert plan.kv_cache.num_blocks is not None
    assert plan.kv_cache.max_concurrency is not None
    assert rank.driver_used_bytes is not None
    return Row(
        id=row["id"],
        kv_planned=plan.kv_cache.available_bytes / GiB,
        kv_constant=by_constant(plan) / GiB,
        kv_measured=exact["available_kv"] / GiB if exact else row["available_kv_gib"],
        total=exact["total"] / GiB if exact else row["total_gib"],
        blocks_planned=plan.kv_cache.num_blocks,
        blocks_measured=row.get("num_gpu_blocks"),
        concurrency_planned=plan.kv_cache.max_concurrency,
        concurrency_measured=row.get("max_concurrency"),
        graphs_planned=None if captured is None else captured / GiB,
        graphs_measured=row.get("cudagraph_measured_gib"),
        driver_planned=rank.driver_used_bytes / GiB,
        driver_measured=None if not driver else driver[0] * MiB / GiB,
    )


def compared(data: Path, configs: Path) -> tuple[list[Row], list[tuple[str, str]]]:
    """All rows, and those that were left out, with the reason."""
    rows: list[Row] = []
    left_out: list[tuple[str, str]] = []
    for line in data.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        try:
            rows.append(compare(row, plan_of(row, configs)))
        except TightfitError as error:
            left_out.append((row["id"], error.message))
    return rows, left_out


def table(rows: list[Row]) -> Iterator[str]:
    head = f"{'row':<36} {'planned':>8} {'measured':>8} {'% dev.':>7} {'% pool':>7}"
    yield f"{head} {'blocks':>15} {'concurrency':>15} {'graphs':>11} {'driver':>13} {'% dev.':>6}"

    def pair(planned: float | None, measured: float | None, digits: int) -> str:
        return "/".join("-" if v is None else f"{v:.{digits}f}" for v in (planned, measured))

    for row in rows:
        driver = row.driver_error
        yield (
            f"{row.id:<36} {row.kv_planned:8.2f} {row.kv_measured:8.2f} {row.of_device:+7.2f} "
            f"{row.of_pool:+7.2f} {pair(row.blocks_planned, row.blocks_measured, 0):>15} "
            f"{pair(row.concurrency_planned, row.concurrency_measured, 2):>15} "
            f"{pair(row.graphs_planned, row.graphs_measured, 2):>11} "
            f"{pair(row.driver_planned, row.driver_measured, 1):>13} "
            f"{'' if driver is None else f'{driver:+.2f}':>6}"
        )


def summary(rows: list[Row]) -> Iterator[str]:
    def line(name: str, errors: list[float], unit: str) -> str:
        sizes = sorted(map(abs, errors))
        p90 = sizes[min(len(sizes) - 1, int(0.9 * len(sizes)))]
        return (
            f"{name:<26} median {statistics.median(sizes):.2f}  p90 {p90:.2f}  worst "
            f"{max(errors, key=abs):+.2f} {unit}"
        )

    yield line("KV cache, % of the device", [row.of_device for row in rows], "%")
    yield line("KV cache, % of the pool", [row.of_pool for row in rows], "%")
    of_device = [100 * (row.kv_constant - row.kv_measured) / row.total for row in rows]
    of_pool = [100 * (row.kv_constant / row.kv_measured - 1) for row in rows]
    yield line("  by weights + 2.0 GiB", of_device, "% of the device")
    yield line("  by weights + 2.0 GiB", of_pool, "% of the pool")
    over = [row for row in rows if row.of_device > 0]
    most = max((row.of_device for row in over), default=0.0)
    yield f"{'over-promises':<26} {len(over)} of {len(rows)}, at most {most:+.2f} % of the device"
    graphs = [e for row in rows if (e := row.graphs_error) is not None]
    if graphs:
        yield line("graphs", graphs, "GiB")
    drivers = [e for row in rows if (e := row.driver_error) is not None]
    if drivers:
        yield line("driver, % of the device", drivers, "%")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=HERE / "data" / "vllm_gpu_rows.jsonl")
    parser.add_argument("--configs", type=Path, default=HERE / "data" / "configs")
    given = parser.parse_args()
    rows, left_out = compared(given.data, given.configs)
    for text in table(rows):
        print(text)
    print()
    if rows:
        for text in summary(rows):
            print(text)
    for name, reason in left_out:
        print(f"left out: {name}: {reason}")


if __name__ == "__main__":
    main()
