"""Cuts: what each rank gets of an axis, of a weight, and of a pipeline."""

from dataclasses import replace
from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.configs import ONE_PER_ARCHITECTURE, read_spec
from tightfit.errors import LayoutError
from tightfit.model.blocks.attention import Attention, Rope, head_axes
from tightfit.model.layout import Axis, Parallel, Rank, on_rank, pipeline_layers
from tightfit.model.parameters import VOCAB_PADDING, check_parallel, parameters
from tightfit.model.sources import source_shapes
from tightfit.model.spec import ModelSpec

BASES = (*ONE_PER_ARCHITECTURE, "Qwen3-8B-FP8", "Qwen3-30B-A3B-FP8", "SmolLM2-135M", "Llama-3.2-1B")


def ranks(size: int, *, pp: int = 1, uneven: bool = False) -> tuple[Rank, ...]:
    return Parallel(tensor_parallel_size=size, pipeline_parallel_size=pp, uneven=uneven).ranks()


def spans(axis: Axis, size: int, *, uneven: bool) -> list[tuple[int, int]] | None:
    try:
        return [axis.span(rank) for rank in ranks(size, uneven=uneven)]
    except LayoutError:
        return None


small = st.integers(1, 40)


@given(units=small, unit_rows=st.integers(1, 8), size=small, uneven=st.booleans())
def test_spans_partition_an_axis(units: int, unit_rows: int, size: int, uneven: bool) -> None:
    axis = Axis(label="things", units=units, unit_rows=unit_rows)
    found = spans(axis, size, uneven=uneven)
    if found is None:
        assert units < size or (units % size and not uneven)
        return
    assert [first for first, _ in found] == [sum(n for _, n in found[:i]) for i in range(size)]
    assert sum(rows for _, rows in found) == axis.rows
    shares = {rows for _, rows in found}
    assert all(rows % unit_rows == 0 for rows in shares)
    assert max(shares) - min(shares) <= (unit_rows if uneven else 0)
    assert min(shares) > 0


