"""Kernels compiled for an H100 as they are launched, and never launched: no GPU is needed.

The interpreter takes what the compiler refuses, such as a whole number for one of 8-bit floats, and
knows no limit of shared memory.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from runtime.quantized_cases import CASES, quantized
from tightfit.model.blocks.mlp import MoE
from tightfit.planner.engines.builtin_paged import workspace_elements
from tightfit.runtime.kernels import gated, kv_store, norms, paged, rotary, rounding, routing
from tightfit.runtime.kernels import sampling as kernel
from tightfit.runtime.kernels.packed import Packed
from tightfit.runtime.kernels.tiles import H100_SHARED_BYTES
from tightfit.runtime.layers import Weights
from tightfit.runtime.models.grouped import GroupedExperts
from tightfit.runtime.options import SamplingParams
from tightfit.runtime.quantized.packed import CodesMatrix, PackedExperts, packed_matrices
from tightfit.runtime.rope import HeadNorms, Rotation
from tightfit.runtime.sampling import Bounds, SampleRow, Vocabulary, on_device

BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
GROUPS_OF_128 = "w8a16", "fp8-block", "gptq"


class _H100:
    """What Triton asks of a driver before it launches."""

    class utils:
        @staticmethod
        def get_device_properties(_: int) -> dict[str, int]:
            return {"max_shared_mem": H100_SHARED_BYTES}

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@pytest.fixture(autouse=True)
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that a test compiles, by name."""
    found: list[str] = []
    run = JITFunction.run

    def only_compile(self: Any, *values: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *values, grid=grid, warmup=True, **options)
        assert kernel.metadata.shared <= H100_SHARED_BYTES, self.__name__
        found.append(self.__name__)
        return kernel

    monkeypatch.setattr(JITFunction, "run", only_compile)
    driver.set_active(_H100())  # type: ignore[no-untyped-call]
    return found


