"""Read what a start-up of vLLM printed about memory.

The wordings are those of vLLM 0.7 to 0.33 (`v1/worker/gpu_worker.py`, both model runners,
`v1/core/kv_cache_utils.py`, `v1/engine/core.py`, `utils/mem_utils.py`, and `worker/worker.py`
before V1). vLLM's GB and GiB are both 2**30.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from tightfit.errors import ConfigError
from tightfit.planner.vllm_log.setting import echoed_arguments, setting_of
from tightfit.units import GiB

MAX_LOG_BYTES = 32 * 2**20
"""A start-up is at the beginning of a log, however long the server ran afterwards."""
_MAX_LINE = 2**17

_N = r"(-?\d[\d,]{0,24}(?:\.\d{1,24})?)"
"""Bounded, because a long run of digits would be tried from everywhere to everywhere."""
_BYTES: tuple[tuple[str, str], ...] = (
    ("model_load", rf"Model loading took {_N} Gi?B"),
    ("model_load", rf"Loading model weights took {_N} Gi?B"),
    ("available_kv", rf"Available KV cache memory: {_N} GiB"),
    ("available_kv", rf"memory reserved for KV Cache is {_N}GiB"),
    ("kv_in_use", rf"Current kv cache memory in use is {_N} GiB"),
    ("kv_given", rf"reserved {_N} ?GiB memory for KV Cache"),
    ("cuda_graphs", rf"(?<!Encoder g)(?<!encoder g)raph capturing finished in .*?, took {_N} GiB"),
    ("cuda_graphs_estimate", rf"Estimated CUDA graph memory: {_N} GiB total"),
    ("cuda_graphs_estimate", rf"CUDA graph pool memory: .*?actual\), {_N} GiB \(estimated"),
    ("weights", rf"model weights take {_N}GiB"),
    ("weights", rf"Actual usage is {_N} GiB for weight"),
    ("weights", rf"weights memory: {_N}GiB"),
    ("activation_peak", rf"activation peak memory takes {_N}GiB"),
    ("activation_peak", rf"{_N} GiB for peak activation"),
    ("activation_peak", rf"torch peak memory increase: {_N}GiB"),
    ("non_torch", rf"non_torch_memory takes {_N}GiB"),
    ("non_torch", rf"{_N} GiB for non-torch memory"),
    ("non_torch", rf"non-torch forward increase memory: {_N}GiB"),
    ("consumed", rf"Actual usage is {_N} GiB for consumed memory"),
    ("consumed", rf"total consumed \(from mem_get_info\): {_N}GiB"),
    ("non_kv_total", rf"Total non KV cache memory: {_N}GiB"),
    ("total", rf"total_gpu_memory \({_N}GiB\)"),
    ("total", rf"Free memory on device [^(]*\([\d.]+/{_N} GiB\)"),
    ("free_at_start", rf"Free memory on device [^(]*\({_N}/"),
    ("free_at_start", rf"Initial free memory:? {_N} ?GiB"),
    ("requested", rf"gpu_memory_utilization \([\d.]+\) = {_N}GiB"),
    ("requested", rf"Desired GPU memory utilization is \([\d.]+, {_N} GiB\)"),
    ("requested", rf"less than desired GPU memory utilization \([\d.]+, {_N} GiB\)"),
    ("requested", rf"Requested memory: [\d.]+ \(util\), {_N} GiB"),
    ("needed_kv", rf"\({_N} GiB KV cache is needed"),
    ("available_kv", rf"larger than the available KV cache memory \({_N} GiB\)"),
)
_NUMBERS: tuple[tuple[str, str], ...] = (
    ("kv_tokens", rf"KV cache size: {_N} tokens"),
    ("max_concurrency", rf"Maximum concurrency for [\d,]+ tokens per request: {_N}x"),
    ("concurrency_tokens", rf"Maximum concurrency for {_N} tokens per request"),
    ("num_gpu_blocks", rf"(?i:# (?:gpu|cuda) blocks): {_N}"),
    ("num_gpu_blocks", rf"num_gpu_blocks is: {_N}"),
    ("attention_block_size", rf"Setting attention block size to {_N} tokens"),
    ("padding_layers", rf"Add {_N} padding layers"),
    ("estimated_max_model_len", rf"estimated maximum model length is {_N}"),
    ("utilization", rf"gpu_memory_utilization \({_N}\)"),
    ("utilization", rf"Desired GPU memory utilization is \({_N},"),
    ("utilization", rf"less than desired GPU memory utilization \({_N},"),
    ("utilization", rf"Requested memory: {_N} \(util\)"),
    ("utilization", rf"current --gpu-memory-utilization={_N}"),
    ("auto_max_model_len", rf"Auto-fit max_model_len: reduced from \d+ to {_N}"),
    ("chunk", rf"Chunked prefill is enabled with max_num_batched_tokens={_N}"),
)
_PATTERNS = [(name, re.compile(pattern), GiB) for name, pattern in _BYTES] + [
    (name, re.compile(pattern), 1) for name, pattern in _NUMBERS
]
_EXACT = re.compile(r"Current kv cache memory in use is (\d{1,18}) bytes")
_MOST = 1e15
"""No such figure is larger; a log may be anything."""
_HINTS = re.compile(
    rb"GiB| GB |KV cache size|concurrency|blocks: |num_gpu_blocks|block size|padding|engine \(v|"
    rb"args: |version |Model Runner|No available|out of memory|Auto-fit|compiled graph|top-k|"
    rb"Compiling a|Resolved arch|KV cache \(|batched_tokens=|memory-utilization|in use is"
)
"""One of these is in every line that can matter, and in few others."""
_WRAPPED = re.compile(rb"LLM engine \(v|args: ")
_START = re.compile(
    rb"\s*(?:\x1b\[[0-9;]*m)*(?:\(\w+ [^)]*pid=|INFO|WARNING|DEBUG|ERROR|\[[A-Za-z]|\d{4}-|$)"
)
_ERRORS = (
    "To serve at least one request with the model",
    "No available memory for the cache blocks",
    "is larger than the maximum number of tokens that can be stored in KV cache",
    "on startup is less than desired GPU memory utilization",
    "CUDA out of memory",
    "HIP out of memory",
)
_ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_RANK = re.compile(r"\((?:Ray)?(?:Vllm)?Worker\w*(?P<where>_[A-Z][\w]*| rank=\d+)?[ )]")
_ENGINE = re.compile(r"Initializing an? (V[01]) LLM engine \(v([^)]+)\) with config: ?(.*)")
_VERSIONS = (
    re.compile(r"vLLM API server version v?(\d[\w.+]*)"),
    re.compile(r"█\s+version v?(\d[\w.+]*)"),
    re.compile(r"Initializing an LLM engine \(v([^)]+)\)"),
)

DECIDES_MIN = frozenset({"available_kv", "kv_tokens", "max_concurrency", "num_gpu_blocks"})
"""The rank with the least of these decides for all; of the others the largest is told."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VLLMLog:
    """What the last start-up in a log printed; what it did not print is absent or None.

    `all_bytes` and `all_numbers` have every rank's value in the order of the log.
    """

    version: str | None
    engine: str | None
    """`V0` or `V1`."""
    model: str | None
    runner: str | None
    """`v2` where the log says so."""
    arguments: Mapping[str, Any]
    """What the user passed, as vLLM echoed it."""
    options: Mapping[str, Any]
    """The start-up as fields of `PlanOptions`."""
    entrypoint: str
    architecture: str | None
    all_bytes: Mapping[str, tuple[int, ...]]
    all_numbers: Mapping[str, tuple[float, ...]]
    errors: tuple[str, ...]
    ranks: tuple[str, ...]
    truncated: bool = False
    warm_compile: bool | None = None
    """Whether compiled graphs came from a cache: compiling has a peak of its own."""
    sampler: str | None = None
    """`flashinfer`, or `native`, whose sort takes several times as much."""

    def bytes_of(self, name: str) -> int | None:
        """Of several ranks, the value that decides."""
        values = self.all_bytes.get(name)
        return None if not values else (min if name in DECIDES_MIN else max)(values)

    def number(self, name: str) -> float | None:
        """Likewise, for what is not bytes."""
        values = self.all_numbers.get(name)
        return None if not values else (min if name in DECIDES_MIN else max)(values)


