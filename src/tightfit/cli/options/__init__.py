"""Options of the commands, with vLLM's names: one annotated type each, grouped as `--help` is.

All options of a plan default to None, which means that the user said nothing. So a command knows
what was asked for, and `takes_options` can give it every option without naming them again.
"""

import inspect
import re
from collections.abc import Callable, Mapping
from copy import copy
from types import ModuleType
from typing import Annotated, Any, ParamSpec, TypeVar

from tightfit.cli.options import (
    benching,
    device,
    graphs,
    host,
    layout,
    memory,
    multimodal,
    scheduling,
    serving,
    starting,
)
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
    "BENCHING",
    "FLAGS",
    "SERVING",
    "STARTING",
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
    "in_panel",
    "plan_options",
    "takes_options",
]

P = ParamSpec("P")
R = TypeVar("R")


def _flags(*modules: ModuleType) -> Mapping[str, Any]:
    found: dict[str, Any] = {}
    for module in modules:
        for name, flag in vars(module).items():
            if name[0].isupper() and hasattr(flag, "__metadata__"):
                field = re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()
                found[field.removeprefix("sharded_")] = flag
    return found


FLAGS = _flags(device, layout, memory, scheduling, graphs, multimodal, host)
"""The option of every field of `PlanOptions` that a user can set, and of the device."""
SERVING = _flags(serving)
"""Those of `run --serve`."""
BENCHING = _flags(benching)
"""Those of `run --bench`."""
STARTING = _flags(starting)
"""Those of `run --engine vllm`."""


def in_panel(panel: str, flags: Mapping[str, Any]) -> Mapping[str, Any]:
    """The same options under another heading of `--help`."""
    moved: dict[str, Any] = {}
    for name, flag in flags.items():
        option = copy(flag.__metadata__[0])
        option.rich_help_panel = panel
        moved[name] = Annotated[flag.__origin__, option]
    return moved


def takes_options(*groups: Mapping[str, Any]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Give a command that ends in `**asked` an option for everything in some groups.

    What it names itself stays as it is there.
    """

    def extend(command: Callable[P, R]) -> Callable[P, R]:
        own = inspect.signature(command).parameters
        flags = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=flag)
            for group in groups
            for name, flag in group.items()
            if name not in own
        ]
        named = [one for one in own.values() if one.kind is not inspect.Parameter.VAR_KEYWORD]
        command.__signature__ = inspect.Signature([*named, *flags])  # type: ignore[attr-defined]
        return command

    return extend


def plan_options(**asked: Any) -> PlanOptions:
    """The options of a plan, read from their spellings on the command line.

    Raises:
        UsageError: a value that cannot be read, or is out of range.
    """
    return read(asked)
