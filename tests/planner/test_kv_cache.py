"""KV cache figures of vLLM, against numbers that were computed by hand or printed by it."""

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.configs import read_config, read_spec
from tightfit.errors import UnsupportedModelError, UsageError
from tightfit.model.families import model_spec
from tightfit.model.layout import Parallel, Rank, pipeline_layers
from tightfit.model.spec import ModelSpec
from tightfit.planner.devices import CATALOGUE
from tightfit.planner.engines.vllm import VLLM
from tightfit.planner.kv_cache import KVLayout, kv_layout
from tightfit.planner.kv_kinds import CacheDtypes, LayerKind, layer_kinds
from tightfit.planner.options import PlanOptions
from tightfit.units import cdiv


def layout_of(spec: ModelSpec, options: PlanOptions, pp_rank: int = 0) -> KVLayout:
    engine = VLLM(version=options.engine_version)
    rank = Rank(pp_rank=pp_rank, parallel=engine.parallel(options))
    return engine.kv_layout(spec, rank, engine.resolve(spec, options))


def gemma_like() -> ModelSpec:
    """62 layers of which every sixth is full: the text model of Gemma 3 27B."""
    changes = {
        "num_hidden_layers": 62,
        "num_attention_heads": 32,
        "num_key_value_heads": 16,
        "head_dim": 128,
        "sliding_window": 1024,
        "max_position_embeddings": 131_072,
    }
    config = read_config("gemma-3-1b-it")
    config.pop("layer_types", None)
    return model_spec(config | changes | {"sliding_window_pattern": 6})


@pytest.mark.parametrize(
    ("size", "block_bytes", "token_bytes"), [(1, 2_097_152, 131_072), (4, 524_288, 32_768)]
)
def test_llama(size: int, block_bytes: int, token_bytes: int) -> None:
    """2 (keys, values) x 8 heads x 128 x 2 bytes x 32 layers, in blocks of 16 tokens."""
    layout = layout_of(read_spec("Llama-3.1-8B"), PlanOptions(tensor_parallel_size=size))
    assert layout.block_size == 16
    assert layout.bytes_per_block == block_bytes
    assert layout.bytes_per_token == token_bytes
    assert layout.blocks(131_072) == 8192
    assert layout.blocks(1) == 1
    assert layout.minimum_bytes(1000) == 1000 * token_bytes
    assert layout.all_full_bytes(1000) == 63 * block_bytes


def test_kv_heads_are_replicated_beyond_their_number() -> None:
    layout = layout_of(read_spec("Llama-3.1-8B"), PlanOptions(tensor_parallel_size=16))
    assert layout.bytes_per_block == 2_097_152 // 8


def test_kv_cache_dtype_halves_the_blocks() -> None:
    options = PlanOptions(kv_cache_dtype="fp8")
    assert layout_of(read_spec("Llama-3.1-8B"), options).bytes_per_block == 1_048_576


def test_hybrid_groups() -> None:
    """10 full and 52 sliding layers: groups of 10, one full and six sliding."""
    layout = layout_of(gemma_like(), PlanOptions(max_num_batched_tokens=8192))
    page_bytes = 16 * 2 * 16 * 128 * 2
    assert layout.bytes_per_block == 10 * page_bytes
    windows = Counter(kind.window for kind in layout.groups)
    assert windows == {None: 1, 1024: 6}
    # In a sliding group: 1023 tokens of the window and two steps of 8192, and one block more.
    assert layout.blocks(131_072) == 8192 + 6 * 1089 == 14_726
    assert round(14_726 * layout.bytes_per_block / 2**30, 2) == 17.98
    # Shorter than what is in flight, a sliding group holds all of it.
    assert layout.blocks(160) == 10 + 6 * 11
    assert layout.minimum_bytes(131_072) == (10 * 131_072 + 52 * 1024) * page_bytes // 16


@pytest.mark.parametrize(
    ("changes", "steps"),
    [({}, 3), ({"use_v2_model_runner": False}, 2), ({"async_scheduling": False}, 2)],
)
def test_in_flight_steps_grow_with_the_pipeline(changes: dict[str, bool], steps: int) -> None:
    options = PlanOptions(max_num_batched_tokens=8192, pipeline_parallel_size=2, **changes)  # type: ignore[arg-type]
    assert layout_of(gemma_like(), options).in_flight_tokens == steps * 8192


