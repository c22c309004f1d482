"""merge(shard(x)) is x, and a cut from N to M is the direct one: for any family, size and seed."""

import random
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st

from support.random_models import variant, write_random_model
from support.tiny_families import SHARDED
from support.tiny_models import NAMES, make_tiny_model
from support.work import digests, merged, stored, write_shards
from tightfit.checkpoint.checkpoint import open_checkpoint
from tightfit.errors import LayoutError
from tightfit.model.stored import DEFAULT_LAYOUT, stored_layout
from tightfit.sharding.shard import prepare

SIZES = (1, 2, 4, 8)


def is_possible(model: Path, size: int) -> bool:
    """Whether it divides."""
    try:
        prepare(
            open_checkpoint(str(model)),
            stored_layout(DEFAULT_LAYOUT),
            tensor_parallel_size=size,
            max_shard_bytes=10**9,
        )
    except LayoutError:
        return False
    return True


@pytest.mark.parametrize("name", [*NAMES, *SHARDED])
def test_every_family(name: str, tmp_path: Path) -> None:
    generator = random.Random(f"{name} 1")
    others = variant(name, generator)
    model = make_tiny_model(
        name, tmp_path / "model", seed=generator.randrange(2**31), others=others
    )
    source = stored(model)
    possible = [size for size in SIZES if is_possible(model, size)]
    # Only families whose sizes depend on one another have kept their few heads.
    assert possible == list(SIZES) if others else len(possible) > 1
    sizes = [possible[-1], generator.choice(possible[:-1])]
    stages = generator.choice((1, 1, 2))
    for size in sizes:
        write_shards(model, tmp_path / f"tp{size}", size)
        assert merged(tmp_path / f"tp{size}", tmp_path / f"back{size}") == source
    for size, before in (sizes, sizes[::-1]):
        again = tmp_path / f"again{size}"
        write_shards(tmp_path / f"tp{before}", again, size)
        assert digests(again) == digests(tmp_path / f"tp{size}")
    if stages > 1:
        try:
            write_shards(model, tmp_path / "stages", 2, pipeline_parallel_size=2)
        except LayoutError:
            return
        assert merged(tmp_path / "stages", tmp_path / "back") == source


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    """Small decoders of a few families, with sizes that divide or not."""
    kind, architecture = draw(
        st.sampled_from(
            [
                ("llama", "LlamaForCausalLM"),
                ("mistral", "MistralForCausalLM"),
                ("qwen2", "Qwen2ForCausalLM"),
                ("qwen3", "Qwen3ForCausalLM"),
                ("phi3", "Phi3ForCausalLM"),
                ("gemma2", "Gemma2ForCausalLM"),
                ("mixtral", "MixtralForCausalLM"),
            ]
        )
    )
    heads = draw(st.sampled_from([1, 2, 3, 4, 6, 8, 9, 12, 16]))
    kv_heads = draw(st.sampled_from([n for n in range(1, heads + 1) if heads % n == 0]))
    head_dim = draw(st.sampled_from([2, 4, 6, 16]))
    return {
        "architectures": [architecture],
        "model_type": kind,
        "dtype": "bfloat16",
        "vocab_size": draw(st.integers(1, 300)),
        "hidden_size": heads * head_dim,
        "intermediate_size": draw(st.integers(1, 64)) * draw(st.sampled_from([1, 2, 8])),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "query_pre_attn_scalar": head_dim,
        "tie_word_embeddings": kind == "gemma2" or draw(st.booleans()),
        "attention_bias": draw(st.booleans()),
        "mlp_bias": draw(st.booleans()),
    }


@given(
    config=configs(),
    before=st.sampled_from([1, 2, 3, 4, 8]),
    after=st.sampled_from([1, 2, 3, 4, 8]),
    stages=st.sampled_from([1, 1, 1, 2]),
    layout=st.sampled_from(["vllm-0.32", "builtin"]),
    part_bytes=st.sampled_from([10**9, 20_000, 1_000]),
    dtype=st.sampled_from(["BF16", "F16", "F32"]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=50, suppress_health_check=list(HealthCheck))
def test_any_decoder(
    config: dict[str, Any],
    before: int,
    after: int,
    stages: int,
    layout: str,
    part_bytes: int,
    dtype: str,
    seed: int,
) -> None:
    with TemporaryDirectory() as directory:
        root = Path(directory)
        model = write_random_model(config, root / "model", seed=seed, dtype=dtype)
        try:
            for size, out, source in (
                (before, "first", model),
                (after, "direct", model),
                (after, "again", root / "first"),
            ):
                write_shards(
                    source,
                    root / out,
                    size,
                    layout=layout,
                    max_shard_bytes=part_bytes,
                    # Only the first cut has stages: they may be many or one on the way.
                    pipeline_parallel_size=stages if out == "first" else 1,
                )
        except LayoutError:
            reject()
        assert digests(root / "again") == digests(root / "direct")
        assert merged(root / "first", root / "back", part_bytes) == stored(model)
