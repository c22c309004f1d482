"""Tests of the attention kernels against explicit attention, to be run with TRITON_INTERPRET=1."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter

from tightfit.planner.engines.builtin_paged import num_splits, workspace_elements
from tightfit.runtime.attention.base import AttentionLayer
from tightfit.runtime.attention.paged import PagedAttention
from tightfit.runtime.attention.probe import expected
from tightfit.runtime.attention.sdpa import SdpaAttention
from tightfit.runtime.batch import Batch, Paging, Span, make_batch
from tightfit.runtime.kernels import paged
from tightfit.runtime.kernels.kv_store import store
from tightfit.runtime.kernels.tiles import Tile

BLOCK_SIZE = 16
FP8 = torch.float8_e4m3fn

_patch_tensor = interpreter._patch_lang_tensor


def _patch(tensor, scope):
    """NumPy 2.4 takes no array of one element for an index, as Triton 3.6 has it."""
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


interpreter._patch_lang_tensor = _patch


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    value_dim: int = 64
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    latent: bool = False


CASES = {
    "grouped": Case(),
    "one head": Case(heads=2, kv_heads=2),
    "a group of 3": Case(heads=6, kv_heads=2),
    "80 features": Case(head_dim=80, value_dim=80),
    "112 features": Case(head_dim=112, value_dim=112),
    "narrow values": Case(head_dim=96, value_dim=64),
    "window": Case(window=21),
    "softcap": Case(softcap=1.5),
    "sinks": Case(sinks=True, window=40),
    "latent": Case(heads=20, kv_heads=1, head_dim=80, value_dim=64, latent=True),
}


def layer_of(case: Case) -> AttentionLayer:
    torch.manual_seed(1)
    return AttentionLayer(
        heads=case.heads,
        kv_heads=case.kv_heads,
        head_dim=case.head_dim,
        value_dim=case.value_dim,
        scale=0.2,
        window=case.window,
        softcap=case.softcap,
        sinks=torch.randn(case.heads) if case.sinks else None,
    )


class Paged:
    """Sequences of given lengths in a shuffled cache, whose other places hold NaN."""

    def __init__(self, case: Case, lengths: list[int]) -> None:
        torch.manual_seed(0)
        blocks = [-(-length // BLOCK_SIZE) for length in lengths]
        order = torch.randperm(sum(blocks) + 1)
        self.table = torch.zeros(len(lengths), max(blocks) + 1, dtype=torch.int32)
        self.lengths = torch.tensor(lengths, dtype=torch.int32)
        shape = (len(order), BLOCK_SIZE, case.kv_heads)
        self.key_cache = torch.full((*shape, case.head_dim), float("nan"))
        self.value_cache = torch.full((*shape, case.value_dim), float("nan"))
        self.keys, self.values = [], []
        used = 0
        for i, length in enumerate(lengths):
            own = order[used : used + blocks[i]]
            used += blocks[i]
            self.table[i, : len(own)] = own
            k = torch.randn(length, case.kv_heads, case.head_dim)
            v = (
                k[..., : case.value_dim]
                if case.latent
                else torch.randn(*k.shape[:2], case.value_dim)
            )
            places = torch.arange(length)
            slots = own[places // BLOCK_SIZE] * BLOCK_SIZE + places % BLOCK_SIZE
            store(k, v, slots, self.key_cache, self.value_cache)
            self.keys.append(k)
            self.values.append(v)
        self.layer = layer_of(case)


@pytest.mark.parametrize(
    ("name", "splits"), [("grouped", 1), ("latent", 1), *((name, 3) for name in CASES)]
)
def test_decode(name: str, splits: int) -> None:
    case = CASES[name]
    paging = Paged(case, [37, 0, 1, 70])
    qkv = torch.randn(4, case.heads + 3, case.head_dim)
    q = qkv[:, : case.heads]
    out = torch.full((4, case.heads, case.value_dim), float("nan"))
    paged.decode(
        out,
        q,
        paging.key_cache,
        None if case.latent else paging.value_cache,
        paging.lengths,
        paging.table,
        torch.empty(splits * 4 * case.heads * (case.value_dim + 1)),
        scale=0.2,
        max_length=70,
        window=case.window,
        softcap=case.softcap,
        sinks=paging.layer.sinks,
        splits=splits,
    )
    assert not out[1].any()
    for i in (0, 2, 3):
        want = expected(paging.layer, q[i : i + 1], paging.keys[i], paging.values[i])
        torch.testing.assert_close(out[i : i + 1], want)


@pytest.mark.parametrize("name", CASES)
def test_prefill(name: str) -> None:
    case = CASES[name]
    counts, lengths = [5, 40, 1], [5, 61, 33]
    paging = Paged(case, lengths)
    starts = [0, 5, 45, 46]
    q = torch.randn(46, case.heads, case.head_dim)
    out = torch.full((46, case.heads, case.value_dim), float("nan"))
    paged.prefill(
        out,
        q,
        paging.key_cache,
        None if case.latent else paging.value_cache,
        torch.tensor(starts, dtype=torch.int32),
        paging.lengths,
        paging.table,
        scale=0.2,
        window=case.window,
        softcap=case.softcap,
        sinks=paging.layer.sinks,
        tile=Tile(rows=32, keys=16, num_warps=4, num_stages=2),
    )
    for i, count in enumerate(counts):
        rows = slice(starts[i], starts[i] + count)
        want = expected(paging.layer, q[rows], paging.keys[i], paging.values[i])
        torch.testing.assert_close(out[rows], want)


def test_a_split_sequence_needs_no_more_than_the_workspace() -> None:
    case = Case()
    paging = Paged(case, [300, 5])
    q = torch.randn(2, case.heads, case.head_dim)
    out = torch.empty_like(q)
    elements = workspace_elements(2, 4, 2, 64, 64, 512)
    assert num_splits(2, 4, 2, 64, 512) == 8
    paged.decode(
        out,
        q,
        paging.key_cache,
        paging.value_cache,
        paging.lengths,
        paging.table,
        torch.full((elements,), float("nan")),
        scale=0.2,
        max_length=512,
    )
    for i in range(2):
        want = expected(paging.layer, q[i : i + 1], paging.keys[i], paging.values[i])
        torch.testing.assert_close(out[i : i + 1], want)


def test_an_fp8_cache_is_scaled_and_saturates() -> None:
    k = torch.tensor([[[1.0, -3.0, 1e4, -1e4]], [[2.0, 0.5, 0.0, 7.0]]])
    keys, values = (torch.zeros(2, 16, 1, 4, dtype=torch.float8_e4m3fn) for _ in range(2))
    store(k, 2 * k, torch.tensor([17, -1]), keys, values, k_scale=2.0, v_scale=4.0)
    stored = torch.tensor([0.5, -1.5, 448, -448])
    assert torch.equal(keys[1, 1, 0].float(), stored)
    assert torch.equal(values[1, 1, 0].float(), stored)
    assert not keys.float().flatten(0, 1)[[*range(17), *range(18, 32)]].any()


@pytest.mark.parametrize("name", ["grouped", "latent", "sinks"])
def test_attention_to_an_fp8_cache(name: str) -> None:
    """Of one token that it stores itself, and of the last tokens of a prompt."""
    case = CASES[name]
    scales = {"k_scale": 0.25, "v_scale": 0.25 if case.latent else 0.5}
    layer = replace(layer_of(case), **scales)
    torch.manual_seed(0)
    length, shape = 37, (4, BLOCK_SIZE, case.kv_heads)
    # The interpreter rounds wrongly, where a number goes up to a power of two: these need none.
    k = torch.randn(length, case.kv_heads, case.head_dim).to(FP8).float()
    v = None if case.latent else torch.randn(length, case.kv_heads, case.value_dim).to(FP8).float()
    keys, values = (torch.zeros(*shape, d).to(FP8) for d in (case.head_dim, case.value_dim))
    table = torch.tensor([[2, 0, 3]], dtype=torch.int32)
    places = torch.arange(length)
    slots = table[0].long()[places // BLOCK_SIZE] * BLOCK_SIZE + places % BLOCK_SIZE
    pair = keys, None if case.latent else values
    past = v if v is None else v[:-1]
    store(k[:-1], past, slots[:-1], *pair, **scales)
    lengths = torch.tensor([length], dtype=torch.int32)
    q = torch.randn(5, case.heads, case.head_dim)
    out = torch.empty(5, case.heads, case.value_dim)
    how = {"scale": 0.2, "window": case.window, "sinks": layer.sinks, **scales}
    new = k[-1:], v if v is None else v[-1:], slots[-1:]
    decoded = torch.empty(1, case.heads, case.value_dim)
    paged.decode(
        decoded, q[-1:], *pair, lengths, table, torch.empty(0), max_length=40, new=new, splits=1,
        **how,
    )  # fmt: skip
    paged.prefill(out, q, *pair, torch.tensor([0, 5], dtype=torch.int32), lengths, table, **how)
    v = k[..., : case.value_dim] if v is None else v
    want = expected(layer_of(case), q, k, v)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(decoded, want[-1:])


@dataclass
class Cache:
    """What backends use of a `KVCache`."""

    layers: list[tuple[Tensor, Tensor]]
    block_size: int = BLOCK_SIZE


@dataclass
class Sequence:
    """Grows by the tokens of each step."""

    blocks: list[int]
    length: int = 0


def batch_of(sequences: list[tuple[Sequence, int]]) -> Batch:
    spans = [Span(start=s.length, count=n, blocks=s.blocks) for s, n in sequences]
    for sequence, count in sequences:
        sequence.length += count
    batch = make_batch(
        spans,
        [0] * sum(n for _, n in sequences),
        [],
        block_size=BLOCK_SIZE,
        device=torch.device("cpu"),
    )
    starts = torch.tensor([0, *(n for _, n in sequences)]).cumsum(0)
    width = max(len(s.blocks) for s, _ in sequences)
    table = [[*s.blocks, *[0] * (width - len(s.blocks))] for s, _ in sequences]
    paging = Paging(
        query_starts=starts.int(),
        lengths=torch.tensor([s.length for s, _ in sequences], dtype=torch.int32),
        block_table=torch.tensor(table, dtype=torch.int32),
        max_length=max(s.length for s, _ in sequences),
    )
    return replace(batch, paging=paging)


@pytest.mark.parametrize("name", ["grouped", "window", "latent"])
def test_steps_of_the_backend_are_those_of_sdpa(name: str) -> None:
    case = CASES[name]
    layer = layer_of(case)

    def cache() -> Any:
        shape = (9, BLOCK_SIZE, case.kv_heads)
        keys = torch.zeros(*shape, case.head_dim)
        values = keys[..., : case.value_dim] if case.latent else torch.zeros_like(keys)
        return Cache(layers=[(keys, values)])

    backends = (
        SdpaAttention((layer,), cache(), torch.float32),
        PagedAttention((layer,), cache(), torch.float32, max_num_seqs=4, max_model_len=64),
    )
    first, second, third = Sequence([3, 7, 1]), Sequence([2, 8]), Sequence([5, 4, 6])
    for step in (
        [(first, 20), (second, 5)],
        [(second, 1), (first, 9), (third, 33)],
        [(second, 1), (first, 1), (third, 1)],
    ):
        batch = batch_of(step)
        tokens = len(batch.slots)
        q = torch.randn(tokens, case.heads, case.head_dim)
        k, v = torch.randn(2, tokens, case.kv_heads, case.head_dim)
        found, wanted = (
            attend.latent(0, q, k.flatten(1)) if case.latent else attend(0, q, k, v)
            for attend in (backend.step(batch) for backend in reversed(backends))
        )
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
