"""Nine models on which planners go wrong, with what is true of them, worked out from their shapes.

Each is wrong in some planner: grouped heads, a head dimension that is not hidden_size / heads,
latent attention with fp8 blocks, a window pattern that the config leaves to its class, mxfp4 with
windows, a vision tower, and three kinds of recurrent state. Everything here is arithmetic over the
published sizes; nothing comes from tightfit, which tests and the benchmark hold against it.
"""

import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import ceil, prod
from pathlib import Path
from typing import Any

from tightfit.model.families import model_spec
from tightfit.model.parameters import parameters
from tightfit.units import dtype_bytes

TOKENS = 32_768
"""Length of the one sequence whose cache is counted."""

_BF16 = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """A model with its truth.

    `cache_bytes` is what one sequence of `TOKENS` tokens keeps in bfloat16, with what attention can
    still see and with recurrent states.
    """

    config: str
    params: int
    checkpoint_bytes: int
    cache_bytes: int


def _llama() -> Probe:
    hidden, middle, layers, vocabulary = 4096, 14_336, 32, 128_256
    attention = 2 * hidden * hidden + 2 * 1024 * hidden
    layer = attention + 3 * middle * hidden + 2 * hidden
    params = 2 * vocabulary * hidden + layers * layer + hidden
    return Probe(
        config="Llama-3.1-8B",
        params=params,
        checkpoint_bytes=_BF16 * params,
        cache_bytes=TOKENS * layers * 2 * 8 * 128 * _BF16,
    )


def _qwen3_moe() -> Probe:
    hidden, layers, vocabulary, experts, middle = 2048, 48, 151_936, 128, 768
    attention = 2 * 32 * 128 * hidden + 2 * 4 * 128 * hidden + 2 * 128
    mixture = experts * 3 * middle * hidden + experts * hidden
    params = 2 * vocabulary * hidden + layers * (attention + mixture + 2 * hidden) + hidden
    return Probe(
        config="Qwen3-30B-A3B",
        params=params,
        checkpoint_bytes=_BF16 * params,
        cache_bytes=TOKENS * layers * 2 * 4 * 128 * _BF16,
    )


def _deepseek_v3() -> Probe:
    """Linear weights are a byte, with a float32 scale for every 128 x 128 of them.

    Published files also hold a layer for multi-token prediction, which engines load only to
    speculate, and which is left out here.
    """
    hidden, layers, dense, vocabulary, experts = 7168, 61, 3, 129_280, 256
    attention = ((1536, hidden), (24_576, 1536), (576, hidden), (32_768, 512), (hidden, 16_384))
    expert = ((2048, hidden), (2048, hidden), (hidden, 2048))
    linear = (
        layers * attention
        + dense * ((18_432, hidden), (18_432, hidden), (hidden, 18_432))
        + (layers - dense) * (experts + 1) * expert
    )
    packed = sum(map(prod, linear))
    scales = sum(ceil(rows / 128) * ceil(columns / 128) for rows, columns in linear)
    norms = layers * (2 * hidden + 1536 + 512) + hidden
    plain = 2 * vocabulary * hidden + norms + (layers - dense) * experts * hidden
    routing_biases = (layers - dense) * experts
    return Probe(
        config="DeepSeek-V3",
        params=packed + plain + routing_biases,
        checkpoint_bytes=packed + 4 * scales + _BF16 * plain + 4 * routing_biases,
        cache_bytes=TOKENS * layers * (512 + 64) * _BF16,
    )


