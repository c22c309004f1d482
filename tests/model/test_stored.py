"""What the files call the parameters: vLLM 0.32 demands exactly these names."""

from collections.abc import Callable
from pathlib import Path

import pytest

from support.configs import read_config, read_spec
from support.tiny_models import NAMES
from tightfit.checkpoint.checkpoint import open_checkpoint
from tightfit.errors import UsageError
from tightfit.model.families import model_spec
from tightfit.model.layout import Parallel, Rank
from tightfit.model.spec import ModelSpec
from tightfit.model.stored import DEFAULT_LAYOUT, LAYOUTS, rank_tensors, stored_layout

CONSTANTS = {
    f"self_attn.attn.{name}" for name in ("_k_scale", "_prob_scale", "_q_scale", "_v_scale")
}
NORMS = {"input_layernorm.weight", "post_attention_layernorm.weight"}
POST_NORMS = {"post_attention_layernorm.weight", "post_feedforward_layernorm.weight"}
SANDWICH = NORMS | {"pre_feedforward_layernorm.weight", "post_feedforward_layernorm.weight"}
ATTENTION = {"self_attn.qkv_proj.weight", "self_attn.o_proj.weight"} | CONSTANTS
DENSE = {"mlp.gate_up_proj.weight", "mlp.down_proj.weight"}
PLAIN = ATTENTION | DENSE | NORMS
QK_NORMS = {"self_attn.q_norm.weight", "self_attn.k_norm.weight"}
QKV_BIAS = {"self_attn.qkv_proj.bias"}
QWEN3_EXPERTS = {
    "mlp.experts.gate.weight",
    "mlp.experts.routed_experts.w13_weight",
    "mlp.experts.routed_experts.w2_weight",
}
MIXTRAL_EXPERTS = {
    "block_sparse_moe.gate.weight",
    "block_sparse_moe.experts.routed_experts.w13_weight",
    "block_sparse_moe.experts.routed_experts.w2_weight",
}
NORM, EMBEDDING, HEAD = "model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"
UNTIED, TIED = {NORM, EMBEDDING, HEAD}, {NORM, HEAD}
GPT_OSS = {NORM, "model.embedding.weight", HEAD}

EXPECTED = {
    "llama": (PLAIN, UNTIED),
    "llama3": (PLAIN, UNTIED),
    "llama_mqa": (PLAIN, UNTIED),
    "llama_tied": (PLAIN, TIED),
    "llama_bias": (
        PLAIN | QKV_BIAS | {"self_attn.o_proj.bias", "mlp.gate_up_proj.bias", "mlp.down_proj.bias"},
        UNTIED,
    ),
    "mistral": (PLAIN, UNTIED),
    "qwen2": (PLAIN | QKV_BIAS, UNTIED),
    "qwen2_tied": (PLAIN | QKV_BIAS, TIED),
    "qwen3": (PLAIN | QK_NORMS, UNTIED),
    "qwen3_moe": (ATTENTION | QK_NORMS | QWEN3_EXPERTS | NORMS, UNTIED),
    "mixtral": (ATTENTION | MIXTRAL_EXPERTS | NORMS, UNTIED),
    "phi3": (PLAIN, UNTIED),
    "phi3_longrope": (PLAIN, UNTIED),
    "phi4_partial": (PLAIN, UNTIED),
    "gemma": (PLAIN, TIED),
    "gemma2": (ATTENTION | DENSE | SANDWICH, {NORM, EMBEDDING}),
    "gemma3": (ATTENTION | DENSE | SANDWICH | QK_NORMS, TIED),
    "granite": (PLAIN, TIED),
    "olmo2": (ATTENTION | DENSE | QK_NORMS | POST_NORMS, UNTIED),
    "olmo3": (ATTENTION | DENSE | QK_NORMS | POST_NORMS, UNTIED),
}


def names(spec: ModelSpec, rank: Rank, layout: str = DEFAULT_LAYOUT) -> list[str]:
    return [tensor.name for tensor in rank_tensors(spec, rank, stored_layout(layout))]


@pytest.mark.parametrize("name", NAMES)
def test_names_of_every_family(name: str, tiny_model: Callable[[str], Path]) -> None:
    spec = model_spec(open_checkpoint(str(tiny_model(name))).config)
    found = names(spec, Rank())
    assert len(found) == len(set(found))
    layer, outer = EXPECTED[name]
    prefix = "model.layers.0."
    assert {n.removeprefix(prefix) for n in found if n.startswith(prefix)} == layer
    assert {n for n in found if not n.startswith("model.layers.")} == outer
    other_rank = Rank(tp_rank=1, parallel=Parallel(tensor_parallel_size=2))
    assert names(spec, other_rank) == found
    assert names(spec, Rank(), "builtin") == found


def test_a_dense_layer_among_experts() -> None:
    spec = model_spec(read_config("Qwen3-30B-A3B") | {"mlp_only_layers": [1]})
    found = names(spec, Rank())
    assert {n for n in found if n.startswith("model.layers.1.mlp")} == {
        f"model.layers.1.{name}" for name in DENSE
    }
    assert {n for n in found if n.startswith("model.layers.2.mlp")} == {
        f"model.layers.2.{name}" for name in QWEN3_EXPERTS
    }


@pytest.mark.parametrize(
    ("model", "first", "middle", "last"),
    [
        ("Llama-3.1-8B", {EMBEDDING}, set(), {NORM, HEAD}),
        ("SmolLM2-135M", {EMBEDDING}, set(), {NORM, HEAD}),
        ("gemma-2-2b-it", {EMBEDDING, NORM}, {EMBEDDING, NORM}, {EMBEDDING, NORM}),
        ("Mixtral-8x7B-v0.1", UNTIED, UNTIED, UNTIED),
        ("gpt-oss-20b-BF16", GPT_OSS, GPT_OSS, GPT_OSS),
        ("Qwen3-Next-80B-A3B-Thinking", {EMBEDDING, HEAD}, {EMBEDDING, HEAD}, UNTIED),
    ],
)
def test_ends_of_a_pipeline(model: str, first: set[str], middle: set[str], last: set[str]) -> None:
    spec = read_spec(model)
    stages = Parallel(pipeline_parallel_size=3).ranks()
    outer = [{n for n in names(spec, rank) if not n.startswith("model.layers.")} for rank in stages]
    assert outer == [first, middle, last]


def test_constants_are_ones_that_no_parameter_backs() -> None:
    spec = read_spec("SmolLM2-135M")
    constants = [
        t for t in rank_tensors(spec, Rank(), stored_layout(DEFAULT_LAYOUT)) if "_scale" in t.name
    ]
    assert len(constants) == 4 * spec.num_layers
    assert {(t.dtype, t.shape, t.fill, t.parameter, t.nbytes) for t in constants} == {
        ("F32", (), 1.0, None, 4)
    }


def test_unknown_layout() -> None:
    with pytest.raises(UsageError) as e:
        stored_layout("vllm-9")
    assert e.value.message == "unknown layout 'vllm-9'"
    assert e.value.hint is not None
    assert e.value.hint.startswith("layouts: " + ", ".join(LAYOUTS))
