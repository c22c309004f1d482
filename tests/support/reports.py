"""Plans to draw, and the reports of them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from support.configs import DIRECTORY
from tightfit.cli.report import write_report
from tightfit.planner.api import plan_model
from tightfit.planner.devices import Device
from tightfit.planner.fit_map import FitMap, map_plan
from tightfit.planner.options import PlanOptions
from tightfit.units import GiB

H100 = Device(name="h100-80gb", total_bytes=79 * GiB)
EVIL = "<script>document.title='pwned'</script><img src=x onerror=alert(1)>\"'&@@body@@\x00\x1b[1m"

Planned = tuple[dict[str, Any], FitMap | None]


def planned(model: str, device: Device | None = H100, **options: Any) -> Planned:
    """The document of a plan, and its map."""
    wanted = PlanOptions(device=device, **options)
    done = plan_model(str(DIRECTORY / f"{model}.json"), wanted)
    return json.loads(json.dumps(done.plan.to_json())), map_plan(done.spec, wanted, done.plan)


def written(path: Path, plans: Sequence[Planned]) -> str:
    """The report of some plans."""
    grids = [None if fit is None else fit.to_json() for _, fit in plans]
    write_report([document for document, _ in plans], path, grid=grids)
    return path.read_text("utf-8")


def with_advice(document: dict[str, Any]) -> dict[str, Any]:
    document["advice"] = [
        {"change": "--max-num-seqs 256", "saves_bytes": GiB, "costs": "<b>fewer</b>", "fits": True},
        {"change": "--kv-cache-dtype fp8", "saves_bytes": 99, "costs": "accuracy", "fits": False},
    ]
    parts = [("loading_peak", 16 * GiB), ("mm_processor_cache", 4 * GiB)]
    document["host"] = {
        "components": [
            {"name": n, "planned_bytes": b, "origin": "derived", "formula": "4 x 1"}
            for n, b in parts
        ],
        "total_bytes": 20 * GiB,
    }
    return document


def sweep_plans() -> list[Planned]:
    """Six points, of which some fit."""
    return [
        planned("Llama-3.1-70B", tensor_parallel_size=tp, max_model_len=length)
        for tp in (1, 2, 4)
        for length in (8192, 131_072)
    ]