def _gemma3() -> Probe:
    """Every sixth layer sees everything, the others 1024 tokens; the config does not say so."""
    hidden, middle, layers, vocabulary = 5376, 21_504, 62, 262_208
    attention = 2 * 32 * 128 * hidden + 2 * 16 * 128 * hidden + 2 * 128
    layer = attention + 3 * middle * hidden + 4 * hidden
    width, wide = 1152, 4304
    block = 4 * (width * width + width) + 2 * wide * width + wide + width + 4 * width
    patches = (896 // 14) ** 2
    tower = 27 * block + 3 * 14 * 14 * width + width + patches * width + 2 * width
    params = vocabulary * hidden + layers * layer + hidden + tower + width * hidden + width
    full = layers // 6
    return Probe(
        config="gemma-3-27b-it",
        params=params,
        checkpoint_bytes=_BF16 * params,
        cache_bytes=(full * TOKENS + (layers - full) * 1024) * 2 * 16 * 128 * _BF16,
    )


def _gpt_oss() -> Probe:
    """Experts are mxfp4: half a byte a weight, and a byte of scale for every 32 of them."""
    hidden, layers, vocabulary, experts = 2880, 36, 201_088, 128
    attention = 2 * 4096 * hidden + 4096 + hidden + 2 * (512 * hidden + 512) + 64
    router = experts * hidden + experts
    biases = experts * (2 * hidden + hidden)
    layer = attention + router + biases + 2 * hidden
    plain = 2 * vocabulary * hidden + layers * layer + hidden
    packed = layers * experts * 3 * hidden * hidden
    return Probe(
        config="gpt-oss-120b",
        params=plain + packed,
        checkpoint_bytes=_BF16 * plain + packed // 2 + packed // 32,
        cache_bytes=layers // 2 * (TOKENS + 128) * 2 * 8 * 64 * _BF16,
    )


def _qwen_vl() -> Probe:
    hidden, middle, layers, vocabulary = 3584, 18_944, 28, 152_064
    attention = 2 * hidden * hidden + hidden + 2 * (512 * hidden + 512)
    layer = attention + 3 * middle * hidden + 2 * hidden
    width, wide = 1280, 3420
    block = 4 * (width * width + width) + 3 * wide * width + 2 * wide + width + 2 * width
    merged = 4 * width
    merger = width + merged * merged + merged + hidden * merged + hidden
    tower = 2 * 3 * 14 * 14 * width + 32 * block + merger
    params = 2 * vocabulary * hidden + layers * layer + hidden + tower
    return Probe(
        config="Qwen2.5-VL-7B-Instruct",
        params=params,
        checkpoint_bytes=_BF16 * params,
        cache_bytes=TOKENS * layers * 2 * 4 * 128 * _BF16,
    )


def _mamba2(hidden: int, heads: int, groups: int, *, state: int = 128) -> tuple[int, int]:
    """Parameters of a Mamba 2 mixer with heads of 64, and elements of its state."""
    inner = heads * 64
    convolved = inner + 2 * groups * state
    projections = (inner + convolved + heads) * hidden + hidden * inner
    params = projections + convolved * 4 + convolved + 3 * heads + inner
    return params, convolved * 3 + heads * 64 * state


def _nemotron_h() -> Probe:
    """24 Mamba 2 layers, 24 MLPs of two matrices, and 4 of attention, each with one norm."""
    hidden, vocabulary = 4096, 131_072
    mixer, state = _mamba2(hidden, 128, 8)
    attention = 2 * hidden * hidden + 2 * 1024 * hidden
    layers = 24 * mixer + 24 * 2 * 21_504 * hidden + 4 * attention + 52 * hidden
    params = 2 * vocabulary * hidden + layers + hidden
    return Probe(
        config="Nemotron-H-8B-Base-8K",
        params=params,
        checkpoint_bytes=_BF16 * params,
        cache_bytes=(TOKENS * 4 * 2 * 8 * 128 + 24 * state) * _BF16,
    )


def _granite() -> Probe:
    """36 Mamba 2 layers and 4 of attention, each with 72 experts and a shared MLP."""
    hidden, vocabulary, experts = 4096, 100_352, 72
    mixer, state = _mamba2(hidden, 128, 1)
    attention = 2 * hidden * hidden + 2 * 1024 * hidden
    mixture = experts * 3 * 768 * hidden + experts * hidden + 3 * 1536 * hidden
    params = vocabulary * hidden + 36 * mixer + 4 * attention + 40 * (mixture + 2 * hidden) + hidden
    return Probe(
        config="granite-4.0-h-small",
        params=params,
        checkpoint_bytes=_BF16 * params,
        cache_bytes=(TOKENS * 4 * 2 * 8 * 128 + 36 * state) * _BF16,
    )


def _mamba2_780m() -> Probe:
    hidden, layers, vocabulary = 1536, 48, 50_288
    mixer, state = _mamba2(hidden, 48, 1)
    params = vocabulary * hidden + layers * (mixer + hidden) + hidden
    return Probe(
        config="mamba2-780m",
        params=params,
        checkpoint_bytes=_BF16 * params,
        cache_bytes=layers * state * _BF16,
    )


PROBES: Mapping[str, Probe] = {
    probe.config: probe
    for probe in (
        _llama(),
        _qwen3_moe(),
        _deepseek_v3(),
        _gemma3(),
        _gpt_oss(),
        _qwen_vl(),
        _nemotron_h(),
        _granite(),
        _mamba2_780m(),
    )
}


def stored_tensors(config: Mapping[str, Any]) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Name, dtype and shape of every tensor that files of such a model hold."""
    spec = model_spec(config)
    seen: set[str] = set()
    for weight in parameters(spec):
        for part in weight.parts:
            several = weight.experts and not weight.stacked
            names = (
                [part.source.format(expert=e) for e in range(weight.experts)]
                if several
                else [part.source]
            )
            for name in names:
                if name not in seen:
                    seen.add(name)
                    yield name, weight.dtype or spec.dtype, weight.source_shape(part)


def header_of(config: Mapping[str, Any]) -> tuple[bytes, int]:
    """The head of a safetensors file of the whole model, and the bytes that follow it."""
    document: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dtype, shape in stored_tensors(config):
        start, end = end, end + dtype_bytes(dtype, prod(shape))
        document[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(document, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, end


def write_virtual(directory: Path, config: Mapping[str, Any]) -> None:
    """A checkpoint with its true header, whose data are a hole in the file."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    head, data_bytes = header_of(config)
    with (directory / "model.safetensors").open("wb") as file:
        file.write(head)
        file.truncate(len(head) + data_bytes)
