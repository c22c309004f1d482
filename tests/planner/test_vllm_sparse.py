"""Workspaces of sparse attention, by the shapes in vLLM's own code."""

import pytest

from support.configs import read_spec
from tightfit.planner.assemble import make_plan
from tightfit.planner.plan import Component
from tightfit.planner.spelling import plan_options
from tightfit.units import MiB

M, L = 8192, 131_072


def component(model: str, name: str, **given: object) -> Component:
    values = {"gpu": "h200", "tp": 8, "max_num_batched_tokens": M, "max_model_len": L, **given}
    return make_plan(read_spec(model), plan_options(values), name=model).ranks[0].component(name)


@pytest.mark.parametrize(
    ("version", "heads"),
    [
        # `q_concat_shape`, of the rank's 16 heads.
        ("0.25.1", 16 * 576),
        # And padded to 64: queries, outputs, and outputs without the padding.
        ("0.32.0", 16 * 576 + 64 * (576 + 512) + 16 * 512),
    ],
)
def test_fp8_latents_are_decoded(version: str, heads: int) -> None:
    found = component(
        "DeepSeek-V3.2", "moe_workspace", kv_cache_dtype="fp8", engine_version=version
    )
    experts = M * 8 * (7168 + 7168) * 2
    assert found.planned_bytes == max(experts, (M * heads + 5 * L * 576) * 2)


def test_the_indexer_gathers_less_of_long_contexts() -> None:
    """`get_max_prefill_buffer_size`: 128 fp8 bytes and 4 of scales for each of 8 x 5 L tokens."""
    small = {"max_num_batched_tokens": 256, "max_num_seqs": 256}
    found = component("DeepSeek-V3.2", "moe_workspace", **small)
    assert found.planned_bytes == 40 * L * 132 + MiB
    longer = {**small, "max_model_len": 524_288}
    found = component("DeepSeek-V4-Flash", "moe_workspace", **longer)
    rows = 524_288 // 4 + 128 + 256
    assert found.planned_bytes == 4 * rows * 512 * 2 + 4 * 256 * (640 + 1)
    assert found.planned_bytes > 16 * 524_288 // 4 * 132 + MiB


def test_residual_streams_and_padded_heads() -> None:
    """Four streams and a normed one; 64 padded heads twice; float32 scores of two compressors."""
    found = component("DeepSeek-V4-Flash", "activations")
    features = 5 * 4096 + 2 * 64 * 512
    scores = 2 * 4 * (1024 + 256)
    assert found.planned_bytes == M * (2 * features + scores) + 512 * MiB + 32 * MiB


@pytest.mark.parametrize(
    ("model", "gpu", "version", "asked", "dtype", "latent_bytes"),
    [
        ("GLM-5-FP8", "b200", "0.32.0", None, "F8_E4M3", 576),
        ("GLM-5-FP8", "b200", "0.25.1", None, "BF16", 1152),
        ("GLM-5-FP8", "h200", "0.32.0", None, "BF16", 1152),
        ("GLM-5-FP8", "b200", "0.32.0", "bfloat16", "BF16", 1152),
        ("DeepSeek-V3.2", "b200", "0.32.0", None, "BF16", 1152),
        ("DeepSeek-V3.2", "b200", "0.32.0", "fp8", "F8_E4M3", 576),
        ("DeepSeek-V3.2", "b200", "0.32.0", "fp8_ds_mla", "fp8_ds_mla", 656),
        ("DeepSeek-V3.2", "b200", "0.22.1", "fp8", "fp8_ds_mla", 656),
        ("DeepSeek-V3.2", "h200", "0.32.0", "fp8", "fp8_ds_mla", 656),
        ("DeepSeek-V3.2", None, "0.32.0", "fp8", "fp8_ds_mla", 656),
        ("DeepSeek-V3.2", "rtxpro6000", "0.32.0", None, "fp8_ds_mla", 656),
        ("DeepSeek-V3.2", "rtxpro6000", "0.32.0", "bfloat16", "fp8_ds_mla", 656),
    ],
)
def test_the_rows_of_latents_are_those_of_the_device(
    model: str, gpu: str | None, version: str, asked: str | None, dtype: str, latent_bytes: int
) -> None:
    given = {"gpu": gpu, "engine_version": version, "kv_cache_dtype": asked, "tp": 8}
    result = make_plan(read_spec(model), plan_options(given), name=model)
    assert result.options.kv_cache_dtype.value == dtype
    layers = read_spec(model).num_layers
    # Beside the latents an indexer's keys of 132 bytes.
    assert result.kv_cache.bytes_per_token == layers * (latent_bytes + 132)
