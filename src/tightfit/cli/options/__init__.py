"""Options of the commands, with vLLM's names: one annotated type each, grouped as `--help` is.

All options of a plan default to None, which means that the user said nothing. So a command knows
what was asked for, and `takes_plan_options` can give it every option without naming them again.
"""

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

from tightfit.cli.options import device, graphs, host, layout, memory, multimodal, scheduling
from tightfit.cli.options.common import (
    Json,
    Model,
    OptionalModel,
    Quiet,
    Revision,
    TensorParallelSize,
)
from tightfit.cli.options.layout import ShardedTensorParallelSize
from tightfit.cli.options.memory import (
    BlockSize,
    Dtype,
    GpuMemoryUtilization,
    KvCacheMemoryBytes,
    MaxModelLen,
    MaxNumBatchedTokens,
    MaxNumSeqs,
)
from tightfit.planner.options import PlanOptions
from tightfit.planner.spelling import plan_options as read

__all__ = [
    "FLAGS",
    "BlockSize",
    "Dtype",
    "GpuMemoryUtilization",
    "Json",
    "KvCacheMemoryBytes",
    "MaxModelLen",
    "MaxNumBatchedTokens",
    "MaxNumSeqs",
    "Model",
    "OptionalModel",
    "Quiet",
    "Revision",
    "ShardedTensorParallelSize",
    "TensorParallelSize",
    "plan_options",
    "takes_plan_options",
]

P = ParamSpec("P")
R = TypeVar("R")


def _flags() -> Mapping[str, Any]:
    found: dict[str, Any] = {}
    for module in (device, layout, memory, scheduling, graphs, multimodal, host):
        for name, flag in vars(module).items():
            if name[0].isupper() and hasattr(flag, "__metadata__"):
                field = re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()
                found[field.removeprefix("sharded_")] = flag
    return found


FLAGS = _flags()
"""The option of every field of `PlanOptions` that a user can set, and of the device."""


def takes_plan_options(command: Callable[P, R]) -> Callable[P, R]:
    """Give a command that ends in `**asked` an option for everything in `FLAGS`."""
    own = inspect.signature(command).parameters.values()
    flags = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=flag)
        for name, flag in FLAGS.items()
    ]
    parameters = [one for one in own if one.kind is not inspect.Parameter.VAR_KEYWORD]
    command.__signature__ = inspect.Signature([*parameters, *flags])  # type: ignore[attr-defined]
    return command


def plan_options(**asked: Any) -> PlanOptions:
    """The options of a plan, read from their spellings on the command line.

    Raises:
        UsageError: a value that cannot be read, or is out of range.
    """
    return read(asked)