@pytest.mark.parametrize(
    ("layers", "pattern", "groups", "pages"),
    [
        (62, 6, 7, (3, 4, 3)),
        (62, 6, 7, (3, 3, 3, 3)),
        (24, 2, 2, (3, 3, 3, 3, 2)),
        (48, 6, 6, (2, 2, 2, 2, 2)),
        (34, 6, 7, (1,) * 8),
    ],
)
def test_stages_share_the_groups_of_the_model(
    layers: int, pattern: int, groups: int, pages: tuple[int, ...]
) -> None:
    """Pages of a block as vLLM 0.32's own `_project_kv_cache_groups_to_worker` leaves them."""
    full, sliding = LayerKind(token_bytes=4), LayerKind(token_bytes=4, window=64)
    kinds = [sliding if (i + 1) % pattern else full for i in range(layers)]
    stages = [
        Counter(kinds[i] for i in pipeline_layers(layers, len(pages), stage))
        for stage in range(len(pages))
    ]
    found = [
        kv_layout(stages[stage], stages=stages, stage=stage, block_size=16)
        for stage in range(len(pages))
    ]
    assert {len(layout.groups) for layout in found} == {groups}
    assert tuple(layout.bytes_per_block // (16 * 4) for layout in found) == pages


@pytest.mark.parametrize(
    ("dtype", "size"),
    [("int8_per_token_head", 576 + 8), ("int4_per_token_head", 288 + 8), ("bfloat16", 1152)],
)
def test_scales_of_latents_are_a_pair(dtype: str, size: int) -> None:
    """`MLACommonBackend.customize_spec`: two scales, although there is one side."""
    layout = layout_of(read_spec("DeepSeek-V2-Lite"), PlanOptions(kv_cache_dtype=dtype))
    assert {kind.token_bytes for kind in layout.groups} == {size}


@pytest.mark.parametrize(("version", "multiple"), [("0.32.0", 128), ("0.25.1", 16)])
def test_blocks_of_latents_beside_states(version: str, multiple: int) -> None:
    """They grow in whole steps until a page holds a state (`_align_hybrid_block_size`)."""
    spec = read_spec("Kimi-Linear-48B-A3B-Instruct")
    engine = VLLM(version=version)
    options = PlanOptions()
    layout = engine.kv_layout(spec, Rank(), engine.resolve(spec, options))
    state = max(kind.state_bytes for kind in layout.groups)
    assert layout.block_size % multiple == 0
    assert (layout.block_size - multiple) * 1152 < state <= layout.block_size * 1152


@pytest.mark.parametrize(
    ("name", "block_bytes", "stages"),
    [
        ("DeepSeek-V4-Flash", 1_002_240, (286_848, 380_736, 334_656)),
        ("DeepSeek-V4-Pro", 1_435_968, (433_728, 524_160, 478_080)),
    ],
)
def test_packed_pages(name: str, block_bytes: int, stages: tuple[int, ...]) -> None:
    """As vLLM 0.32's own `_get_packed_kv_cache_groups` makes of the model's specs, and as
    `_project_kv_cache_groups_to_worker` leaves of it in three stages: rows of 4 and 128 tokens in
    one group, windows in two, and a group for the unfinished rows of each ratio."""
    layout = layout_of(read_spec(name), PlanOptions(max_num_batched_tokens=8192))
    assert (layout.block_size, layout.bytes_per_block) == (256, block_bytes)
    assert Counter(kind.block_size for kind in layout.groups) == {64: 2, None: 1, 4: 1, 8: 1}
    in_flight = 2 * 8192
    rows, windows = 1_048_576 // 256, cdiv(127 + in_flight, 64) + 1
    unfinished = cdiv(7 + in_flight, 4) + 1 + cdiv(127 + in_flight, 8) + 1
    assert layout.blocks(1_048_576) == rows + 2 * windows + unfinished == 10_778
    options = PlanOptions(pipeline_parallel_size=3)
    found = [layout_of(read_spec(name), options, i).bytes_per_block for i in range(3)]
    assert tuple(found) == stages


def test_padded_pages() -> None:
    """A start-up of DeepSeek-V4-Pro with vLLM 0.20 logged 1,810 blocks in 2.50 GiB, and had a layer
    more for speculation: places for 31 pages of windows and rows, 30 or 31 of the indexer's, and 31
    small ones."""
    layout = layout_of(read_spec("DeepSeek-V4-Pro"), PlanOptions(engine_version="0.25.1"))
    assert layout.bytes_per_block == 31 * 37_440 + 30 * 8640 + 31 * 1728
    assert layout.bytes_per_block == pytest.approx(2.5 * 2**30 / 1810, rel=0.01)
    assert len(layout.groups) == 5


@pytest.mark.parametrize(
    ("name", "gpu", "options", "size"),
    [
        ("DeepSeek-V2-Lite", "h100-80gb", {}, 16),
        ("DeepSeek-V2-Lite", "h100-80gb", {"kv_cache_dtype": "fp8"}, 64),
        ("DeepSeek-V2-Lite", "a100-80gb", {"kv_cache_dtype": "fp8"}, 16),
        ("DeepSeek-V2-Lite", "b200-180gb", {}, 32),
        ("DeepSeek-V3.2", "b200-180gb", {}, 64),
        ("DeepSeek-V2-Lite", "b200-180gb", {"block_size": 64}, 64),
        ("Llama-3.1-8B", "b200-180gb", {}, 16),
        ("MiniMax-M3", "h100-80gb", {}, 128),
        ("DeepSeek-V4-Pro", "h200-141gb", {}, 256),
    ],
)
def test_blocks_that_the_backend_of_the_device_takes(
    name: str, gpu: str, options: dict[str, object], size: int
) -> None:
    """`get_supported_kernel_block_sizes` of FlashInfer's, FlashMLA's and Triton's kernels."""
    engine = VLLM(CATALOGUE[gpu])
    asked = PlanOptions(device=engine.device, **options)  # type: ignore[arg-type]
    assert engine.resolve(read_spec(name), asked).block_size.value == size


def test_context_parallel_ranks_are_ranks_of_a_layer() -> None:
    """Latents, which every rank holds alike, are spread over four."""
    options = PlanOptions(tensor_parallel_size=4, decode_context_parallel_size=4)
    spread = layout_of(read_spec("DeepSeek-V2-Lite"), options)
    assert spread.blocks(65_536) == 1024
    with pytest.raises(UsageError, match="does not divide --tensor-parallel-size 4"):
        layout_of(read_spec("DeepSeek-V2-Lite"), replace(options, decode_context_parallel_size=3))
    with pytest.raises(UsageError, match="with a window"):
        layout_of(gemma_like(), options)


def test_tokens_as_older_versions_print_them() -> None:
    """A log of 0.19 has 623,040 tokens and 18.44 sequences: 30 of the 40 layers are recurrent."""
    kinds = Counter(
        {
            LayerKind(token_bytes=1024): 10,
            LayerKind(kind="state", state_bytes=1056 * 1024): 30,
        }
    )
    layout = kv_layout(kinds, block_size=16)
    assert layout.block_size == 1056
    assert layout.blocks(131_072) == 128
    tokens = {
        version: VLLM(version=version).cache_tokens(2360, layout, 131_072)
        for version in ("0.19.1", "0.20.2")
    }
    assert tokens == {"0.19.1": 623_040, "0.20.2": int(2360 / 128 * 131_072)}


@pytest.mark.parametrize(
    ("version", "caching", "blocks"),
    [("0.25.1", None, 1), ("0.25.1", True, 2), ("0.32.0", None, 2), ("0.32.0", False, 1)],
)
def test_states_that_prefix_caching_keeps(version: str, caching: bool | None, blocks: int) -> None:
    """Mode `align` has two (`MambaSpec.max_memory_usage_bytes`); it is off in older versions."""
    engine = VLLM(version=version)
    options = PlanOptions(enable_prefix_caching=caching)
    spec = read_spec("Kimi-Linear-48B-A3B-Instruct")
    layout = engine.kv_layout(spec, Rank(), engine.resolve(spec, options))
    assert layout.state_blocks == blocks


def kinds(**counts: int) -> Counter[LayerKind]:
    windows = {"full": None, "sliding": 64, "other": 128}
    return Counter({LayerKind(token_bytes=4, window=windows[k]): n for k, n in counts.items()})


@pytest.mark.parametrize(
    ("counts", "group_size", "groups"),
    [
        ({"full": 32}, 32, 1),
        ({"full": 13, "sliding": 13}, 13, 2),
        ({"full": 8, "sliding": 10}, 10, 2),
        ({"full": 4, "sliding": 22}, 4, 7),
        ({"full": 2, "sliding": 3}, 2, 3),
        ({"full": 3, "sliding": 4}, 4, 2),
        ({"full": 10, "sliding": 20, "other": 30}, 10, 6),
    ],
)
def test_group_size_rule(counts: dict[str, int], group_size: int, groups: int) -> None:
    """The rarest kind, or the most frequent if that is less than half as many again."""
    layout = kv_layout(kinds(**counts), block_size=16)
    assert layout.bytes_per_block == group_size * 16 * 4
    assert len(layout.groups) == groups


layouts = st.builds(
    kv_layout,
    st.dictionaries(
        st.builds(LayerKind, token_bytes=st.just(8), window=st.none() | st.integers(1, 5000)),
        st.integers(1, 40),
        min_size=1,
        max_size=3,
    ).map(Counter),
    block_size=st.integers(1, 64),
    in_flight_tokens=st.integers(0, 20_000),
)


@given(layout=layouts, available=st.integers(0, 5000), limit=st.integers(1, 200_000))
def test_longest_is_the_longest(layout: KVLayout, available: int, limit: int) -> None:
    longest = layout.longest(available, limit)
    assert 0 <= longest <= limit
    assert longest == 0 or layout.blocks(longest) <= available
    assert longest == limit or layout.blocks(longest + 1) > available


@given(layout=layouts, tokens=st.integers(1, 100_000))
def test_a_sequence_never_gets_less_than_it_sees(layout: KVLayout, tokens: int) -> None:
    assert layout.blocks(tokens) * layout.bytes_per_block >= layout.minimum_bytes(tokens)
    assert layout.all_full_bytes(tokens) >= layout.minimum_bytes(tokens)
    assert layout.blocks(tokens + 1) >= layout.blocks(tokens)


def test_layers_of_a_stage() -> None:
    spec = replace(read_spec("Llama-3.1-8B"), layers=read_spec("Llama-3.1-8B").layers[:5])
    options = PlanOptions(pipeline_parallel_size=3)
    sizes = [layout_of(spec, options, pp_rank=i).bytes_per_block // 65_536 for i in range(3)]
    assert sizes == [2, 2, 1]
    assert Parallel(pipeline_parallel_size=3).world_size == 3


def test_heads_of_other_shapes_are_of_another_kind() -> None:
    """Twice the heads of half the size take the same bytes, and engines put them elsewhere."""
    spec = read_spec("Llama-3.1-8B")
    mixer = spec.layers[0].mixers[0]
    other = replace(mixer, num_kv_heads=16, head_dim=64)
    layers = (spec.layers[0], replace(spec.layers[0], mixers=(other,)), *spec.layers[2:])
    kinds = layer_kinds(replace(spec, layers=layers), Rank(), CacheDtypes.of("BF16"))
    assert {(kind.token_bytes, kind.heads): count for kind, count in kinds.items()} == {
        (4096, (8, 128, 128)): 31,
        (4096, (16, 64, 64)): 1,
    }


def test_pages_that_no_block_has_a_place_for() -> None:
    """Unfinished rows of larger heads are more than the packed rows, which have one size."""
    config = read_config("DeepSeek-V4-Flash") | {"head_dim": 1024}
    with pytest.raises(UnsupportedModelError, match="pages of 65664 bytes"):
        layout_of(model_spec(config), PlanOptions(engine_version="0.25.1"))
    assert layout_of(model_spec(config), PlanOptions()).bytes_per_block > 1_002_240
