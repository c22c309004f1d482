"""Random and mutated configs and options, and what has to hold for each.

Used by the tests beside it and by the coverage-guided harnesses (`harness_*.py`).
"""

import json
import math
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import lru_cache
from typing import Any

from hypothesis import strategies as st

from support.configs import MODELS, read_config
from tightfit.errors import TightfitError
from tightfit.model.families import architectures, model_spec
from tightfit.planner.advice import advise
from tightfit.planner.assemble import engine, make_plan
from tightfit.planner.devices import CATALOGUE
from tightfit.planner.emit import emit
from tightfit.planner.explain import explain
from tightfit.planner.fit import fit
from tightfit.planner.options import KV_DTYPES, PlanOptions
from tightfit.planner.plan import Plan
from tightfit.planner.spelling import plan_options

SECONDS = 2.0
"""CPU time of one plan, with an explanation or a command of it."""
SEARCH_SECONDS = 20.0
"""Of a search, which plans hundreds of times."""

_SIGNED = ("headroom_bytes", "saves_bytes")
"""Figures that may be negative."""

_NUMBERS = (0, 1, -1, 2, 3, 7, 16, 64, 127, 128, 1000, 4096, 2**15, 2**31, 2**40, 2**63, 10**30)
_WORDS = (
    *("", "auto", "fp8", "bfloat16", "float32", "yarn", "linear", "longrope", "full_attention"),
    *(
        "sliding_attention",
        "linear_attention",
        "mamba",
        "attention",
        "M*-E",
        "awq",
        "gptq",
        "mxfp4",
    ),
    *("modelopt", "compressed-tensors", "NVFP4", "float8_e4m3fn", "silu", "relu2", "re:.*", "\0"),
)
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from(_NUMBERS),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.sampled_from([0.5, 1.5, 1e-300, 1e308, -0.0]),
    st.sampled_from(_WORDS),
    st.text(max_size=6),
)
junk = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.sampled_from(_WORDS) | st.text(max_size=4), inner, max_size=4),
    ),
    max_leaves=6,
)


# Read once, for files may change while a long run goes on.
_config = lru_cache(maxsize=None)(read_config)