@dataclass(slots=True)
class _State:
    """What has been read of one start-up."""

    version: str | None = None
    engine: str | None = None
    config: str = ""
    arguments: dict[str, Any] = field(default_factory=dict)
    runner: str | None = None
    server: bool = False
    architecture: str | None = None
    bytes: dict[str, list[int]] = field(default_factory=dict)
    numbers: dict[str, list[float]] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    ranks: list[str] = field(default_factory=list)
    warm_compile: bool | None = None
    sampler: str | None = None

    @property
    def done(self) -> bool:
        """Whether the start-up got as far as its pool, or failed."""
        return "kv_tokens" in self.numbers or "num_gpu_blocks" in self.numbers or bool(self.errors)


def read_log(path: Path | str) -> VLLMLog:
    """Read a log of vLLM.

    Raises:
        ConfigError: it cannot be read, or no line of it is vLLM's about memory.
    """
    path = Path(path)
    hint = "give what vLLM prints while it starts, such as `vllm serve ... 2>&1 | tee vllm.log`"
    state = _State()
    try:
        with path.open("rb") as file:
            for line in _lines(file):
                state = _line(line, state)
            truncated = bool(file.read(1))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}", hint=hint) from error
    if not state.bytes and not state.numbers and not state.errors and state.version is None:
        raise ConfigError(f"{path} has no line of vLLM about memory", hint=hint)
    return _log(state, truncated=truncated)


