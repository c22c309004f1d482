"""Attention over the paged KV cache in Triton: one kernel for prompts and for single tokens.

A program has a tile of rows, each a query head of a token. The heads that share a KV head are
neighbours, so that they load its keys and values once, and a tile may hold several tokens or only
some heads of one. It walks over the keys with an online softmax (FlashAttention, arXiv:2205.14135)
and finds them through the block table. A single token has too few rows to fill a GPU: several
programs share its sequence, and a second kernel combines what they found (Flash-Decoding).

The features of a head are two powers of two, the second perhaps 0 or with a masked rest: 128 + 64.
With a latent cache (MLA) the values are the keys' first part, and are not loaded again.

Nothing here waits for the device, and what is launched depends on shapes alone.
"""

import triton
import triton.language as tl

from tightfit.runtime.kernels.kv_store import store_row


@triton.jit
def _first_key(position, WINDOW: tl.constexpr, KEYS: tl.constexpr):
    """Of the first tile that a query sees."""
    if WINDOW > 0:
        return tl.maximum(position - WINDOW + 1, 0) // KEYS * KEYS
    return position * 0


@triton.jit
def _find_sequence(query_starts, num_sequences, tile, GROUP: tl.constexpr, ROWS: tl.constexpr):
    """The sequence of a tile: sequence i has those from `query_starts[i] * GROUP // ROWS + i` on.

    That is at least as many as it needs, so its last may be empty.
    """
    low: tl.int32 = 0
    high = num_sequences
    while low < high:
        middle = (low + high) // 2
        if tl.load(query_starts + middle) * GROUP // ROWS + middle <= tile:
            low = middle + 1
        else:
            high = middle
    return low - 1