@lru_cache
def _known_values() -> dict[str, list[Any]]:
    """Every key of all configs, with values that it has there."""
    found: dict[str, list[Any]] = {}

    def collect(value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                values = found.setdefault(key, [])
                if len(values) < 20 and inner not in values:
                    values.append(inner)
                collect(inner)

    for name in MODELS:
        collect(_config(name))
    return found


def _places(config: Any) -> list[tuple[Any, Any]]:
    """Every container in a config with each of its keys or indices."""
    found: list[tuple[Any, Any]] = []
    left = [config]
    while left:
        value = left.pop()
        keys = list(value) if isinstance(value, dict) else list(range(min(len(value), 50)))
        found += [(value, key) for key in keys]
        left += [value[key] for key in keys if isinstance(value[key], dict | list)]
    return found


def _deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


def _altered(draw: st.DrawFn, value: Any) -> Any:
    """Something close to the value, which looks more plausible than junk."""
    if isinstance(value, bool) or value is None:
        return draw(st.sampled_from([True, False, None, 0, 1, "true"]))
    if isinstance(value, int):
        near = [value + 1, value - 1, 2 * value, value // 2, -value, float(value), str(value)]
        return draw(st.sampled_from([*near, *_NUMBERS]))
    if isinstance(value, float):
        return draw(st.sampled_from([-value, value / 2, value * 1e3, math.inf, math.nan, 0.0]))
    if isinstance(value, str):
        return draw(st.sampled_from([value[:-1], value * 2, value.upper(), [value], *_WORDS]))
    if isinstance(value, list):
        kept = draw(st.integers(0, len(value)))
        return draw(st.sampled_from([value[:kept], value[kept:], value * 2, value[::-1], {}]))
    kept_keys = list(value)[: draw(st.integers(0, len(value)))]
    return {key: value[key] for key in kept_keys}


@st.composite
def configs(draw: st.DrawFn) -> Any:
    """A published config with up to four changes anywhere in it, or junk."""
    if draw(st.integers(0, 30)) == 0:
        architecture = draw(st.sampled_from(architectures()))
        fields = draw(st.dictionaries(st.sampled_from(sorted(_known_values())), junk, max_size=8))
        return {**fields, "architectures": [architecture]}
    config = deepcopy(_config(draw(st.sampled_from(MODELS))))
    for _ in range(draw(st.sampled_from([0, 1, 1, 1, 2, 3, 4]))):
        places = _places(config)
        if not places:
            break
        where, key = draw(st.sampled_from(places))
        kind = draw(st.sampled_from([0, 0, 0, 2, 3, 3, 4, 5, 6, 7, 7]))
        if kind == 0:
            where[key] = _altered(draw, where[key])
        elif kind == 2:
            where[key] = draw(junk)
        elif kind == 3:
            del where[key]
        elif kind == 4 and isinstance(where, dict):
            name = draw(st.sampled_from(sorted(_known_values())))
            where[name] = deepcopy(draw(st.sampled_from(_known_values()[name])))
        elif kind == 5:
            config["architectures"] = [draw(st.sampled_from(architectures()))]
        elif kind == 6:
            where[key] = draw(
                st.sampled_from(
                    [{str(key): where[key]}, [where[key]], deepcopy(config), _deep(150)]
                )
            )
        else:
            other = _config(draw(st.sampled_from(MODELS)))
            name = draw(st.sampled_from(sorted(other)))
            config[name] = deepcopy(other[name])
    return config


_FIELDS = tuple(n for n in PlanOptions.__annotations__ if n not in ("device", "engine"))
_PLAUSIBLE: dict[str, st.SearchStrategy[Any]] = {
    "engine_version": st.sampled_from(
        ["0.8.0", "0.11.2", "0.25.1", "0.32.0", "0.33", "9.9.9", "x"]
    ),
    "entrypoint": st.sampled_from(["server", "llm"]),
    "tensor_parallel_size": st.sampled_from([1, 2, 3, 4, 8, 16, 64]),
    "pipeline_parallel_size": st.sampled_from([1, 2, 3, 7, 16]),
    "data_parallel_size": st.sampled_from([1, 2, 8]),
    "decode_context_parallel_size": st.sampled_from([1, 2, 4]),
    "max_model_len": st.sampled_from([-1, 1, 100, 512, 2048, 131_072]),
    "max_num_seqs": st.sampled_from([1, 7, 256, 2**20]),
    "max_num_batched_tokens": st.sampled_from([1, 100, 8192, 2**20]),
    "gpu_memory_utilization": st.sampled_from([1e-9, 0.1, 0.5, 0.92, 1.0]),
    "kv_cache_memory_bytes": st.sampled_from([0, 1, 2**30, 2**49]),
    "block_size": st.sampled_from([1, 3, 16, 64, 256, 2**30]),
    "kv_cache_dtype": st.sampled_from(["auto", *KV_DTYPES]),
    "quantization": st.sampled_from(
        ["fp8", "mxfp8", "int8_per_channel_weight_only", "awq", "none"]
    ),
    "dtype": st.sampled_from(["auto", "float16", "bfloat16", "float32", "half"]),
    "cudagraph_capture_sizes": st.lists(
        st.sampled_from([1, 2, 8, 512, 2**19]), min_size=1, max_size=4
    ),
    "max_cudagraph_capture_size": st.sampled_from([1, 512, 2**20]),
    "compilation_config": st.dictionaries(
        st.sampled_from(
            ["mode", "level", "cudagraph_mode", "cudagraph_capture_sizes", "pass_config"]
        ),
        st.sampled_from(["FULL", "PIECEWISE", "NONE", "FULL_AND_PIECEWISE", 0, 3, [1, 2], {}, None])
        | junk,
        max_size=3,
    ),
    "limit_mm_per_prompt": st.dictionaries(
        st.sampled_from(["image", "video", "audio", "x"]),
        st.sampled_from([0, 1, 16, {"count": 2, "width": 512, "height": 512}, {"count": 1}]) | junk,
        max_size=3,
    ),
    "mm_processor_kwargs": st.dictionaries(
        st.sampled_from(
            [
                "max_pixels",
                "min_pixels",
                "num_crops",
                "max_dynamic_patch",
                "size",
                "fps",
                "images_kwargs",
            ]
        ),
        st.sampled_from([1, 100_000, 2**24, {"longest_edge": 448}, {"shortest_edge": 1}]) | junk,
        max_size=3,
    ),
    "load_format": st.sampled_from(["auto", "dummy", "sharded_state"]),
    "mamba_cache_dtype": st.sampled_from(["auto", "float16", "float32"]),
    "mamba_ssm_cache_dtype": st.sampled_from(["auto", "bfloat16", "float32"]),
    "mm_processor_cache_type": st.sampled_from(["lru", "shm"]),
    "mm_encoder_tp_mode": st.sampled_from(["weights", "data"]),
}


def _plausible(name: str) -> st.SearchStrategy[Any]:
    """Values of a field that it may well have."""
    if name in _PLAUSIBLE:
        return _PLAUSIBLE[name]
    kind = str(PlanOptions.__annotations__[name])
    if "bool" in kind:
        return st.booleans()
    return st.sampled_from([0.0, 0.5, 40.0, 1e12] if "float" in kind else [1, 2, 64, 10_000])


_JSON = ("compilation_config", "limit_mm_per_prompt", "mm_processor_kwargs")


@st.composite
def option_sets(draw: st.DrawFn) -> dict[str, Any]:
    """Options as a command line or Python gives them: most of them possible, some not."""
    given: dict[str, Any] = {"engine": draw(st.sampled_from(["vllm", "vllm", "vllm", "builtin"]))}
    if draw(st.booleans()):
        given["gpu"] = draw(st.sampled_from(sorted(CATALOGUE)))
    for name in draw(st.lists(st.sampled_from(_FIELDS), max_size=5, unique=True)):
        value = draw(_plausible(name) if draw(st.integers(0, 19)) else junk)
        if name in _JSON and isinstance(value, dict) and draw(st.booleans()):
            value = json.dumps(value)
        given[name] = value
    return given


questions = st.sampled_from(["plan"] * 6 + ["explain", "emit", "advise", "fit"])


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Stop what takes more CPU time, where it is.

    Raises:
        TimeoutError: it did.
    """

    def stop(*_: object) -> None:
        raise TimeoutError(f"more than {seconds} s of CPU time")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def check_document(value: Any, name: str = "") -> None:
    """No figure is infinite, no number, or below zero; all is JSON."""
    if isinstance(value, dict):
        for key, inner in value.items():
            assert isinstance(key, str)
            check_document(inner, key)
    elif isinstance(value, list | tuple):
        for inner in value:
            check_document(inner, name)
    elif isinstance(value, float):
        assert math.isfinite(value), name
        assert value >= 0, name
    elif isinstance(value, int):
        assert value >= 0 or name in _SIGNED, f"{name} = {value}"
    else:
        assert value is None or isinstance(value, str), name


def check_message(error: TightfitError, most: int = 1000) -> None:
    """An error is one line, which does not repeat the whole input."""
    assert error.message
    assert "\n" not in error.message
    assert len(error.message) < most


def check(config: Any, given: dict[str, Any], question: str) -> str:
    """Plan, and ask something of the plan; returns how it ended.

    Raises:
        AssertionError: a figure or a message is wrong.
        TimeoutError: it takes too long.
        Exception: anything but a `TightfitError` is a bug.
    """
    search = question in ("advise", "fit")
    try:
        with at_most(SEARCH_SECONDS if search else SECONDS):
            spec = model_spec(config)
            options = plan_options(given)

            def replan(other: PlanOptions) -> Plan:
                return make_plan(spec, other, name="it")

            plan = replan(options)
            document = plan.to_json()
            # The option itself may be -1; what was resolved is checked.
            check_document({key: document[key] for key in document if key != "options"})
            json.dumps(document, allow_nan=False)
            if question == "explain":
                chosen = engine(options)
                adapted = chosen.adapt(spec, options)
                for one in explain(plan, adapted, chosen.parallel(options), "all"):
                    check_document(one.to_json())
            elif question == "emit":
                for kind in ("vllm", "compose", "k8s"):
                    assert emit(plan, "some/model", kind, options=options)  # type: ignore[arg-type]
            elif question == "advise":
                for advice in advise(plan, options, replan):
                    check_document(advice.to_json())
            elif question == "fit":
                check_document(fit(options, replan, sizes=(1, 8)).to_json())
    except TightfitError as error:
        check_message(error)
        return type(error).__name__
    return "planned"
