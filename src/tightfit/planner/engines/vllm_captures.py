"""Which CUDA graphs vLLM captures: the mode, and the batch sizes.

Sources: `config/vllm.py: _set_cudagraph_sizes`, `config/compilation.py`, `models/config.py`.
"""

from typing import Any

from tightfit.errors import UsageError
from tightfit.model.blocks.mlp import MoE
from tightfit.model.spec import ModelSpec
from tightfit.planner.engines.vllm_versions import Captures, Rules
from tightfit.planner.options import Option, PlanOptions

MODES = ("NONE", "PIECEWISE", "FULL", "FULL_DECODE_ONLY", "FULL_AND_PIECEWISE")


def cudagraph_mode(spec: ModelSpec, options: PlanOptions, rules: Rules) -> Option[str]:
    """The mode: the flag's, or what the version and the model's attention allow.

    Raises:
        UsageError: a mode that vLLM does not know.
    """
    asked = options.compilation_config.get("cudagraph_mode")
    if options.enforce_eager:
        return Option(value="NONE", origin="flag")
    if asked is not None:
        name = str(asked).rsplit(".", maxsplit=1)[-1].upper()
        if name not in MODES:
            raise UsageError(f"unknown cudagraph_mode {asked!r}", hint="one of " + ", ".join(MODES))
        return Option(value=name, origin="flag")
    if not rules.full_graphs and options.compilation_config.get("mode", 3) != 3:
        # Only what was split into pieces is captured.
        return Option(value="NONE", origin="flag")
    level = options.optimization_level
    if level is not None and level < 2 and rules.full_graphs:
        return Option(value="NONE" if level == 0 else "PIECEWISE", origin="flag")
    if spec.encoder_tokens:
        return Option(value="FULL_DECODE_ONLY", origin="engine default")
    # The backend of chunked attention cannot be captured whole.
    full = rules.full_graphs and not spec.is_chunked
    return Option(value="FULL_AND_PIECEWISE" if full else "PIECEWISE", origin="engine default")


def captured_sizes(
    spec: ModelSpec,
    options: PlanOptions,
    rules: Rules,
    *,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    limit: int = 512,
) -> Option[tuple[int, ...]]:
    """The batch sizes of the options, or the version's default.

    Raises:
        UsageError: sizes that contradict each other.
    """
    given, maximum = options.cudagraph_capture_sizes, options.max_cudagraph_capture_size
    config = options.compilation_config
    given = given or _sizes(config.get("cudagraph_capture_sizes"))
    maximum = maximum or _size(config.get("max_cudagraph_capture_size"))
    asked = given is not None or maximum is not None
    if not asked and _has_own_kernels(spec):
        maximum = 1024
    sizes = capture_sizes(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        given=given,
        maximum=maximum,
        limit=limit,
        captures=rules.captures,
    )
    return Option(value=sizes, origin="flag" if asked else "engine default")


def _has_own_kernels(spec: ModelSpec) -> bool:
    mlps = (layer.mlp for layer in spec.layers)
    return any(isinstance(mlp, MoE) and mlp.own_kernels for mlp in mlps)


def capture_sizes(
    *,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    given: tuple[int, ...] | None = None,
    maximum: int | None = None,
    limit: int = 512,
    captures: Captures = Captures.WITH_LIMITS,
) -> tuple[int, ...]:
    """The batch sizes that are captured.

    Raises:
        UsageError: sizes that contradict each other.
    """
    if given is not None:
        sizes = tuple(sorted({size for size in given if size <= max_num_batched_tokens}))
        if maximum is not None and (not sizes or sizes[-1] != maximum):
            raise UsageError(
                f"--max-cudagraph-capture-size {maximum} is not the largest of "
                f"--cudagraph-capture-sizes {' '.join(map(str, given))}",
                hint="give one of them",
            )
        return sizes
    if captures is Captures.EIGHTS:
        return (1, 2, 4, *range(8, (maximum or limit) + 1, 8))
    top = maximum or min(2 * max_num_seqs, limit)
    # A maximum of its own, as gpt-oss has, came with steps of 16 in every version.
    if captures is Captures.EIGHTS_OF_BATCH and maximum is None:
        return tuple(size for size in (1, 2, 4, *range(8, top + 1, 8)) if size <= top)
    top = min(top, max_num_batched_tokens)
    found = {size for size in (1, 2, 4, *range(8, 256, 8)) if size <= top}
    found |= set(range(256, top + 1, 16))
    found |= {max_num_batched_tokens} & set(range(top + 1))
    if captures is Captures.WITH_LIMITS and maximum is None:
        found |= {max_num_seqs} & set(range(top + 1))
    return tuple(sorted(found))


def _sizes(value: Any) -> tuple[int, ...] | None:
    if value is None:
        return None
    if not isinstance(value, list) or not value or not all(map(_size, value)):
        raise UsageError(
            f"cudagraph_capture_sizes {value!r} is not a list of sizes", hint="such as [1, 2, 4]"
        )
    return tuple(value)


def _size(value: Any) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**20:
        raise UsageError(f"{value!r} is not the size of a batch", hint="a number of tokens")
    return value
