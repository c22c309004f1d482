"""The older and the smaller dense families: counts, caches by hand, cuts as vLLM's.

Configs of models that the shared collection does not hold were written from transformers' own
defaults and documentation; `synthetic-*` are of no published model.
"""

import pytest

from support.configs import read_config, read_spec
from tightfit.errors import ConfigError, UnsupportedModelError
from tightfit.model.blocks.attention import Attention
from tightfit.model.cache import TokenCache
from tightfit.model.families import model_spec
from tightfit.model.layout import Parallel, Rank, on_rank
from tightfit.model.parameters import parameter_count, parameters
from tightfit.model.sources import source_shapes
from tightfit.model.spec import ModelSpec


def test_both_configs_of_phi_2_are_of_one_size() -> None:
    """The second is held to transformers' own module."""
    assert parameter_count(read_spec("phi-2-msft")) == parameter_count(read_spec("phi-2"))


def token_elements(spec: ModelSpec, size: int = 1) -> int:
    """Features that a token leaves in all layers of a rank."""
    rank = Rank(parallel=Parallel(tensor_parallel_size=size))
    caches = [c for layer in spec.layers for m in layer.mixers for c in m.caches(rank)]
    assert all(isinstance(cache, TokenCache) for cache in caches)
    return sum(cache.elements_per_token for cache in caches if isinstance(cache, TokenCache))


def llama(vocab: int, hidden: int, layers: int, kv: int, width: int, *, tables: int = 2) -> int:
    """Parameters of a Llama, of which `kv` is the width of all keys of a token."""
    layer = 2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * width + 2 * hidden
    return tables * vocab * hidden + layers * layer + hidden


def nemotron_49b() -> int:
    """49 layers with attention, and 80 MLPs of the widths that follow from `ffn_mult`."""
    widths = {28_672: 49, 7168: 10, 5632: 8, 2816: 6, 14_336: 6, 17_920: 1}
    attention = 2 * 8192 * 8192 + 2 * 8192 * 1024 + 8192
    mlps = sum(count * (3 * 8192 * width + 8192) for width, count in widths.items())
    return 2 * 128_256 * 8192 + 49 * attention + mlps + 8192


@pytest.mark.parametrize(("name", "count"), [
    # As users' own scripts and model cards print them.
    ("Qwen-7B", 7_721_324_544),
    ("Baichuan-7B", 7_000_559_616),
    ("glm-4-9b", 9_399_951_360),
    # By hand, from the shapes in vLLM's model files.
    ("Baichuan2-7B-Base", llama(125_696, 4096, 32, 4096, 11_008)),
    ("Baichuan2-13B-Base", llama(125_696, 5120, 40, 5120, 13_696)),
    ("EXAONE-3-7.8B", llama(102_400, 4096, 32, 1024, 14_336)),
    ("internlm2-7b", llama(92_544, 4096, 32, 1024, 14_336)),
    ("solar-pro-preview-instruct", llama(32_128, 5120, 64, 1280, 17_920)),
    ("MiniCPM-2B-sft-bf16", llama(122_753, 2304, 40, 2304, 5760, tables=1)),
    ("Orion-14B-Base", llama(84_608, 5120, 40, 5120, 15_360) + 81 * 5120),
    ("MiMo-7B-Base", llama(151_680, 4096, 36, 1024, 11_008) + 36 * (4096 + 2 * 1024)),
    ("Llama-3_3-Nemotron-Super-49B-v1", nemotron_49b()),
])  # fmt: skip
def test_counts_of_classes_that_transformers_lacks(name: str, count: int) -> None:
    assert parameter_count(read_spec(name)) == count


@pytest.mark.parametrize(("name", "elements"), [
    ("gpt2", 12 * 2 * 768),
    ("starcoderbase-1b", 24 * 2 * 128),
    ("falcon-7b", 32 * 2 * 64),
    ("falcon-40b", 60 * 2 * 8 * 64),
    ("phi-2-msft", 32 * 2 * 2560),
    ("glm-4-9b", 40 * 2 * 2 * 128),
    ("EXAONE-3-7.8B", 32 * 2 * 8 * 128),
    ("internlm2-7b", 32 * 2 * 8 * 128),
    ("c4ai-command-r-plus", 64 * 2 * 8 * 128),
    ("Llama-3_3-Nemotron-Super-49B-v1", 49 * 2 * 8 * 128),
    ("opt-350m", 24 * 2 * 1024),
])  # fmt: skip
def test_what_a_token_leaves(name: str, elements: int) -> None:
    assert token_elements(read_spec(name)) == elements


