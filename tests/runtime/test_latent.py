"""Latent attention: its ropes, routing of DeepSeek, its cache, and quantized projections."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from runtime.ranks import PROMPTS, all_logits, open_session, options
from support.quantizing import CHOICES, quantize
from support.tiny_models import make_tiny_model
from tightfit.checkpoint.checkpoint import Checkpoint, open_checkpoint
from tightfit.checkpoint.describe import describe
from tightfit.model.layout import Parallel
from tightfit.planner.engines.builtin_memory import step_components
from tightfit.planner.kv_cache import kv_layout
from tightfit.planner.kv_kinds import CacheDtypes, layer_kinds
from tightfit.quantize.dequantize import open_dequantized
from tightfit.runtime.models.latent import LatentSelfAttention
from tightfit.runtime.ranks.world import World
from tightfit.runtime.session import Session, start

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
}
GROUPS = {"n_routed_experts": 8, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5}
SMALL = {"kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 24}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "groups_of_v3": ("deepseek_v3", GROUPS),
    "groups_of_v2": (
        "deepseek_v2",
        {**GROUPS, "topk_method": "group_limited_greedy", "norm_topk_prob": False},
    ),
    "yarn_of_v3": ("deepseek_v3", {**SMALL, "rope_parameters": YARN}),
    "yarn_of_v2": (
        "deepseek_v2",
        {**SMALL, "rope_parameters": {**YARN, "mscale": 1.0}, "norm_topk_prob": False},
    ),
    "queries_of_v3": ("deepseek_v3", {**SMALL, "q_lora_rank": None}),
    "queries_of_v2": ("deepseek_v2", {**SMALL, "q_lora_rank": 32, "norm_topk_prob": False}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(variant: str, tmp_path: Path, reference: Callable[[Path], Any]) -> None:
    name, others = VARIANTS[variant]
    path = make_tiny_model(name, tmp_path / variant, others=others)
    ours = all_logits(open_session(path), PROMPTS[0])
    with torch.no_grad():
        theirs = reference(path)(torch.tensor([PROMPTS[0]])).logits[0]
    assert ours is not None
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v3", "minicpm3", "gpt_oss"])
def test_the_cache_is_what_was_planned(name: str, tiny_model: Callable[[str], Path]) -> None:
    session = open_session(tiny_model(name), num_blocks=33)
    worker = session.engine.worker
    kinds = layer_kinds(
        worker.decoder.spec, Parallel().ranks()[0], CacheDtypes.of("F32"), windows=False
    )
    layout = kv_layout(kinds, block_size=worker.options.block_size)
    assert worker.cache.nbytes == 33 * layout.bytes_per_block


def test_values_are_a_view_of_the_keys_and_projections_of_the_weights(
    tiny_model: Callable[[str], Path],
) -> None:
    session = open_session(tiny_model("deepseek_v3"))
    for keys, values in session.engine.worker.cache.layers:
        assert keys.shape[2:] == (1, 512 + 64)
        assert values.shape[2:] == (1, 512)
        assert values.data_ptr() == keys.data_ptr()
    for attention in attentions(session):
        assert attention.to_keys._base is attention.to_values._base is not None


def attentions(session: Session) -> list[LatentSelfAttention]:
    mixers = [layer.mixer for layer in session.engine.worker.decoder.layers]
    assert all(isinstance(mixer, LatentSelfAttention) for mixer in mixers)
    return mixers


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {**SMALL, "kv_lora_rank": 64, "hidden_size": 128, "q_lora_rank": 64}
    sizes |= {"qk_nope_head_dim": 32, "v_head_dim": 32, "qk_rope_head_dim": 32}
    root = tmp_path_factory.mktemp("latent")
    return make_tiny_model("deepseek_v3", root / "plain", dtype="float32", others=sizes)


@pytest.mark.parametrize("label", ["fp8-channel", "w4a16 g32", "int8"])
def test_quantized_projections_are_decoded_once(label: str, plain: Path, tmp_path: Path) -> None:
    out = tmp_path / "quantized"
    quantize(plain, out, CHOICES[label])
    checkpoint = open_checkpoint(str(out))
    ours = all_logits(opened(checkpoint), PROMPTS[0])
    theirs = all_logits(opened(open_dequantized(checkpoint)), PROMPTS[0])
    assert ours is not None
    assert theirs is not None
    # Inputs are rounded where the scheme says so.
    bound = 1e-4 if label == "w4a16 g32" else 0.2
    assert (ours - theirs).norm() < bound * theirs.norm()
    spec = describe(checkpoint).spec
    buffers = step_components(
        spec,
        Parallel().ranks()[0],
        dtype="F32",
        max_model_len=64,
        max_num_seqs=4,
        max_num_batched_tokens=64,
        block_size=4,
    )[0]
    assert buffers.name == "persistent_buffers"
    assert buffers.planned_bytes == 4 * (64 * 32 + 2 * 4 * (32 + 32) * 64)


def opened(checkpoint: Checkpoint) -> Session:
    return start(checkpoint, describe(checkpoint).spec, options(), world=World())
