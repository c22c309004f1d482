"""Plan a model wherever its checkpoint is."""

from dataclasses import dataclass, replace

from tightfit.checkpoint.checkpoint import Checkpoint, open_checkpoint
from tightfit.checkpoint.describe import describe
from tightfit.model.spec import ModelSpec
from tightfit.planner.assemble import make_plan
from tightfit.planner.options import PlanOptions
from tightfit.planner.plan import Plan

_TOKENIZER = "tokenizer.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """A plan with what it was made from."""

    checkpoint: Checkpoint
    spec: ModelSpec
    plan: Plan


def plan_model(
    model: str,
    options: PlanOptions,
    *,
    revision: str | None = None,
    download: bool = False,
    with_text: bool = True,
) -> Planned:
    """Open a checkpoint, check its headers if it has weights, and plan it.

    Args:
        model: anything that `open_checkpoint` takes.
        options: of the plan.
        revision: of a Hub id.
        download: fetch the weights of a Hub id.
        with_text: whether the engine will load the tokenizer.

    Raises:
        TightfitError: see `open_checkpoint`, `describe` and `make_plan`.
    """
    checkpoint = open_checkpoint(model, revision=revision, download=download)
    description = describe(checkpoint)
    if with_text and checkpoint.source.exists(_TOKENIZER):
        options = replace(options, tokenizer_json_bytes=checkpoint.source.size(_TOKENIZER))
    plan = make_plan(
        description.spec,
        options,
        name=checkpoint.name,
        from_headers=description.from_headers,
    )
    return Planned(checkpoint=checkpoint, spec=description.spec, plan=plan)
