"""State-space and linear-attention models: which layer is what, and what a sequence keeps.

The figures of ranks are those of vLLM 0.32's own classes, built without weights under several
tensor parallel sizes. `LFM2-*`, `Falcon-H1-*`, `Bamba-9B`, `mamba-130m-hf`, `Kimi-Linear-*` and
`MiniMax-*` are written from what is published about them.
"""

from collections import Counter
from math import prod
from typing import Any

import pytest

from support.configs import read_config, read_spec
from tightfit.errors import ConfigError, LayoutError, UnsupportedModelError
from tightfit.model.blocks.attention import Attention
from tightfit.model.blocks.gated_delta_net import GatedDeltaNet
from tightfit.model.blocks.kimi_delta import KimiDeltaAttention
from tightfit.model.blocks.latent_attention import LatentAttention
from tightfit.model.blocks.linear_attention import LightningAttention
from tightfit.model.blocks.mamba import Mamba1, Mamba2
from tightfit.model.blocks.mlp import DenseMLP, MoE
from tightfit.model.blocks.short_conv import ShortConv
from tightfit.model.cache import StateCache, TokenCache
from tightfit.model.families import model_spec
from tightfit.model.layout import Parallel, Rank
from tightfit.model.parameters import check_parallel, parameter_count, parameters
from tightfit.model.sources import source_shapes
from tightfit.model.spec import ModelSpec
from tightfit.units import dtype_bytes


def rank_of(size: int) -> Rank:
    return Rank(parallel=Parallel(tensor_parallel_size=size))


def states(spec: ModelSpec, size: int = 1) -> list[StateCache]:
    mixers = [mixer for layer in spec.layers for mixer in layer.mixers]
    caches = [cache for mixer in mixers for cache in mixer.caches(rank_of(size))]
    return [cache for cache in caches if isinstance(cache, StateCache)]


def kv_bytes_per_token(spec: ModelSpec) -> int:
    mixers = [mixer for layer in spec.layers for mixer in layer.mixers]
    caches = [cache for mixer in mixers for cache in mixer.caches(rank_of(1))]
    return 2 * sum(cache.elements_per_token for cache in caches if isinstance(cache, TokenCache))


def kinds(spec: ModelSpec) -> str:
    """A letter for every layer; lower case where it has experts."""
    letters = {
        Mamba1: "M",
        Mamba2: "M",
        GatedDeltaNet: "D",
        KimiDeltaAttention: "D",
        ShortConv: "C",
        LightningAttention: "L",
        Attention: "A",
        LatentAttention: "A",
    }
    found = ""
    for layer in spec.layers:
        word = "".join(letters[type(mixer)] for mixer in layer.mixers) or "-"
        found += word.lower() if isinstance(layer.mlp, MoE) else word
    return found


@pytest.mark.parametrize(
    ("name", "per_token", "one_sequence"),
    [
        # One sequence of 32,768 tokens, everything in 16 bits.
        ("Nemotron-H-8B-Base-8K", 16_384, 588_677_120),
        ("granite-4.0-h-small", 16_384, 614_193_152),
        ("mamba2-780m", 0, 38_707_200),
        ("Mamba-Codestral-7B-v0.1", 0, 64 * 2 * (3 * 10_240 + 128 * 64 * 128)),
        ("falcon-mamba-7b", 0, 64 * 2 * (3 * 8192 + 8192 * 16)),
        ("AI21-Jamba-1.5-Mini", 4 * 4096, 4 * 4096 * 32_768 + 28 * 2 * (3 * 8192 + 8192 * 16)),
        (
            "Qwen3-Next-80B-A3B-Thinking",
            12 * 2048,
            12 * 2048 * 32_768 + 36 * 2 * (3 * 8192 + 32 * 128 * 128),
        ),
        ("LFM2-1.2B", 6 * 2048, 6 * 2048 * 32_768 + 10 * 2 * 2 * 2048),
    ],
)
def test_what_a_sequence_keeps(name: str, per_token: int, one_sequence: int) -> None:
    spec = read_spec(name)
    elements = sum(prod(state.shape) for cache in states(spec) for state in cache.states)
    assert kv_bytes_per_token(spec) == per_token
    assert per_token * 32_768 + 2 * elements == one_sequence


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        # vLLM's `NemotronHForCausalLMConfig`: float32 also where the config is silent.
        ("Nemotron-H-8B-Base-8K", "F32"),
        ("NVIDIA-Nemotron-3-Nano-30B-A3B-BF16", "F32"),
        ("Qwen3.5-27B-text", "F32"),
        ("Qwen3.8-2.4T-A95B", "F32"),
        ("Kimi-Linear-48B-A3B-Instruct", "F32"),
        ("Qwen3-Next-80B-A3B-Thinking", None),
        ("granite-4.0-h-small", None),
        ("AI21-Jamba-1.5-Mini", None),
    ],
)
def test_dtype_of_states(name: str, dtype: str | None) -> None:
    found = {(s.role, s.dtype) for cache in states(read_spec(name)) for s in cache.states}
    assert found == {("conv", None), ("ssm", dtype)}