@triton.jit
def _walk(
    acc,
    peak,
    total,
    q,
    q_rest,
    position,
    keys,
    values,
    table,
    start,
    stop,
    scale,
    softcap,
    key_slot,
    value_slot,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    LOW: tl.constexpr,
    REST: tl.constexpr,
    VALUE: tl.constexpr,
    LATENT: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    CAPPED: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Go over the keys `start : stop`, and bring the rows' outputs, maxima and sums up to date."""
    low = tl.arange(0, LOW)
    value = tl.arange(0, VALUE)
    # A turn ahead, or the pipeline would spend half of its stages on the way to the keys.
    key = start + tl.arange(0, KEYS)
    block = tl.load(table + key // BLOCK_SIZE, mask=key < stop, other=0)
    for first in tl.range(start, stop, KEYS, num_stages=STAGES):
        key = first + tl.arange(0, KEYS)
        inside = key < stop
        slot = block.to(tl.int64) * BLOCK_SIZE + key % BLOCK_SIZE
        block = tl.load(table + (key + KEYS) // BLOCK_SIZE, mask=key + KEYS < stop, other=0)
        place = keys + slot[:, None] * key_slot
        if MASKED:
            k = tl.load(place + low[None, :], mask=inside[:, None], other=0.0)
        else:
            k = tl.load(place + low[None, :])
        k = k.to(q.dtype)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if REST > 0:
            rest = LOW + tl.arange(0, REST)
            there = (rest < HEAD_DIM)[None, :]
            if MASKED:
                there = there & inside[:, None]
            k_rest = tl.load(place + rest[None, :], mask=there, other=0.0).to(q.dtype)
            scores += tl.dot(q_rest, tl.trans(k_rest), input_precision=PRECISION)
        scores = scores * scale
        if CAPPED:
            # softcap * tanh(x), where the scale makes these 2x * log2(e).
            scores = softcap - 2 * softcap / (tl.exp2(scores) + 1)
        if MASKED:
            seen = key[None, :] <= position[:, None]
            if WINDOW > 0:
                seen = seen & (key[None, :] > position[:, None] - WINDOW)
            scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, 1))
        # A row that has seen no key yet stays without weight.
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(scores - shift[:, None])
        decay = tl.exp2(peak - shift)
        peak = higher
        total = total * decay + tl.sum(weights, 1)
        acc = acc * decay[:, None]
        if LATENT:
            v = k
        else:
            there = (value < VALUE_DIM)[None, :]
            if MASKED:
                there = there & inside[:, None]
            v = tl.load(values + slot[:, None] * value_slot + value[None, :], mask=there, other=0.0)
            v = v.to(q.dtype)
        acc = tl.dot(weights.to(q.dtype), v, acc=acc, input_precision=PRECISION)
    return acc, peak, total


_CHANGING = ("query_starts", "lengths", "table", "slots", "num_sequences", "table_row", "splits")
"""Arguments whose divisibility changes from step to step, for which nothing is compiled anew."""


@triton.jit(do_not_specialize=_CHANGING)
def attend(
    out,
    partial,
    partial_log,
    q,
    keys,
    values,
    query_starts,
    lengths,
    table,
    sinks,
    new_k,
    new_v,
    slots,
    scale,
    softcap,
    v_scale,
    k_inverse,
    v_inverse,
    num_sequences,
    q_token,
    q_head,
    k_token,
    k_head,
    v_token,
    v_head,
    table_row,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    LOW: tl.constexpr,
    REST: tl.constexpr,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    LATENT: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    CAPPED: tl.constexpr,
    SINKS: tl.constexpr,
    DECODE: tl.constexpr,
    SPLIT: tl.constexpr,
    STORE: tl.constexpr,
    FP8_MAX: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Programs: tiles of rows by KV heads, and splits of a sequence.

    The KV heads are next to each other in memory, so those of a tile run at the same time.
    """
    kv_head = tl.program_id(0) % KV_HEADS
    tile = tl.program_id(0) // KV_HEADS
    split = tl.program_id(1)
    if DECODE:
        TILES: tl.constexpr = (GROUP + ROWS - 1) // ROWS
        sequence = tile // TILES
        row = tile % TILES * ROWS
        start = sequence
        count = 1
    else:
        # The last tiles of a prompt see the most keys: start with them.
        tile = tl.num_programs(0) // KV_HEADS - 1 - tile
        sequence = _find_sequence(query_starts, num_sequences, tile, GROUP, ROWS)
        start = tl.load(query_starts + sequence)
        count = tl.load(query_starts + sequence + 1) - start
        row = (tile - (start * GROUP // ROWS + sequence)) * ROWS
        if row >= count * GROUP:
            return
    length = tl.load(lengths + sequence)
    first_position = length - count + row // GROUP
    last_position = length - count + tl.minimum((row + ROWS - 1) // GROUP, count - 1)
    first = _first_key(first_position, WINDOW, KEYS)
    stop = last_position + 1
    if SPLIT:
        tiles = tl.cdiv(stop - first, KEYS)
        share = tl.cdiv(tiles, tl.num_programs(1)) * KEYS
        first += split * share
        stop = tl.minimum(stop, first + share)
        if first >= stop:
            return

    keys += kv_head * HEAD_DIM
    if not LATENT:
        values += kv_head * VALUE_DIM
    if STORE:  # noqa: SIM102 - Triton would compile both
        if stop == length:
            # Only this program sees the new token: it is kept before anything is read.
            slot = tl.load(slots + sequence)
            if slot >= 0:
                source = new_k + sequence.to(tl.int64) * k_token + kv_head * k_head
                place = keys + slot * (KV_HEADS * HEAD_DIM)
                store_row(source, place, k_inverse, HEAD_DIM, KEY, FP8_MAX)
                if not LATENT:
                    source = new_v + sequence.to(tl.int64) * v_token + kv_head * v_head
                    place = values + slot * (KV_HEADS * VALUE_DIM)
                    store_row(source, place, v_inverse, VALUE_DIM, VALUE, FP8_MAX)
            tl.debug_barrier()

    rows = row + tl.arange(0, ROWS)
    token = start.to(tl.int64) + rows // GROUP
    head = kv_head * GROUP + rows % GROUP
    there = rows < count * GROUP
    position = length - count + rows // GROUP
    low = tl.arange(0, LOW)
    place = q + token[:, None] * q_token + head[:, None] * q_head
    q_low = tl.load(place + low[None, :], mask=there[:, None], other=0.0)
    q_rest = q_low
    if REST > 0:
        rest = LOW + tl.arange(0, REST)
        inside = there[:, None] & (rest < HEAD_DIM)[None, :]
        q_rest = tl.load(place + rest[None, :], mask=inside, other=0.0)

    acc = tl.zeros([ROWS, VALUE], tl.float32)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    if SINKS:
        # A key of its own that has no value; only the first split counts it.
        sink = tl.load(sinks + head, mask=there, other=0.0).to(tl.float32) * 1.4426950408889634
        peak = tl.where(split == 0, sink, peak)
        total = tl.where(split == 0, 1.0, total)
    table += sequence.to(tl.int64) * table_row
    if not DECODE and WINDOW == 0:
        # Tiles of keys that all rows see need no mask.
        seen = (first_position + 1) // KEYS * KEYS
        acc, peak, total = _walk(
            acc, peak, total, q_low, q_rest, position, keys, values, table, first, seen,
            scale, softcap, KV_HEADS * HEAD_DIM, KV_HEADS * VALUE_DIM,
            HEAD_DIM, VALUE_DIM, LOW, REST, VALUE, LATENT, BLOCK_SIZE, WINDOW, CAPPED,
            False, PRECISION, KEYS, STAGES,
        )  # fmt: skip
        first = seen
    acc, peak, total = _walk(
        acc, peak, total, q_low, q_rest, position, keys, values, table, first, stop,
        scale, softcap, KV_HEADS * HEAD_DIM, KV_HEADS * VALUE_DIM,
        HEAD_DIM, VALUE_DIM, LOW, REST, VALUE, LATENT, BLOCK_SIZE, WINDOW, CAPPED,
        True, PRECISION, KEYS, STAGES,
    )  # fmt: skip
    acc = acc * tl.where(total > 0, v_scale / total, 0.0)[:, None]
    value = tl.arange(0, VALUE)
    inside = there[:, None] & (value < VALUE_DIM)[None, :]
    place = token * (KV_HEADS * GROUP) + head
    if SPLIT:
        place += split * num_sequences.to(tl.int64) * (KV_HEADS * GROUP)
        tl.store(partial + place[:, None] * VALUE_DIM + value[None, :], acc, mask=inside)
        tl.store(partial_log + place, peak + tl.log2(total), mask=there)
    else:
        acc = acc.to(out.dtype.element_ty)
        tl.store(out + place[:, None] * VALUE_DIM + value[None, :], acc, mask=inside)


@triton.jit(do_not_specialize=_CHANGING)
def combine(
    out,
    partial,
    partial_log,
    lengths,
    splits,
    num_sequences,
    HEADS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE: tl.constexpr,
    WINDOW: tl.constexpr,
    KEYS: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Weigh the outputs of a head's splits; those of a short sequence are fewer."""
    sequence = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    length = tl.load(lengths + sequence)
    tiles = tl.cdiv(length - _first_key(length - 1, WINDOW, KEYS), KEYS)
    used = tl.cdiv(tiles, tl.maximum(tl.cdiv(tiles, splits), 1))
    place = sequence * HEADS + head
    split = tl.arange(0, MAX_SPLITS)
    step = num_sequences.to(tl.int64) * HEADS
    logs = tl.load(partial_log + place + split * step, mask=split < used, other=float("-inf"))
    peak = tl.max(logs, 0)
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    total = tl.sum(tl.exp2(logs - peak), 0)
    value = tl.arange(0, VALUE)
    acc = tl.zeros([VALUE], tl.float32)
    for first in range(0, used, CHUNK):
        some = first + tl.arange(0, CHUNK)
        there = some < used
        log = tl.load(partial_log + place + some * step, mask=there, other=float("-inf"))
        inside = there[:, None] & (value < VALUE_DIM)[None, :]
        offset = (place + some * step)[:, None] * VALUE_DIM + value[None, :]
        part = tl.load(partial + offset, mask=inside, other=0.0)
        acc += tl.sum(tl.exp2(log - peak)[:, None] * part, 0)
    acc = tl.where(total > 0, acc / total, 0.0)
    tl.store(out + place * VALUE_DIM + value, acc.to(out.dtype.element_ty), mask=value < VALUE_DIM)