def half(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """With scales in the dtype that is most served."""
    return {k: t.to(BF16) if t.dtype == torch.float16 else t for k, t in tensors.items()}


@pytest.mark.parametrize("label", CASES)
def test_matrices(label: str, compiled: list[str]) -> None:
    """Of sizes that blocks do not divide, where groups allow that."""
    rows, columns = (128, 256) if label in GROUPS_OF_128 else (88, 320)
    weight, tensors = quantized(label, (rows,), 0, columns)
    found = packed_matrices(weight, half(tensors))
    assert found is not None
    (matrix,) = found
    if isinstance(matrix, CodesMatrix):
        matrix.by_torch = False
    for tokens in (3, 300):
        matrix(torch.zeros(tokens, columns, dtype=BF16), torch.zeros(rows, dtype=BF16))
    matrix.exact()(torch.zeros(40, columns, dtype=BF16))
    assert len(compiled) >= 3


@pytest.mark.parametrize("label", ["plain", *CASES])
def test_experts(label: str, compiled: list[str]) -> None:
    inner, hidden = (128, 256) if label in GROUPS_OF_128 else (192, 320)
    pairs = []
    for parts, columns in (((inner, inner), hidden), ((hidden,), inner)):
        if label == "plain":
            values = torch.zeros(4, sum(parts), columns, dtype=BF16)
            pairs.append(PackedExperts(Packed(kind="plain", values=values, columns=columns), None))
        else:
            weight, tensors = quantized(label, parts, 4, columns)
            found = packed_matrices(weight, half(tensors))
            assert isinstance(found, PackedExperts)
            pairs.append(found)
    layer = MoE(
        num_experts=4, top_k=2, intermediate_size=inner, activation="silu", renormalize=True
    )
    experts = GroupedExperts(layer, *pairs, Weights(tensors={}), "m")
    for tokens in (1, 100):
        x = torch.zeros(tokens, hidden, dtype=BF16)
        experts(x, torch.zeros(tokens, 2), torch.zeros(tokens, 2, dtype=torch.int64))
    assert compiled


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "value_dim", "cached", "kind"),
    [
        (32, 8, 128, 128, BF16, "full"),
        (32, 8, 128, 128, FP8, "full"),
        (8, 1, 256, 256, BF16, "capped"),
        (64, 8, 64, 64, BF16, "sinks"),
        (16, 1, 576, 512, BF16, "full"),
    ],
)
def test_attention(
    heads: int, kv_heads: int, head_dim: int, value_dim: int, cached: torch.dtype, kind: str
) -> None:
    latent, length = value_dim != head_dim, 4096
    keys = torch.zeros(4, 16, kv_heads, head_dim, dtype=cached)
    values = None if latent else torch.zeros(4, 16, kv_heads, value_dim, dtype=cached)
    how: dict[str, Any] = {
        "scale": 0.1,
        "window": None if kind == "full" else 128,
        "softcap": 50.0 if kind == "capped" else None,
        "sinks": torch.zeros(heads) if kind == "sinks" else None,
        "k_scale": 1.0,
        "v_scale": 1.0,
    }
    for sequences in (1, 64):
        q = torch.zeros(sequences, heads + 2 * kv_heads, head_dim, dtype=BF16)[:, :heads]
        out = torch.zeros(sequences, heads, value_dim, dtype=BF16)
        k = torch.zeros(sequences, kv_heads, head_dim, dtype=BF16)
        v = None if latent else torch.zeros(sequences, kv_heads, value_dim, dtype=BF16)
        slots = torch.zeros(sequences, dtype=torch.int64)
        lengths = torch.zeros(sequences, dtype=torch.int32)
        table = torch.zeros(sequences, length // 16, dtype=torch.int32)
        size = workspace_elements(sequences, heads, kv_heads, head_dim, value_dim, length)
        paged.decode(
            out,
            q,
            keys,
            values,
            lengths,
            table,
            torch.zeros(size),
            max_length=length,
            new=(k, v, slots),
            **how,
        )
        kv_store.store(k, v, slots, keys, values)
    starts = torch.zeros(3, dtype=torch.int32)
    paged.prefill(out, q, keys, values, starts, lengths[:2], table[:2], **how)


@pytest.mark.parametrize("features", [576, 4096, 16384])
def test_norms_and_activations(features: int) -> None:
    x, weight = torch.zeros(5, features, dtype=BF16), torch.zeros(features, dtype=BF16)
    norms.rms_norm(x, weight, eps=1e-5, unit_offset=False)
    norms.rms_norm(x, weight, eps=1e-5, unit_offset=True, delta=x.clone(), scale=1.0)
    for kind in ("silu", "gelu", "gelu_tanh", "swigluoai"):
        gated.gated(x, kind, alternating=kind == "swigluoai")


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("normed", ["no", "heads", "all"])
def test_rotations_are_compiled_once(normed: str, interleaved: bool, compiled: list[str]) -> None:
    """Whatever the number of tokens, and wherever their positions lie."""
    for tokens in (1, 5, 8, 16):
        qkv = torch.zeros(tokens, 48, 128, dtype=BF16)
        norm = None
        if normed != "no":
            every = normed == "all"
            norm = HeadNorms(
                q_weight=torch.zeros((32, 128) if every else 128, dtype=BF16),
                k_weight=torch.zeros((8, 128) if every else 128, dtype=BF16),
                eps=1e-5,
                squares=norms.sums_of_squares(qkv[:, :32], qkv[:, 32:40]) if every else None,
                features=(1, 1),
            )
        for positions in torch.zeros(2, 1 + tokens, dtype=torch.int64)[:, 1:]:
            table = torch.zeros(100, 64, dtype=BF16)
            rotation = Rotation(rows=table, positions=positions, interleaved=interleaved)
            rotary.rotate_(qkv[:, :40], rotation, q_heads=32, norms=norm)
    assert "_rotate" in compiled


@pytest.mark.parametrize("size", [151_936, 32_064])
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_sampling(size: int, softcap: float | None) -> None:
    vocabulary = Vocabulary(size=size, widths=[size], softcap=softcap)
    for params in (SamplingParams(), SamplingParams(temperature=1.0, top_k=50, top_p=0.9)):
        for count in (1, 4):
            rows = on_device([SampleRow(params, 5)] * count, torch.device("cpu"))
            logits, bounds = torch.zeros(count, size, dtype=BF16), None
            if len(rows.filtered):
                tokens = torch.zeros(count, dtype=torch.int64)
                bounds = Bounds(logits=torch.zeros(count), tokens=tokens)
                kernel.bounds_(bounds, logits, rows.filtered, rows, vocabulary)
            kernel.race(logits, rows, bounds, vocabulary, 0)


@pytest.mark.parametrize(
    ("experts", "top_k", "groups", "top_groups"), [(8, 2, 1, 1), (256, 8, 8, 4), (60, 4, 1, 1)]
)
def test_routing(experts: int, top_k: int, groups: int, top_groups: int) -> None:
    scores = torch.zeros(5, experts, dtype=BF16)
    for correction in None, torch.zeros(experts):
        routing.choose(
            scores,
            top_k,
            renormalize=True,
            sigmoid=correction is not None,
            correction=correction,
            groups=groups,
            top_groups=top_groups,
        )


@pytest.mark.parametrize(
    ("dtype", "group_size", "exponents"),
    [("I8", 0, False), ("F8_E4M3", 0, False), ("F8_E4M3", 128, False), ("F8_E4M3", 32, True)],
)
def test_rounding(dtype: str, group_size: int, exponents: bool) -> None:
    x = torch.zeros(5, 512, dtype=BF16)
    rounding.rounded(x, dtype, group_size=group_size, exponents=exponents)
    if not group_size:
        rounding.rounded_codes(x, dtype)
        rounding.rounded_codes(x, dtype, torch.ones(1))


def test_rounding_to_four_bits() -> None:
    rounding.rounded(
        torch.zeros(5, 512, dtype=BF16), "F4_E2M1", group_size=16, overall=torch.ones(1)
    )