def _lines(file: BinaryIO) -> Iterator[str]:
    """Lines that may matter; what a terminal has wrapped is put together where it matters most."""
    read, long = 0, b""
    while read < MAX_LOG_BYTES and (data := file.readline(_MAX_LINE)):
        read += len(data)
        if long and _START.match(data) is None and len(long) < _MAX_LINE:
            long += data.rstrip(b"\r\n")
            continue
        if long:
            yield long.decode("utf-8", "replace")
            long = b""
        if _WRAPPED.search(data):
            long = data.rstrip(b"\r\n")
        elif _HINTS.search(data):
            yield data.decode("utf-8", "replace")
    if long:
        yield long.decode("utf-8", "replace")


def _line(line: str, state: _State) -> _State:
    line = _ANSI.sub("", line).strip()
    if match := _ENGINE.search(line):
        if state.done:
            state = _State(version=state.version, arguments=state.arguments, server=state.server)
        state.engine, state.version, state.config = match[1], match[2], match[3]
        return state
    if (arguments := echoed_arguments(line)) is not None:
        if state.done:
            state = _State(version=state.version, server=state.server)
        state.arguments = arguments
        state.server = state.server or "APIServer" in line or "api_server" in line
        return state
    for pattern in _VERSIONS:
        if match := pattern.search(line):
            state.version = match[1]
            state.server = state.server or "API server" in line
            return state
    if match := re.search(r"Resolved architecture:? (\w+)", line):
        state.architecture = match[1]
    _remarks(line, state)
    if any(error in line for error in _ERRORS):
        message = re.sub(r"^.*?(?:\w+Error|ERROR)\b[^:]*: ", "", line)
        if message not in state.errors:
            state.errors.append(message[:2000])
    _measures(line, state)
    return state


def _remarks(line: str, state: _State) -> None:
    """What is said in passing, and explains a figure."""
    if "Using V2 Model Runner" in line:
        state.runner = "v2"
    elif "Compiling a graph for" in line:
        state.warm_compile = False
    elif "Directly load the compiled graph" in line and state.warm_compile is None:
        state.warm_compile = True
    elif "Using FlashInfer for top-p & top-k" in line:
        state.sampler = "flashinfer"
    elif "PyTorch-native implementation of top-p & top-k" in line:
        state.sampler = "native"


def _measures(line: str, state: _State) -> None:
    if match := _RANK.search(line):
        rank = match[0].strip("() ").split(" pid")[0]
        if rank not in state.ranks and len(state.ranks) < 4096:
            state.ranks.append(rank)
    seen: set[str] = set()
    for name, pattern, unit in _PATTERNS:
        if name in seen or not (match := pattern.search(line)):
            continue
        seen.add(name)
        value = float(match[1].replace(",", ""))
        if abs(value) > _MOST:
            continue
        if unit == GiB:
            state.bytes.setdefault(name, []).append(round(value * GiB))
        else:
            state.numbers.setdefault(name, []).append(value)
    if match := _EXACT.search(line):
        state.bytes.setdefault("kv_in_use", []).append(int(match[1]))


def _log(state: _State, *, truncated: bool) -> VLLMLog:
    setting = setting_of(state.config, state.arguments)
    options = dict(setting.options)
    if state.version is not None:
        options["engine_version"] = re.split(r"[+]|\.?(?:dev|rc|post)\d", state.version)[0]
    if utilizations := state.numbers.get("utilization"):
        options.setdefault("gpu_memory_utilization", utilizations[0])
    if chunks := state.numbers.get("chunk"):
        options.setdefault("max_num_batched_tokens", int(chunks[-1]))
    if state.runner == "v2":
        options.setdefault("use_v2_model_runner", True)
    return VLLMLog(
        version=state.version,
        engine=state.engine,
        model=setting.model,
        runner=state.runner,
        arguments=state.arguments,
        options=options,
        entrypoint="server" if state.server or "port" in state.arguments else "llm",
        architecture=state.architecture,
        all_bytes={name: tuple(values) for name, values in state.bytes.items()},
        all_numbers={name: tuple(values) for name, values in state.numbers.items()},
        errors=tuple(state.errors),
        ranks=tuple(state.ranks),
        truncated=truncated,
        warm_compile=state.warm_compile,
        sampler=state.sampler,
    )