@pytest.mark.parametrize(
    ("name", "size", "shapes"),
    [
        ("mamba2-780m", 2, [(3, 1792), (24, 64, 128)]),
        ("mamba2-780m", 8, [(3, 640), (6, 64, 128)]),
        ("granite-4.0-h-small", 8, [(3, 1280), (16, 64, 128)]),
        ("Nemotron-H-8B-Base-8K", 8, [(3, 1280), (16, 64, 128)]),
        ("falcon-mamba-7b", 8, [(3, 1024), (1024, 16)]),
        ("Qwen3-Next-80B-A3B-Thinking", 8, [(3, 1024), (4, 128, 128)]),
        ("Kimi-Linear-48B-A3B-Instruct", 4, [(3, 3072), (8, 128, 128)]),
        ("LFM2-1.2B", 8, [(2, 256)]),
    ],
)
def test_states_of_a_rank(name: str, size: int, shapes: list[tuple[int, ...]]) -> None:
    cache = states(read_spec(name), size)[0]
    assert [state.shape for state in cache.states] == shapes


@pytest.mark.parametrize(
    ("name", "held"),
    [
        ("mamba2-780m", {1: 1_560_376_320, 2: 799_199_232, 8: 228_316_416}),
        ("falcon-mamba-7b", {1: 14_562_107_392, 2: 7_281_319_936, 8: 1_820_729_344}),
        ("Mamba-Codestral-7B-v0.1", {2: 7_285_678_080, 8: 1_821_818_880}),
        ("AI21-Jamba-1.5-Mini", {1: 103_147_986_688, 8: 12_895_813_376}),
        ("Nemotron-H-8B-Base-8K", {1: 16_201_711_616, 2: 8_101_072_896, 8: 2_025_593_856}),
        ("granite-4.0-h-350m", {1: 680_667_136, 2: 345_924_352}),
        ("granite-4.0-h-small", {1: 64_414_685_184, 2: 32_257_265_664, 8: 8_139_201_024}),
        ("Qwen3-Next-80B-A3B-Thinking", {1: 159_348_784_896, 8: 20_026_091_360}),
        ("LFM2-1.2B", {1: 2_340_681_216, 8: 292_704_768}),
        ("LFM2-8B-A1B", {1: 16_679_862_528, 8: 2_087_685_376}),
        ("Falcon-H1-0.5B-Base", {1: 1_043_020_544, 2: 531_068_288, 8: 154_181_984}),
        # vLLM's router is float32 on a CPU, and bfloat16 on the GPUs that these are served on:
        # less than what its class has there by 23 * 128 * 2688 * 2 and 40 * 512 * 4096 * 2 bytes.
        ("NVIDIA-Nemotron-3-Nano-30B-A3B-BF16", {1: 63_155_889_408, 8: 7_914_787_520}),
        ("NVIDIA-Nemotron-3-Super-120B-A12B-FP8", {1: 241_337_466_880, 8: 30_914_479_104}),
    ],
)
def test_bytes_of_a_rank_as_in_vllm(name: str, held: dict[int, int]) -> None:
    weights = parameters(read_spec(name))
    found = {
        size: sum(
            dtype_bytes(w.held_dtype("BF16"), prod(w.rank_shape(rank_of(size)))) for w in weights
        )
        for size in held
    }
    assert found == held


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("mamba2-780m", 780_161_280),
        ("Mamba-Codestral-7B-v0.1", 7_285_403_648),
        ("Nemotron-H-8B-Base-8K", 8_100_852_736),
        ("NVIDIA-Nemotron-3-Nano-30B-A3B-BF16", 31_577_940_288),
        ("granite-4.0-h-small", 32_207_337_984),
        ("Qwen3-Next-80B-A3B-Thinking", 79_674_391_296),
        ("LFM2-1.2B", 1_170_340_608),
        ("MiniMax-Text-01", 456_089_655_296),
    ],
)
def test_counts_as_published(name: str, count: int) -> None:
    assert parameter_count(read_spec(name)) == count


