"""tightfit: plan the memory of a language model, prepare its checkpoint, prove that it fits."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tightfit.planner.plan import Plan

__version__ = "0.1.0"
__all__ = ["__version__", "plan"]


def plan(model: str, *, revision: str | None = None, **options: Any) -> "Plan":
    """Plan the memory of a model, as `tightfit plan` does.

    >>> import tightfit
    >>> plan = tightfit.plan("Qwen3-8B.json", gpu="h100", max_model_len="32k")
    >>> plan.verdict.fits
    True
    >>> plan.to_json()["kv_cache"]["dtype"]
    'BF16'

    Args:
        model: a directory, a config.json, a Hub id, or a URL.
        revision: branch, tag or commit of a Hub id.
        **options: the options of the command line with underscores (`gpu`, `gpu_memory`,
            `tensor_parallel_size`, `max_model_len`, ...), as Python values or as their text.

    Raises:
        tightfit.errors.TightfitError: wrong options or input, or a model that is not modelled.
    """
    # Whoever only wants the version must not wait for the planner.
    from tightfit.planner.api import plan_model
    from tightfit.planner.spelling import plan_options

    return plan_model(model, plan_options(options), revision=revision).plan
