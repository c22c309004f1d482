"""How a job differs from that which an output is of, in the words of the command line."""

from collections.abc import Mapping
from typing import Any, NoReturn

from tightfit.errors import OutputError

_WORDS: Mapping[str, str] = {
    "tightfit": "the version of tightfit",
    "max_shard_bytes": "--max-shard-size",
    "method": "--method",
    "layout": "--layout",
    "tensor_parallel_size": "--tensor-parallel-size",
    "pipeline_parallel_size": "--pipeline-parallel-size",
    "expert_parallel": "--enable-expert-parallel",
}
_SENTENCES: Mapping[str, str] = {
    "source": "the model is another one, or was written anew",
    "source_fingerprint": "the model is another one, or its tensors lie elsewhere",
    "cut_fingerprint": "config.json is another one, or its tensors are others",
    "quantization": "what its config says of the quantization is something else",
    "quantization_config": "what its config says of the quantization is something else",
}
_RECIPE: Mapping[str, str] = {
    "scheme": "--quantize",
    "group_size": "--group-size",
    "format": "--format",
    "method": "--method",
}
_LONGEST = 120


def was_and_is(what: str, was: Any, now: Any) -> str:
    """`--scheme was int8, and is w4a16`."""
    return f"{what} was {_shown(was)}, and is {_shown(now)}"


def difference_of(key: str, was: Any, now: Any) -> str:
    """Say that a key of `Job.identity` is different."""
    if key == "quantized":
        return _of_quantized(_mapping(was), _mapping(now))
    return _SENTENCES.get(key) or was_and_is(_WORDS.get(key, key), was, now)


def refuse_other(where: object, difference: str) -> NoReturn:
    """Refuse a place that holds something of another job.

    Raises:
        OutputError: always.
    """
    raise OutputError(
        f"{where} holds the work of another call: {difference}",
        hint="give a new directory, or the same options and source as there",
    )


def _of_quantized(was: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    for key, flag in _RECIPE.items():
        if was.get(key) != now.get(key):
            return was_and_is(flag, was.get(key), now.get(key))
    return "--ignore, or a rule of --recipe, is another one"


def _mapping(value: Any) -> Mapping[str, Any]:
    """Nothing, of what is none: it may come from a damaged file."""
    return value if isinstance(value, Mapping) else {}


def _shown(value: Any) -> str:
    if value is None:
        return "not given"
    text = f"{value:,}" if type(value) is int else str(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