def test_patterns() -> None:
    """Spelled out from what the models' cards say, not from the config's own words."""
    jamba = "MmMmAmMm" * 4
    assert kinds(read_spec("AI21-Jamba-1.5-Mini")) == jamba
    assert kinds(read_spec("Qwen3-Next-80B-A3B-Thinking")) == "ddda" * 12
    assert kinds(read_spec("Qwen3.5-27B-text")) == "DDDA" * 16
    assert kinds(read_spec("Qwen3.8-2.4T-A95B")) == "ddda" * 23
    assert kinds(read_spec("Kimi-Linear-48B-A3B-Instruct")) == "Ddda" + "ddda" * 5 + "dda"
    assert kinds(read_spec("LFM2-1.2B")) == "CCACCACCACACACAC"
    assert kinds(read_spec("LFM2-8B-A1B")) == "CC" + "acccacccacccacccaccacc"
    assert kinds(read_spec("Bamba-9B")) == ("M" * 9 + "A") + ("M" * 8 + "A") * 2 + "M" * 4
    assert kinds(read_spec("Falcon-H1-0.5B-Base")) == "MA" * 36
    assert kinds(read_spec("granite-4.0-h-small")) == "mmmmma" + "mmmmmmmmma" * 3 + "mmmm"
    nano = Counter(kinds_of_nemotron("NVIDIA-Nemotron-3-Nano-30B-A3B-BF16"))
    assert nano == {"mamba": 23, "experts": 23, "attention": 6}
    large = Counter(kinds_of_nemotron("Nemotron-H-56B-Base-8K"))
    assert large == {"mamba": 54, "mlp": 54, "attention": 10}


def kinds_of_nemotron(name: str) -> list[str]:
    found = []
    for layer in read_spec(name).layers:
        assert len(layer.mixers) + (layer.mlp is not None) == 1
        names = {Mamba2: "mamba", Attention: "attention", DenseMLP: "mlp", MoE: "experts"}
        found.append(names[type(layer.mixers[0] if layer.mixers else layer.mlp)])
    return found


def changed(name: str, **values: Any) -> ModelSpec:
    config = {**read_config(name), **values}
    return model_spec({key: value for key, value in config.items() if value is not None})


def test_a_pattern_in_words_is_the_same() -> None:
    letters = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}
    name = "NVIDIA-Nemotron-3-Nano-30B-A3B-BF16"
    words = [letters[letter] for letter in read_config(name)["hybrid_override_pattern"]]
    by_words = changed(name, layers_block_type=words, hybrid_override_pattern=None)
    assert by_words.layers == read_spec(name).layers
    assert (
        changed("Qwen3.5-27B-text", layer_types=None).layers == read_spec("Qwen3.5-27B-text").layers
    )


def test_layers_alike_are_one_object() -> None:
    for name in ("AI21-Jamba-1.5-Mini", "Nemotron-H-56B-Base-8K", "Qwen3.8-2.4T-A95B"):
        layers = read_spec(name).layers
        assert len({id(layer) for layer in layers}) <= 4


def test_quantization_leaves_mamba_1_alone() -> None:
    """vLLM's `MambaMixer` takes no `quant_config`; `MambaMixer2` does."""
    names = ("AI21-Jamba-1.5-Mini", "granite-4.0-h-small")
    quantized = [{w.name for w in parameters(read_spec(n)) if w.linear} for n in names]
    assert "model.layers.0.mamba.in_proj.weight" not in quantized[0]
    assert "model.layers.4.self_attn.qkv_proj.weight" in quantized[0]
    assert "model.layers.0.mamba.in_proj.weight" in quantized[1]


