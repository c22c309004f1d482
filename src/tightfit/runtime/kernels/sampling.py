"""The sampler's two kernels: the race for the best token, and the bounds of top-k and top-p.

Nothing is sorted, and no float32 copy of the logits is made. The race gives the noise that
`runtime.sampling` gives on a CPU, bit by bit. The bounds are found in the integers that floats sort
like, from the highest bit to the lowest: a bit is set if so many tokens, or so much probability, is
at or above it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tightfit.runtime.sampling import LAST_TOKEN, Bounds, SamplingRows, Vocabulary

_RACE_BLOCK = 2048
_BOUNDS_BLOCK = 8192
_BITS = {torch.bfloat16: 16, torch.float16: 19, torch.float32: 32}
"""Upper bits of a float32 that tell apart what a dtype can hold."""


@triton.jit
def _mix(x):
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    x ^= x >> 16
    return x


@triton.jit
def row_uniforms(key, other_key, position, token):
    """What `runtime.sampling.uniforms` gives in a row; all are uint32."""
    first = _mix(position ^ key)
    second = _mix(first ^ other_key)
    bits = _mix(_mix(token ^ first) ^ second)
    uniform = ((bits >> 1).to(tl.float32) + 0.5) * 4.656612873077393e-10
    return tl.minimum(uniform, 0.9999999403953552)


@triton.jit
def _gumbel(uniform):
    # The logarithm of nearly 1 loses what decides; there is no log1p.
    series = uniform * (1.0 + uniform * (0.5 + uniform * 0.3333333333333333))
    return -tl.log(tl.where(uniform < 0.0078125, series, -tl.log(1.0 - uniform)))


@triton.jit
def _score(logits, scale, softcap, CAPPED: tl.constexpr):
    scores = logits * scale
    if CAPPED:
        # tanh(x) is 2 * sigmoid(2x) - 1.
        scores = softcap * (2.0 * tl.sigmoid(scores * (2.0 / softcap)) - 1.0)
    return scores


@triton.jit
def _sortable(x):
    """int32 that sort like float32; -0 and 0 are equal."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