def test_one_kv_head_is_on_every_rank() -> None:
    assert token_elements(read_spec("starcoderbase-1b"), 4) == 24 * 2 * 128
    assert token_elements(read_spec("falcon-40b"), 16) == 60 * 2 * 64


def attentions(spec: ModelSpec) -> list[Attention]:
    return [layer.attention for layer in spec.layers]


def test_windows_and_positions() -> None:
    """Cohere 2 and EXAONE 4 rotate where they slide; vLLM keeps one token more of Cohere's."""
    cohere, exaone = (
        attentions(read_spec(n)) for n in ("c4ai-command-r7b-12-2024", "EXAONE-4.0-32B")
    )
    assert [a.window for a in cohere[:4]] == [4096, 4096, 4096, None]
    assert [a.window for a in exaone[:4]] == [4096, 4096, 4096, None]
    for found in (cohere, exaone):
        assert all((a.rope is None) is (a.window is None) for a in found)
    small = attentions(read_spec("EXAONE-4.0-1.2B"))
    assert all(a.window is None and a.rope is not None for a in small)
    assert {a.window for a in attentions(read_spec("starcoder2-16k"))} == {4096}
    smol = attentions(read_spec("SmolLM3-3B"))
    assert [i for i, a in enumerate(smol) if a.rope is None] == list(range(3, 36, 4))
    world = attentions(read_spec("cwm"))
    assert [a.window for a in world[:5]] == [None, 8192, 8192, 8192, None]


def test_a_pattern_may_be_letters() -> None:
    config = {k: v for k, v in read_config("EXAONE-4.0-32B").items() if k != "layer_types"}
    assert config["sliding_window_pattern"] == "LLLG"
    assert model_spec(config).layers == read_spec("EXAONE-4.0-32B").layers


def test_rotations() -> None:
    rotary = {
        name: (rope.rotary_dim, rope.interleaved)
        for name in (
            "phi-2-msft",
            "glm-4-9b",
            "gpt-j-6b",
            "pythia-160m",
            "stablelm-3b",
            "aya-23-8B",
        )
        if (rope := attentions(read_spec(name))[0].rope) is not None
    }
    assert rotary == {
        "phi-2-msft": (32, False),
        "glm-4-9b": (64, True),
        "gpt-j-6b": (64, True),
        "pythia-160m": (16, False),
        "stablelm-3b": (20, False),
        "aya-23-8B": (128, True),
    }
    for name in ("gpt2", "bloom-560m", "mpt-7b", "Baichuan2-13B-Base"):
        assert attentions(read_spec(name))[0].rope is None


def test_checkpoints_are_named_as_published() -> None:
    for name, tensor, shape in (
        ("gpt2", "transformer.h.11.attn.c_attn.weight", (768, 2304)),
        ("falcon-40b", "transformer.h.0.self_attention.query_key_value.weight", (9216, 8192)),
        ("phi-2-msft", "transformer.h.0.mixer.Wqkv.weight", (7680, 2560)),
        ("internlm2-7b", "model.layers.0.attention.wqkv.weight", (6144, 4096)),
        ("glm-4-9b", "transformer.encoder.layers.0.mlp.dense_h_to_4h.weight", (27392, 4096)),
        ("EXAONE-3-7.8B", "transformer.h.0.attn.attention.q_proj.weight", (4096, 4096)),
        ("Qwen-7B", "transformer.h.0.mlp.w1.weight", (11008, 4096)),
        ("c4ai-command-r-plus", "model.layers.0.self_attn.q_norm.weight", (96, 128)),
        ("opt-350m", "model.decoder.project_in.weight", (1024, 512)),
        ("opt-350m", "model.decoder.embed_tokens.weight", (50272, 512)),
        ("pythia-160m", "embed_out.weight", (50304, 768)),
    ):
        assert source_shapes(read_spec(name))[tensor] == shape


def test_stages_that_hold_more_than_they_use() -> None:
    """vLLM builds GPT-2's tables on every pipeline stage, and Llama's only at the ends."""

    def held(name: str) -> list[int]:
        spec = read_spec(name)
        ranks = Parallel(pipeline_parallel_size=3).ranks()
        tables = (f"{spec.names.embedding}.weight", f"{spec.names.head}.weight")
        found = [weight for weight in parameters(spec) if weight.name in tables]
        return [sum(on_rank(w, rank, spec.num_layers) for w in found) for rank in ranks]

    assert held("gpt2") == [1, 1, 1]
    assert held("internlm2-7b") == [2, 2, 2]
    assert held("EXAONE-3-7.8B") == [1, 0, 1]