def test_latent_experts() -> None:
    """Nemotron 3 Super: experts see 1024 features, shared ones the whole hidden size."""
    name = "NVIDIA-Nemotron-3-Super-120B-A12B-FP8"
    held = {w.name: w.rank_shape(rank_of(4)) for w in parameters(read_spec(name))}
    prefix = "backbone.layers.1.mixer"
    assert held[f"{prefix}.experts.w13_weight"] == (512, 2688 // 4, 1024)
    assert held[f"{prefix}.experts.w2_weight"] == (512, 1024, 2688 // 4)
    assert held[f"{prefix}.shared_experts.up_proj.weight"] == (5376 // 4, 4096)
    assert held[f"{prefix}.fc1_latent_proj.weight"] == (1024, 4096)
    assert held[f"{prefix}.fc2_latent_proj.weight"] == (4096, 1024)


def test_names_and_shapes_of_a_checkpoint() -> None:
    """As the published files of mamba2-780m-hf, granite-4.0-h-small and Qwen3-Next have them."""
    mamba = source_shapes(read_spec("mamba2-780m"))
    assert mamba["backbone.embeddings.weight"] == (50_288, 1536)
    assert mamba["backbone.layers.0.mixer.conv1d.weight"] == (3328, 1, 4)
    assert mamba["backbone.layers.0.mixer.in_proj.weight"] == (6448, 1536)
    assert mamba["backbone.norm_f.weight"] == (1536,)
    granite = source_shapes(read_spec("granite-4.0-h-small"))
    prefix = "model.layers.0.block_sparse_moe"
    assert granite[f"{prefix}.input_linear.weight"] == (72, 1536, 4096)
    assert granite[f"{prefix}.router.layer.weight"] == (72, 4096)
    assert granite["model.layers.0.shared_mlp.input_linear.weight"] == (3072, 4096)
    qwen = source_shapes(read_spec("Qwen3-Next-80B-A3B-Thinking"))
    assert qwen["model.layers.0.linear_attn.in_proj_qkvz.weight"] == (12_288, 2048)
    assert qwen["model.layers.0.linear_attn.in_proj_ba.weight"] == (64, 2048)
    assert qwen["model.layers.3.self_attn.q_proj.weight"] == (16 * 256 * 2, 2048)
    assert qwen["model.layers.0.mlp.shared_expert_gate.weight"] == (1, 2048)
    kimi = source_shapes(read_spec("Kimi-Linear-48B-A3B-Instruct"))
    assert kimi["model.layers.0.self_attn.A_log"] == (1, 1, 32, 1)
    assert kimi["model.layers.0.self_attn.q_conv1d.weight"] == (4096, 1, 4)


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("Mamba-Codestral-7B-v0.1", 16, "n_groups = 8"),
        ("mamba2-780m", 32, "the heads of Mamba = 48"),
        ("Qwen3-Next-80B-A3B-Thinking", 32, "linear_num_key_heads = 16"),
    ],
)
def test_what_vllm_cannot_cut(name: str, size: int, message: str) -> None:
    with pytest.raises(LayoutError) as e:
        check_parallel(read_spec(name), Parallel(tensor_parallel_size=size))
    assert message in e.value.message


@pytest.mark.parametrize(
    ("name", "values", "error", "message"),
    [
        (
            "Nemotron-H-8B-Base-8K",
            {"hybrid_override_pattern": "M-X"},
            UnsupportedModelError,
            "layer type 'X' is not modelled",
        ),
        ("Nemotron-H-8B-Base-8K", {"hybrid_override_pattern": ""}, ConfigError, "of 0 layers"),
        ("Nemotron-H-8B-Base-8K", {"sliding_window": 128}, UnsupportedModelError, "sliding_window"),
        (
            "Nemotron-H-8B-Base-8K",
            {"mamba_ssm_cache_dtype": "int3"},
            ConfigError,
            "mamba_ssm_cache_dtype = 'int3'",
        ),
        (
            "granite-4.0-h-small",
            {"layer_types": ["mamba", "rwkv"], "num_hidden_layers": 2},
            UnsupportedModelError,
            "layer type 'rwkv'",
        ),
        ("granite-4.0-h-small", {"num_hidden_layers": 3}, ConfigError, "of 40 layers"),
        ("granite-4.0-h-small", {"mamba_n_heads": 100}, ConfigError, "mamba_n_heads"),
        ("AI21-Jamba-1.5-Mini", {"attn_layer_offset": 8}, ConfigError, "attn_layer_offset = 8"),
        ("mamba2-780m", {"num_heads": 40}, ConfigError, "num_heads x head_dim = 2560"),
        ("Qwen3-Next-80B-A3B-Thinking", {"attention_bias": True}, UnsupportedModelError, "bias"),
        (
            "Qwen3.5-27B-text",
            {"linear_num_value_heads": 40},
            ConfigError,
            "linear_num_value_heads = 40",
        ),
        (
            "Kimi-Linear-48B-A3B-Instruct",
            {"mla_use_nope": False},
            UnsupportedModelError,
            "rotary embeddings",
        ),
        (
            "Kimi-Linear-48B-A3B-Instruct",
            {"num_hidden_layers": 28},
            ConfigError,
            "not each of 28 layers once",
        ),
    ],
)
def test_refusals(name: str, values: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as e:
        changed(name, **values)
    assert message in e.value.message  # type: ignore[attr-defined]


def test_narrow_experts_are_filled_with_zeros() -> None:
    """vLLM's `KimiMoE`: an expert's share on a rank is 256 wide at least."""
    experts = next(
        weight
        for weight in parameters(read_spec("Kimi-Linear-48B-A3B-Instruct"))
        if weight.name.endswith("experts.w13_weight")
    )
    assert {n: experts.rank_shape(rank_of(n))[1] for n in (1, 2, 4, 8)} == {
        1: 2 * 1024,
        2: 2 * 512,
        4: 2 * 256,
        8: 2 * 256,
    }
    whole = Parallel(tensor_parallel_size=8, expert_parallel=True)
    assert experts.rank_shape(Rank(parallel=whole)) == (32, 2048, 2304)


def test_kimi_k3() -> None:
    """By hand from its config: nobody's class is public but vLLM's, which needs a GPU."""
    spec = read_spec("Kimi-K3")
    hidden, inner, latent = 7168, 96 * 128, 3584
    delta = 5 * hidden * inner + hidden * (96 + 128) + 128 * inner + 3 * 4 * inner
    delta += inner + 96 + 128
    full = hidden * (1536 + 576) + 1536 * 96 * 192 + 512 * 96 * 256 + 2 * hidden * inner + 2048
    experts = 896 * (3 * latent * 3072 + hidden + 1) + 2 * hidden * latent + latent
    experts += 3 * hidden * 2 * 3072
    layers = 69 * delta + 24 * full + 92 * experts + 3 * hidden * 33_792
    around = 93 * 6 * hidden + 2 * 163_840 * hidden + 3 * hidden
    tower = sum(
        prod(weight.source_shape(part))
        for tower in spec.towers
        for weight in tower.weights
        for part in {part.source: part for part in weight.parts}.values()
    )
    assert parameter_count(spec) - tower == layers + around
    assert kv_bytes_per_token(spec) == 24 * 576 * 2
    kept = {state.shape: state.dtype for cache in states(spec, 8) for state in cache.states}
    assert kept == {(3, 3 * inner // 8): None, (12, 128, 128): "F32"}
    assert len(states(spec)) == 69
    quantized = {w.name.rpartition(".experts.")[2] for w in parameters(spec) if w.dtype == "U8"}
    assert quantized == {
        "w13_weight_packed",
        "w13_weight_scale",
        "w2_weight_packed",
        "w2_weight_scale",
    }


def test_minimax_text() -> None:
    """The configs of remote code describe the model that transformers' class does."""
    spec = read_spec("MiniMax-Text-01-hf")
    assert kinds(spec) == ("lllllll" + "a") * 10
    assert read_spec("MiniMax-Text-01").layers == spec.layers == read_spec("MiniMax-M1-80k").layers
    assert parameter_count(read_spec("MiniMax-Text-01")) == parameter_count(spec)
    assert {s.shape for cache in states(spec, 8) for s in cache.states} == {(8, 128, 128)}
    assert kv_bytes_per_token(spec) == 10 * 2 * 8 * 128 * 2