# Their alignment changes from step to step, and each would be a kernel of its own.
@triton.jit(do_not_specialize=["positions"])
def _race(
    logits,
    best,
    temperatures,
    keys,
    positions,
    bound_logits,
    bound_tokens,
    row_stride,
    param_stride,
    width,
    first_token,
    scale,
    softcap,
    CAPPED: tl.constexpr,
    BOUND: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, part = tl.program_id(0), tl.program_id(1)
    column = part * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    token = first_token + column
    place = logits + row.to(tl.int64) * row_stride + column
    raw = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    score = _score(raw, scale, softcap, CAPPED)
    temperature = tl.load(temperatures + row * param_stride)
    if temperature > 0.0:
        key = tl.load(keys + row * param_stride).to(tl.uint32, bitcast=True)
        other_key = tl.load(keys + row * param_stride + 1).to(tl.uint32, bitcast=True)
        position = tl.load(positions + row).to(tl.uint32, bitcast=True)
        uniform = row_uniforms(key, other_key, position, token.to(tl.uint32, bitcast=True))
        score = score / temperature + _gumbel(uniform)
    if BOUND:
        bound = tl.load(bound_logits + row)
        last = tl.load(bound_tokens + row)
        kept = (raw > bound) | ((raw == bound) & (token <= last))
        score = tl.where(kept, score, float("-inf"))
    ranked = (_sortable(score).to(tl.int64) << 32) | (LAST - token).to(tl.int64)
    ranked = tl.where(inside, ranked, -9223372036854775808)
    tl.store(best + row * tl.num_programs(1) + part, tl.max(ranked, axis=0))


def race(
    logits: Tensor,
    rows: SamplingRows,
    bounds: Bounds | None,
    vocabulary: Vocabulary,
    first_token: int,
) -> Tensor:
    """The best of a rank's tokens in every row, as `runtime.sampling.ranked`: int64 [rows].

    Args:
        logits: [rows, tokens], as the model gave them, without padding.
        rows: how to sample each row.
        bounds: what top-k and top-p have left.
        vocabulary: what is done to logits.
        first_token: the id of the first column.
    """
    count, width = logits.shape
    parts = max(triton.cdiv(width, _RACE_BLOCK), 1)
    best = torch.empty(count, parts, dtype=torch.int64, device=logits.device)
    assert logits.stride(1) == 1
    assert rows.temperature.stride(0) == rows.key.stride(0)
    _race[(count, parts)](
        logits,
        best,
        rows.temperature,
        rows.key,
        rows.position,
        rows.temperature if bounds is None else bounds.logits,
        rows.position if bounds is None else bounds.tokens,
        logits.stride(0),
        rows.key.stride(0),
        width,
        first_token,
        vocabulary.scale,
        vocabulary.softcap or 1.0,
        CAPPED=vocabulary.softcap is not None,
        BOUND=bounds is not None,
        LAST=LAST_TOKEN,
        BLOCK=_RACE_BLOCK,
        num_warps=4,
    )
    return best.amax(dim=1)


@triton.jit
def _levels(x, SHIFT: tl.constexpr):
    """uint32 that sort like x, less the bits that its dtype does not have."""
    return (_sortable(x).to(tl.uint32, bitcast=True) ^ 0x80000000) >> SHIFT


@triton.jit
def _loaded(logits, first, width: tl.constexpr, BLOCK: tl.constexpr):
    column = first + tl.arange(0, BLOCK)
    inside = column < width
    return tl.load(logits + column, mask=inside, other=float("-inf")).to(tl.float32), inside


@triton.jit
def _weight(x, top, temperature, scale, softcap, CAPPED: tl.constexpr):
    """The probability of a logit, relative to that of the highest."""
    return tl.exp((_score(x, scale, softcap, CAPPED) - top) / temperature)


@triton.jit
def _sum_from(
    level,
    logits,
    width: tl.constexpr,
    top,
    temperature,
    scale,
    softcap,
    WEIGHTED: tl.constexpr,
    CAPPED: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """How many tokens are at a level or above it, or the sum of their weights."""
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for first in range(0, width, BLOCK):
        x, inside = _loaded(logits, first, width, BLOCK)
        counts = inside & (_levels(x, SHIFT) >= level)
        if WEIGHTED:
            total += tl.where(counts, _weight(x, top, temperature, scale, softcap, CAPPED), 0.0)
        else:
            total += tl.where(counts, 1.0, 0.0)
    return tl.sum(total, axis=0)


@triton.jit
def _search(
    target,
    logits,
    width: tl.constexpr,
    top,
    temperature,
    scale,
    softcap,
    WEIGHTED: tl.constexpr,
    CAPPED: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The highest level from which on `_sum_from` reaches the target."""
    level = tl.full([], 0, tl.uint32)
    bit = tl.full([], 1 << (31 - SHIFT), tl.uint32)
    for _ in range(32 - SHIFT):
        total = _sum_from(
            level | bit,
            logits,
            width,
            top,
            temperature,
            scale,
            softcap,
            WEIGHTED,
            CAPPED,
            SHIFT,
            BLOCK,
        )
        level = tl.where(total >= target, level | bit, level)
        bit = bit >> 1
    return level


@triton.jit
def _value_at(level, logits, width: tl.constexpr, SHIFT: tl.constexpr, BLOCK: tl.constexpr):
    """The logit of a level, or -inf if no token is there; and how many are."""
    value = tl.full([BLOCK], float("-inf"), tl.float32)
    count = tl.zeros([BLOCK], dtype=tl.int32)
    for first in range(0, width, BLOCK):
        x, inside = _loaded(logits, first, width, BLOCK)
        here = inside & (_levels(x, SHIFT) == level)
        value = tl.where(here, x, value)
        count += here.to(tl.int32)
    return tl.max(value, axis=0), tl.sum(count, axis=0)


@triton.jit
def _bounds(
    logits,
    bound_logits,
    bound_tokens,
    chosen,
    temperatures,
    top_ks,
    top_ps,
    row_stride,
    param_stride,
    width: tl.constexpr,
    scale,
    softcap,
    OF_ALL: tl.constexpr,
    CAPPED: tl.constexpr,
    SHIFT: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    row = tl.load(chosen + program)
    logits += (row if OF_ALL else program) * row_stride
    temperature = tl.load(temperatures + row * param_stride)
    top_k = tl.load(top_ks + row * param_stride)
    top_p = tl.load(top_ps + row * param_stride)

    highest = tl.full([BLOCK], float("-inf"), tl.float32)
    for first in range(0, width, BLOCK):
        x, _ = _loaded(logits, first, width, BLOCK)
        highest = tl.maximum(highest, x)
    top = _score(tl.max(highest, axis=0), scale, softcap, CAPPED)

    # The level that top-k reaches, and how many of the tokens there it has room for.
    level = tl.full([], 0, tl.uint32)
    room = tl.full([], LAST, tl.int32)
    if top_k < width:
        level = _search(
            top_k, logits, width, top, temperature, scale, softcap, False, CAPPED, SHIFT, BLOCK
        )
        above = _sum_from(
            level + 1, logits, width, top, temperature, scale, softcap, False, CAPPED, SHIFT, BLOCK
        )
        room = top_k - above.to(tl.int32)
    value, count = _value_at(level, logits, width, SHIFT, BLOCK)
    room = tl.minimum(room, count)

    if top_p < 1.0:
        mass = _sum_from(
            level + 1, logits, width, top, temperature, scale, softcap, True, CAPPED, SHIFT, BLOCK
        )
        weight = _weight(value, top, temperature, scale, softcap, CAPPED)
        target = top_p * (mass + room.to(tl.float32) * weight)
        reached = _search(
            target, logits, width, top, temperature, scale, softcap, True, CAPPED, SHIFT, BLOCK
        )
        if reached > level:
            level = reached
            value, room = _value_at(level, logits, width, SHIFT, BLOCK)
            weight = _weight(value, top, temperature, scale, softcap, CAPPED)
            mass = _sum_from(
                level + 1,
                logits,
                width,
                top,
                temperature,
                scale,
                softcap,
                True,
                CAPPED,
                SHIFT,
                BLOCK,
            )
        # A token stays while those before it do not yet make up top_p.
        wanted = tl.ceil((target - mass) / tl.maximum(weight, 1e-30))
        wanted = tl.minimum(tl.maximum(wanted, 1.0), 1073741824.0).to(tl.int32)
        room = tl.minimum(room, wanted)

    token = tl.full([], LAST, tl.int32)
    seen = tl.full([], 0, tl.int32)
    for first in range(0, width, BLOCK):
        x, inside = _loaded(logits, first, width, BLOCK)
        here = inside & (_levels(x, SHIFT) == level)
        order = seen + tl.cumsum(here.to(tl.int32), axis=0)
        found = tl.where(here & (order == room), first + tl.arange(0, BLOCK), LAST)
        token = tl.minimum(token, tl.min(found, axis=0))
        seen += tl.sum(here.to(tl.int32), axis=0)
    tl.store(bound_logits + row, value)
    tl.store(bound_tokens + row, token.to(tl.int64))


def bounds_(
    found: Bounds, logits: Tensor, chosen: Tensor, rows: SamplingRows, vocabulary: Vocabulary
) -> None:
    """Fill in the bounds of rows with top-k or top-p, where top-p looks at what top-k has left.

    Args:
        found: of all rows.
        logits: of all rows or of the chosen ones, [rows, vocab], as the model gave them.
        chosen: the rows to fill in, int64.
        rows: how to sample every row.
        vocabulary: what is done to logits.
    """
    assert logits.stride(1) == 1
    assert rows.temperature.stride(0) == rows.top_k.stride(0) == rows.top_p.stride(0)
    _bounds[(len(chosen),)](
        logits,
        found.logits,
        found.tokens,
        chosen,
        rows.temperature,
        rows.top_k,
        rows.top_p,
        logits.stride(0),
        rows.top_k.stride(0),
        logits.shape[1],
        vocabulary.scale,
        vocabulary.softcap or 1.0,
        OF_ALL=len(logits) == len(found.logits),
        CAPPED=vocabulary.softcap is not None,
        SHIFT=32 - _BITS[logits.dtype],
        LAST=LAST_TOKEN,
        BLOCK=_BOUNDS_BLOCK,
        num_warps=32,
    )
