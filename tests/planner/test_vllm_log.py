"""Start-up logs of several versions of vLLM, and plans held against them."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.configs import read_spec
from tightfit.errors import ConfigError, TightfitError
from tightfit.planner.assemble import make_plan
from tightfit.planner.devices import CATALOGUE
from tightfit.planner.options import PlanOptions
from tightfit.planner.vllm_log import compare, mismatches, read_log
from tightfit.units import GiB

LOGS = Path(__file__).parents[1] / "data" / "logs"


def gib(value: float) -> int:
    return round(value * GiB)


CASES: list[tuple[str, str, dict[str, Any], dict[str, float], dict[str, float]]] = [
    (
        "v0.8.3-v0-tp2",
        "0.8.3",
        {"tensor_parallel_size": 2, "max_model_len": 29_000, "max_num_seqs": 64}
        | {"gpu_memory_utilization": 0.85, "dtype": "bfloat16"},
        {"model_load": 7.5122, "total": 23.58, "requested": 20.05, "non_torch": 0.2}
        | {"activation_peak": 1.1, "available_kv": 11.24, "cuda_graphs": 0.32},
        {"num_gpu_blocks": 11_509, "max_concurrency": 6.35, "concurrency_tokens": 29_000},
    ),
    (
        "v0.10.2-tp2",
        "0.10.2",
        {"tensor_parallel_size": 2, "max_model_len": 16_384, "gpu_memory_utilization": 0.92}
        | {"cudagraph_capture_sizes": (1, 2, 4, 8, 16), "enable_chunked_prefill": True},
        {"model_load": 13.9281, "available_kv": 54.89, "free_at_start": 78.66, "total": 79.18}
        | {"activation_peak": 2.42, "non_torch": 1.6, "cuda_graphs": 0.52},
        {"kv_tokens": 599_568, "max_concurrency": 36.59, "utilization": 0.92},
    ),
    (
        "v0.25.1",
        "0.25.1",
        {"max_model_len": 8192, "max_num_seqs": 1024, "max_num_batched_tokens": 16_384}
        | {"use_v2_model_runner": True, "load_format": "dummy"}
        | {"compilation_config": {"cudagraph_mode": "FULL_AND_PIECEWISE"}},
        {"model_load": 15.0, "available_kv": 55.85, "requested": 72.84, "free_at_start": 78.66}
        | {"activation_peak": 1.77, "non_torch": 0.22, "non_kv_total": 17.0, "cuda_graphs": 0.98},
        {"kv_tokens": 457_504, "max_concurrency": 55.85, "utilization": 0.92},
    ),
    (
        "v0.32.0-too-long",
        "0.32.0.dev1+gabcdef",
        {"engine_version": "0.32.0", "kv_cache_dtype": "fp8", "enforce_eager": True},
        {"needed_kv": 8.0, "available_kv": 4.25, "cuda_graphs_estimate": 0.73},
        {"estimated_max_model_len": 69_632},
    ),
    (
        "v0.32.0-consumed",
        "0.32.0",
        {},
        {"consumed": 15.5, "activation_peak": 1.91, "cuda_graphs_estimate": 0.14}
        | {"kv_in_use": 55.43},
        {"kv_tokens": 457_504, "max_concurrency": 55.85},
    ),
]


@pytest.mark.parametrize(("name", "version", "options", "sizes", "numbers"), CASES)
def test_read(
    name: str,
    version: str,
    options: dict[str, Any],
    sizes: dict[str, float],
    numbers: dict[str, float],
) -> None:
    log = read_log(LOGS / f"{name}.log")
    assert log.version == version
    assert {key: log.options.get(key) for key in options} == options
    assert {key: log.bytes_of(key) for key in sizes} == {k: gib(v) for k, v in sizes.items()}
    assert {key: log.number(key) for key in numbers} == numbers
    PlanOptions(**log.options)


def test_what_else_a_log_says() -> None:
    old, two, new = (read_log(LOGS / f"{case[0]}.log") for case in CASES[:3])
    assert (old.engine, two.engine, new.engine) == ("V0", "V1", "V1")
    assert old.model == "meta-llama/Llama-3.1-8B-Instruct"
    assert (set(two.ranks), two.entrypoint) == ({"Worker_TP1", "Worker_TP0"}, "server")
    assert two.all_bytes["available_kv"] == (gib(55.01), gib(54.89))
    assert two.bytes_of("kv_in_use") == 58_939_456_789
    assert two.options["compilation_config"] == {"cudagraph_mode": "PIECEWISE"}
    assert (two.warm_compile, two.sampler) == (False, "native")
    assert (new.warm_compile, new.sampler) == (True, "flashinfer")
    assert (new.runner, new.architecture) == ("v2", "LlamaForCausalLM")
    failed = read_log(LOGS / "v0.32.0-too-long.log")
    assert len(failed.errors) == 1
    assert failed.errors[0].startswith("To serve at least one request")


def test_the_last_of_several_starts_counts(tmp_path: Path) -> None:
    first = (LOGS / "v0.32.0-too-long.log").read_text()
    path = tmp_path / "both.log"
    path.write_text(first + (LOGS / "v0.25.1.log").read_text())
    log = read_log(path)
    assert (log.version, log.errors) == ("0.25.1", ())
    assert log.bytes_of("available_kv") == gib(55.85)


def test_a_log_that_a_terminal_wrapped(tmp_path: Path) -> None:
    """Copied from a terminal of 147 columns, as people do."""
    path = tmp_path / "wrapped.log"
    lines = (LOGS / "v0.10.2-tp2.log").read_text().splitlines()
    pieces = [line[at : at + 147] for line in lines for at in range(0, len(line), 147)]
    path.write_text("\n".join(pieces))
    wrapped, whole = read_log(path), read_log(LOGS / "v0.10.2-tp2.log")
    assert (wrapped.options, wrapped.model) == (whole.options, whole.model)
    assert wrapped.bytes_of("available_kv") == whole.bytes_of("available_kv")


def test_a_plan_beside_the_log_of_the_same_start_up() -> None:
    log = read_log(LOGS / "v0.25.1.log")
    device = CATALOGUE["h100-80gb"]
    options = PlanOptions(**{**log.options, "device": device, "entrypoint": log.entrypoint})
    plan = make_plan(read_spec("Llama-3.1-8B"), options, name="llama")
    assert mismatches(plan, log) == ()
    lines = {line.name: line for line in compare(plan, log)}
    for name in ("budget", "model_load", "non_kv_total", "available_kv", "non_torch"):
        assert abs(lines[name].difference or 0) < 0.2 * GiB, name
    assert lines["max_concurrency"].difference == pytest.approx(0, abs=0.3)
    assert "num_gpu_blocks" not in lines


def test_a_plan_of_something_else_is_told() -> None:
    log = read_log(LOGS / "v0.10.2-tp2.log")
    plan = make_plan(
        read_spec("Llama-3.1-8B"), PlanOptions(device=CATALOGUE["l4-24gb"]), name="llama"
    )
    told = "\n".join(mismatches(plan, log))
    for word in ("vLLM 0.10.2", "tensor_parallel_size is 2", "max_model_len is 16384", "device"):
        assert word in told


def test_files_that_are_no_log(tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    path.write_bytes(b"\xff\xfe\x00hello\n")
    with pytest.raises(ConfigError, match=r"a\.log has no line of vLLM"):
        read_log(path)
    with pytest.raises(ConfigError, match="cannot read"):
        read_log(tmp_path)


@pytest.mark.parametrize(
    "line",
    [
        "non-default args: {'model': 'a', 'dtype': '\0', 'max_model_len': 8}",
        f"non-default args: {{'model': 'a', 'max_model_len': {'9' * 5000}, 'seed': object()}}",
        f"GPU KV cache size: {'9' * 400} tokens",
        f"Current kv cache memory in use is {'9' * 5000} bytes",
        "Initializing a V1 LLM engine (v0.11.0) with config: max_seq_len=\u00b2,",
        f"Initializing a V1 LLM engine (v1) with config: cudagraph_capture_sizes: [{'9' * 5000}]",
    ],
)
def test_values_that_are_none(line: str, tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    path.write_text(f"INFO vLLM API server version 0.11.0\nINFO {line}\nINFO # GPU blocks: 5\n")
    log = read_log(path)
    assert log.number("num_gpu_blocks") == 5
    assert log.number("kv_tokens") is None
    assert log.bytes_of("kv_in_use") is None
    assert set(log.options) <= {"engine_version", "max_model_len"}


LINES = st.sampled_from(
    [line for path in sorted(LOGS.glob("*.log")) for line in path.read_text().splitlines()]
)


@st.composite
def mutated(draw: st.DrawFn) -> str:
    text = "\n".join(draw(st.lists(LINES, max_size=8)))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(text)))
        text = text[:at] + draw(st.text(max_size=3)) + text[at + draw(st.integers(0, 40)) :]
    return text


@given(text=mutated())
def test_no_log_gives_a_traceback(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "mutated.log"
    path.write_text(text, encoding="utf-8", errors="replace")
    with suppress(TightfitError):
        PlanOptions(**read_log(path).options)