@given(
    kv_heads=st.integers(1, 12),
    per_group=st.integers(1, 8),
    head_dim=st.integers(1, 4),
    size=st.integers(1, 24),
    uneven=st.booleans(),
)
def test_query_heads_find_their_kv_heads_on_their_rank(
    kv_heads: int, per_group: int, head_dim: int, size: int, uneven: bool
) -> None:
    rope = Rope(theta=1e4, rotary_dim=head_dim, max_position_embeddings=8)
    attention = Attention(
        num_heads=kv_heads * per_group,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rope=rope,
        scale=1.0,
    )
    queries, keys = head_axes(attention)
    q_spans, k_spans = (spans(axis, size, uneven=uneven) for axis in (queries, keys))
    if q_spans is None or k_spans is None:
        # What divides is never refused.
        heads = kv_heads * per_group
        assert heads % size or (kv_heads % size and size % kv_heads)
        return
    held: list[int] = []
    for (first, rows), (k_first, k_rows) in zip(q_spans, k_spans, strict=True):
        q_heads = range(first // head_dim, (first + rows) // head_dim)
        k_heads = range(k_first // head_dim, (k_first + k_rows) // head_dim)
        assert len(q_heads) > 0
        assert {head // per_group for head in q_heads} == set(k_heads)
        held += q_heads
    assert held == list(range(kv_heads * per_group))


@given(groups=st.integers(1, 8), copies=st.integers(1, 6), unit_rows=st.integers(1, 4))
def test_replicated_groups_count_once(groups: int, copies: int, unit_rows: int) -> None:
    axis = Axis(label="kv", units=groups, unit_rows=unit_rows, groups=groups, replicated=True)
    members = ranks(groups * copies)
    first_holders = [axis.span(rank) for rank in members if not axis.is_copy(rank)]
    assert first_holders == [(g * unit_rows, unit_rows) for g in range(groups)]
    assert all(
        axis.span(members[i]) == axis.span(members[i - i % copies]) for i in range(len(members))
    )


def possible(spec: ModelSpec, parallel: Parallel) -> bool:
    try:
        check_parallel(spec, parallel)
    except LayoutError:
        return False
    return True


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize(("size", "pp", "uneven"), [
    (1, 1, False), (2, 1, False), (4, 1, False), (8, 1, False), (1, 2, False), (2, 3, False),
    (3, 1, True), (5, 1, True),
])  # fmt: skip
def test_ranks_hold_the_checkpoint_together(name: str, size: int, pp: int, uneven: bool) -> None:
    spec = read_spec(name)
    parallel = Parallel(tensor_parallel_size=size, pipeline_parallel_size=pp, uneven=uneven)
    if not possible(spec, parallel):
        return
    expected = sum(map(prod, source_shapes(spec).values()))
    census = [
        (weight, weight.census(rank))
        for rank in parallel.ranks()
        for weight in parameters(spec)
        if on_rank(weight, rank, spec.num_layers)
    ]
    assert sum(c.elements - c.padding - c.copies for _, c in census) == expected
    tables = {f"{spec.names.embedding}.weight", f"{spec.names.head}.weight"}
    # Of keys that have none (Whisper), of a head with a bias, and where ranks add up (gpt-oss).
    zeros = ("qkv_proj.bias", "kv_proj.bias", f"{spec.names.head}.bias", "experts.w2_bias")
    if name.startswith("Kimi-Linear"):
        zeros += ("experts.w13_weight", "experts.w2_weight")  # narrow shares of experts
    others = [c for w, c in census if w.name not in tables and not w.name.endswith(zeros)]
    assert all(c.padding == 0 for c in others)
    padded = sum(c.padding for w, c in census if w.name in tables)
    held_tables = sum(w.name in tables for w, _ in census) // size
    held_tables = 0 if spec.whole_embedding or spec.added_embeddings else held_tables
    rows = held_tables * (-spec.vocab_size % VOCAB_PADDING)
    if spec.added_embeddings:
        rows = -(spec.vocab_size + spec.added_embeddings) % VOCAB_PADDING
    assert padded == rows * (spec.embedding_size or spec.hidden_size)


@pytest.mark.parametrize("name", ["Llama-3.1-8B", "SmolLM2-135M", "Qwen3-30B-A3B-FP8"])
def test_pieces_and_census_count_the_same(name: str) -> None:
    spec = small_copy(read_spec(name))
    for rank in ranks(3, uneven=True) if name == "SmolLM2-135M" else ranks(2):
        for weight in parameters(spec):
            tensor, census = weight.rank_tensor(rank, spec.dtype), weight.census(rank)
            assert prod(tensor.shape) == census.elements
            assert sum(prod(p.shape) for p in tensor.pieces) == census.elements - census.padding
            for piece in tensor.pieces:
                ends = [s + n for s, n in zip(piece.start, piece.shape, strict=True)]
                assert all(e <= n for e, n in zip(ends, piece.source_shape, strict=True))


def small_copy(spec: ModelSpec) -> ModelSpec:
    return replace(spec, layers=spec.layers[:2])


@pytest.mark.parametrize(
    ("layers", "stages", "sizes"),
    [
        (8, 1, [8]),
        (8, 2, [4, 4]),
        (7, 2, [4, 3]),
        (5, 3, [2, 2, 1]),
        (5, 4, [1, 1, 2, 1]),
        (62, 4, [15, 16, 16, 15]),
        (11, 4, [3, 3, 3, 2]),
        (4, 4, [1, 1, 1, 1]),
    ],
)
def test_pipeline_stages_as_vllm(layers: int, stages: int, sizes: list[int]) -> None:
    """A remainder goes to the stages before the last, which has the norm and the head."""
    found = [pipeline_layers(layers, stages, rank) for rank in range(stages)]
    assert [len(stage) for stage in found] == sizes
    assert [i for stage in found for i in stage] == list(range(layers))


def test_too_many_stages() -> None:
    with pytest.raises(LayoutError) as e:
        pipeline_layers(3, 4, 0)
    assert e.value.message == "pipeline parallel size 4 is more than num_hidden_layers = 3"
    assert e.value.hint == "use at most 3"


def test_refusal_names_the_sizes_that_work() -> None:
    with pytest.raises(LayoutError) as e:
        check_parallel(read_spec("SmolLM2-135M"), Parallel(tensor_parallel_size=2))
    assert e.value.message == "tensor parallel size 2 does not divide num_attention_heads = 9"
    assert e.value.hint == "tensor parallel sizes that work: 1, 3"
    check_parallel(read_spec("SmolLM2-135M"), Parallel(tensor_parallel_size=2, uneven=True))


@pytest.mark.parametrize("sizes", [(2**40, 1), (1, 2**40), (2**40, 2**40)])
def test_absurd_sizes_are_refused_at_once(sizes: tuple[int, int]) -> None:
    parallel = Parallel(tensor_parallel_size=sizes[0], pipeline_parallel_size=sizes[1], uneven=True)
    with pytest.raises(LayoutError):
        check_parallel(read_spec("Llama-3.1-8B"), parallel)


def test_ranks_are_numbered_as_vllm_does() -> None:
    found = [(rank.rank, rank.pp_rank, rank.tp_rank) for rank in ranks(2, pp=2)]
    assert found == [(0, 0, 0), (1, 0, 1), (2, 1, 0), (3, 1, 1)]


def test_fp8_scales_are_cut_with_their_weights() -> None:
    spec = read_spec("Qwen3-8B-FP8")
    held = {w.name: w for w in parameters(spec)}
    prefix = "model.layers.0"
    rank = ranks(4)[3]
    shapes = {
        name: held[f"{prefix}.{name}"].rank_shape(rank)
        for name in (
            "self_attn.qkv_proj.weight",
            "self_attn.qkv_proj.weight_scale_inv",
            "mlp.down_proj.weight",
            "mlp.down_proj.weight_scale_inv",
        )
    }
    assert shapes == {
        "self_attn.qkv_proj.weight": (1024 + 256 + 256, 4096),
        "self_attn.qkv_proj.weight_scale_inv": (8 + 2 + 2, 32),
        "mlp.down_proj.weight": (4096, 3072),
        "mlp.down_proj.weight_scale_inv": (32, 24),
    }


def test_fp8_blocks_are_not_split() -> None:
    """768 rows are 6 blocks: 4 ranks could share the rows but not the scales; vLLM refuses too."""
    with pytest.raises(LayoutError) as e:
        check_parallel(read_spec("Qwen3-30B-A3B-FP8"), Parallel(tensor_parallel_size=4))
    assert "tensor parallel size 4 does not divide" in e.value.message
    assert "the 768 outputs of experts.w13 into whole blocks of 128" in e.value.message
    assert e.value.hint == "tensor parallel sizes that work: 1, 2"
