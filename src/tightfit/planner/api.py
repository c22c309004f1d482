"""Plan a model wherever its checkpoint is."""

from dataclasses import dataclass

from tightfit.checkpoint.checkpoint import Checkpoint, open_checkpoint
from tightfit.checkpoint.describe import describe
from tightfit.model.spec import ModelSpec
from tightfit.planner.assemble import make_plan
from tightfit.planner.options import PlanOptions
from tightfit.planner.plan import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """A plan with what it was made from."""

    checkpoint: Checkpoint
    spec: ModelSpec
    plan: Plan


def plan_model(
    model: str, options: PlanOptions, *, revision: str | None = None, download: bool = False
) -> Planned:
    """Open a checkpoint, check its headers if it has weights, and plan it.

    Raises:
        TightfitError: see `open_checkpoint`, `describe` and `make_plan`.
    """
    checkpoint = open_checkpoint(model, revision=revision, download=download)
    description = describe(checkpoint)
    plan = make_plan(
        description.spec,
        options,
        name=checkpoint.name,
        from_headers=description.from_headers,
    )
    return Planned(checkpoint=checkpoint, spec=description.spec, plan=plan)
