"""Checks of Triton kernels, to be run with TRITON_INTERPRET=1.

The interpreter truncates where a GPU rounds to bfloat16, so that is left to a GPU.
"""

from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.testing import assert_close

from tightfit.runtime.kernels import gated, norms, rotary, sampling
from tightfit.runtime.layers import Gated, RMSNorm
from tightfit.runtime.layers import sums_of_squares as cpu_sums_of_squares
from tightfit.runtime.options import SamplingParams
from tightfit.runtime.ranks.world import World
from tightfit.runtime.rope import HeadNorms, Rotation, rotate_
from tightfit.runtime.sampling import (
    LAST_TOKEN,
    Bounds,
    Sampler,
    SampleRow,
    SamplingRows,
    Vocabulary,
    last_kept,
    on_device,
    token_of,
)
from tightfit.runtime.sampling import uniforms as cpu_uniforms

DTYPES = (torch.float32, torch.float16)


def same(found: Tensor, wanted: Tensor) -> None:
    assert found.dtype == wanted.dtype
    if found.dtype == torch.float32:
        assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    else:
        assert_close(found, wanted, rtol=4e-3, atol=4e-3)


def check_norms() -> None:
    for dtype, features, unit_offset in product(DTYPES, (64, 300), (False, True)):
        # A part of wider rows, as MLA has it.
        x, delta = torch.randn(5, 2 * features).to(dtype)[:, :features], torch.randn(5, features)
        norm = RMSNorm(torch.randn(features).to(dtype), eps=1e-5, unit_offset=unit_offset)
        same(norms.rms_norm(x, norm.weight, eps=1e-5, unit_offset=unit_offset), norm(x))
        heads = torch.randn(3, 7, features).to(dtype)[:, 2:6]
        same(norms.rms_norm(heads, norm.weight, eps=1e-5, unit_offset=unit_offset), norm(heads))
        ours, theirs = x.clone(), x.clone()
        found = norms.rms_norm(
            ours,
            norm.weight,
            eps=1e-5,
            unit_offset=unit_offset,
            delta=delta.to(dtype),
            scale=0.25,
        )
        same(found, norm.after_adding(delta.to(dtype), theirs, 0.25))
        same(ours, theirs)


def check_gated() -> None:
    for dtype, kind, alternating in product(
        DTYPES, ("silu", "gelu", "gelu_tanh", "swigluoai"), (False, True)
    ):
        names = {"gelu_tanh": "gelu_pytorch_tanh"}
        x = torch.randn(3, 2 * 1100).mul_(4).to(dtype)
        wanted = Gated(names.get(kind, kind), alternating=alternating)(x.clone())
        same(gated.gated(x, kind, alternating=alternating), wanted)


def check_rotation() -> None:
    tokens, q_heads, k_heads, head_dim = 5, 6, 2, 24
    positions = torch.tensor([7, 0, 3, 3, 9])
    for dtype, rotary_dim, interleaved, norm in product(
        DTYPES, (24, 16, 0), (False, True), ("", "head", "full")
    ):
        table = torch.randn(11, rotary_dim).to(dtype)
        qkv = torch.randn(tokens, q_heads + 2 * k_heads, head_dim).to(dtype)
        wanted = qkv.clone()
        q, k, _ = wanted.split([q_heads, k_heads, k_heads], dim=1)
        norms_of_heads = None
        if norm == "head":
            q_norm, k_norm = (
                RMSNorm(torch.randn(head_dim).to(dtype), eps=1e-5, unit_offset=interleaved)
                for _ in "qk"
            )
            q.copy_(q_norm(q))
            k.copy_(k_norm(k))
            norms_of_heads = HeadNorms(
                q_weight=q_norm.weight, k_weight=k_norm.weight, eps=1e-5, unit_offset=interleaved
            )
        elif norm == "full":
            weights = [torch.randn(x.shape[1:]).to(dtype) for x in (q, k)]
            features = (q[0].numel(), k[0].numel())
            squares = norms.sums_of_squares(q, k)
            same(squares, cpu_sums_of_squares(q, k))
            norms_of_heads = HeadNorms(
                q_weight=weights[0],
                k_weight=weights[1],
                eps=1e-5,
                squares=squares,
                features=features,
            )
            for x, weight in zip((q, k), weights, strict=True):
                scale = (x.float().square().mean(dim=(1, 2), keepdim=True) + 1e-5).rsqrt()
                x.copy_(x.float() * scale * weight)
        rotations = [
            Rotation(rows=table[positions], interleaved=interleaved),
            Rotation(rows=table, positions=positions, interleaved=interleaved),
        ]
        rotate_(wanted[:, :-k_heads], rotations[0])
        for rotation in rotations if rotary_dim else [None]:
            found = qkv.clone()
            rotary.rotate_(found[:, :-k_heads], rotation, q_heads=q_heads, norms=norms_of_heads)
            same(found, wanted)