def test_layers_that_a_search_made_unequal() -> None:
    spec = read_spec("Llama-3_3-Nemotron-Super-49B-v1")
    assert sum(1 for layer in spec.layers if not layer.mixers) == 31
    widths = [layer.mlp.intermediate_size for layer in spec.layers[:2] if layer.mlp is not None]
    assert widths == [14_336, 28_672]
    config = read_config("Llama-3_3-Nemotron-Super-49B-v1")
    blocks = config["block_configs"]
    with pytest.raises(ConfigError) as e:
        model_spec({**config, "block_configs": blocks[1:]})
    assert e.value.message == ("config.json has 79 block_configs for num_hidden_layers = 80")
    attention = {**blocks[0]["attention"], "replace_with_linear": True}
    with pytest.raises(UnsupportedModelError) as u:
        model_spec({**config, "block_configs": [{**blocks[0], "attention": attention}] * 80})
    assert u.value.message == (
        "config.json: block_configs[0]: attention has replace_with_linear, which vLLM does not "
        "build"
    )


@pytest.mark.parametrize(("name", "key", "value"), [
    ("gpt2", "add_cross_attention", True),
    ("stablelm-3b", "qk_layernorm", True),
    ("mpt-7b", "attn_config", {"alibi": False}),
    ("MiniCPM-2B-sft-bf16", "num_experts", 8),
    ("Qwen-7B", "visual", {"layers": 48}),
    ("phi-2", "qk_layernorm", True),
])  # fmt: skip
def test_options_that_change_the_model_are_refused(name: str, key: str, value: object) -> None:
    with pytest.raises(UnsupportedModelError):
        model_spec({**read_config(name), key: value})


def test_other_names_of_the_same() -> None:
    config = {**read_config("Llama-2-7b-hf"), "architectures": ["InternLM3ForCausalLM"]}
    biased = model_spec({**config, "qkv_bias": True})
    assert biased.architecture == "InternLM3ForCausalLM"
    assert not biased.verified_for_sharding
    assert parameter_count(biased) == parameter_count(model_spec(config)) + 32 * 3 * 4096


@pytest.mark.parametrize(("base", "architecture"), [
    ("Qwen3-Embedding-8B", "Qwen3Model"),
    ("Llama-3.1-8B", "LlamaModel"),
    ("gpt2", "GPT2Model"),
])  # fmt: skip
def test_embedding_models_have_no_head(base: str, architecture: str) -> None:
    config = read_config(base)
    whole = read_spec(base)
    spec = model_spec({**config, "architectures": [architecture]})
    assert spec.pooling
    assert not spec.is_plain
    head = 0 if whole.tie_word_embeddings else whole.vocab_size * whole.hidden_size
    assert parameter_count(spec) == parameter_count(whole) - head


def test_classifiers_score_in_float32() -> None:
    config = {**read_config("Qwen3-4B"), "architectures": ["Qwen3ForSequenceClassification"]}
    spec = model_spec({**config, "num_labels": 1})
    score = next(w for w in parameters(spec) if w.name == "score.weight")
    assert score.rank_shape(Rank()) == (1, spec.hidden_size)
    assert score.held_dtype("BF16") == "F32"
    labels = {"0": "no", "1": "maybe", "2": "yes"}
    three = model_spec({**config, "id2label": labels})
    assert parameter_count(three) - parameter_count(spec) == 2 * spec.hidden_size


@pytest.mark.parametrize(("architecture", "hint"), [
    ("Qwen4ForCausalLM", "close names that are: QWenLMHeadModel, Qwen3ForCausalLM"),
    ("BertModel", None),
])  # fmt: skip
def test_unknown_architectures_suggest_close_names(architecture: str, hint: str | None) -> None:
    with pytest.raises(UnsupportedModelError) as e:
        model_spec({**read_config("Llama-2-7b-hf"), "architectures": [architecture]})
    assert e.value.message == f"architecture {architecture} is not modelled"
    assert (e.value.hint or "").startswith(hint or "")
    assert e.value.hint is not None or hint is None


def test_gpt_neox_has_no_grouped_heads_whatever_its_config_says() -> None:
    config = read_config("pythia-160m")
    plain, odd = model_spec(config), model_spec({**config, "num_key_value_heads": 4})
    assert parameter_count(odd) == parameter_count(plain)