@triton.jit
def write_uniforms(key, position, out, first_token, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    first = tl.load(key + 2 * row).to(tl.uint32, bitcast=True)
    second = tl.load(key + 2 * row + 1).to(tl.uint32, bitcast=True)
    place = tl.load(position + row).to(tl.uint32, bitcast=True)
    token = (first_token + column).to(tl.uint32, bitcast=True)
    tl.store(out + row * BLOCK + column, sampling.row_uniforms(first, second, place, token))


def check_uniforms() -> None:
    key = torch.randint(-(2**31), 2**31, (4, 2)).int()
    position = torch.tensor([0, 1, 5000, 2**31 - 1], dtype=torch.int32)
    found = torch.empty(4, 256)
    write_uniforms[(4,)](key, position, found, 151_700, BLOCK=256)
    wanted = cpu_uniforms(key, position, torch.arange(151_700, 151_956, dtype=torch.int32))
    assert torch.equal(found, wanted)


def rows_of(params: list[tuple[float, int, float]]) -> SamplingRows:
    rows = [
        SampleRow(SamplingParams(temperature=t, top_k=k, top_p=p, seed=i), 10 * i)
        for i, (t, k, p) in enumerate(params)
    ]
    return on_device(rows, torch.device("cpu"))


FILTERS = [
    (0.0, 0, 1.0),
    (1.0, 0, 1.0),
    (1.0, 1, 1.0),
    (0.5, 50, 1.0),
    (2.0, 0, 0.9),
    (1.0, 100, 0.5),
    (1.0, 5000, 1e-6),
    (1.0, 3, 0.999),
]


def check_sampling() -> None:
    size, width = 2500, 2512
    for dtype, scale, softcap in (
        (torch.float32, 1.0, None),
        (torch.float16, 0.5, 8.0),
        (torch.bfloat16, 1.0, None),
    ):
        vocabulary = Vocabulary(size=size, widths=[width], scale=scale, softcap=softcap)
        logits = (torch.randn(len(FILTERS), width) * 4).to(dtype)
        # Many equal ones, some of them at the edges of filters.
        logits[:, 1000:1100] = logits[:, :1000].amax(dim=1, keepdim=True)
        logits[:, size:] = 100
        rows = rows_of(FILTERS)
        chosen = rows.filtered
        assert chosen.tolist() == list(range(2, len(FILTERS)))

        wanted = last_kept(logits[chosen, :size], rows[chosen], vocabulary)
        for shown in (logits[:, :size], logits[chosen, :size]):
            found = Bounds(
                logits=torch.full((len(logits),), float("-inf")),
                tokens=torch.full((len(logits),), LAST_TOKEN),
            )
            sampling.bounds_(found, shown, chosen, rows, vocabulary)
            assert torch.equal(found.logits[chosen], wanted.logits)
            # The last of several that are equal need not be named.
            named = found.tokens[chosen].clamp(max=size - 1)
            equal = logits[chosen, :size].float() == wanted.logits[:, None]
            tokens = torch.arange(size)
            first, last = (equal & (tokens <= t[:, None]) for t in (wanted.tokens, named))
            assert torch.equal(first, last)

        sampler = Sampler(vocabulary, World())
        best = sampling.race(logits[:, :size], rows, found, vocabulary, 0)
        assert torch.equal(token_of(best), sampler(logits, rows))
        # A rank's part, and one that has nothing but padding.
        halves = [
            sampling.race(logits[:, a:b], rows, found, vocabulary, a)
            for a, b in ((0, 1100), (1100, size), (size, size))
        ]
        assert torch.equal(torch.stack(halves).amax(dim=0), best)


if __name__ == "__main__":
    torch.manual_seed(0)
    check_norms()
    check_gated()
    check_rotation()
    check_uniforms()
    check_sampling()
