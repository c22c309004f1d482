"""DeepSeek V4: compressed attention, four residual streams, and experts in fp4.

Checkpoints have names of their own, without `model.`. Sources: vLLM's `models/deepseek_v4/`; the
defaults are transformers'.
"""

from dataclasses import replace

from tightfit.errors import ConfigError, UnsupportedModelError
from tightfit.model.blocks.attention import Rope
from tightfit.model.blocks.compressed_attention import (
    OVERLAPPING,
    CompressedAttention,
    CompressedIndexer,
    Compressor,
    HashTable,
    HyperConnections,
)
from tightfit.model.blocks.linear import vector
from tightfit.model.blocks.mlp import DenseMLP, ExpertNames, MoE
from tightfit.model.config import Config
from tightfit.model.families import decoder
from tightfit.model.layout import Part, Stage, Weight
from tightfit.model.quantization.base import Quantization
from tightfit.model.quantization.forms import Form
from tightfit.model.quantization.matching import Names as Modules
from tightfit.model.quantization.recipe import Recipe, Rule
from tightfit.model.spec import Layer, ModelSpec, Names

ARCHITECTURES = ("DeepseekV4ForCausalLM",)

_KNOWN_RATIOS = (0, OVERLAPPING, 128)


def spec(config: Config) -> ModelSpec:
    """`compress_ratios` has one number for each layer: 0, 4 or 128 tokens to a row."""
    if config.integer("vision_n_layers", default=0, minimum=0):
        raise UnsupportedModelError("the vision tower of DeepSeek V4 is not modelled")
    config = config.with_defaults({"max_position_embeddings": 1_048_576})
    hidden_size = config.integer("hidden_size")
    streams = config.integer("hc_mult", default=4)
    hashed = config.integer("num_hash_layers", default=3, minimum=0)
    table = HashTable(
        vocab_size=config.integer("vocab_size"),
        top_k=config.integer("num_experts_per_tok", default=6),
    )
    mixing = HyperConnections(streams=streams)
    scored, by_hash = _experts(config, biased=True), _experts(config, biased=False)
    kinds = {ratio: _attention(config, ratio) for ratio in _KNOWN_RATIOS}
    alike: dict[tuple[int, bool], Layer] = {}
    for i, ratio in enumerate(ratios := _ratios(config)):
        routed = i < hashed
        layer = Layer(
            mixers=(kinds[ratio],),
            mlp=by_hash if routed else scored,
            extras=(mixing, table) if routed else (mixing,),
        )
        alike.setdefault((ratio, routed), layer)
    return decoder.model(
        config,
        tuple(alike[ratio, i < hashed] for i, ratio in enumerate(ratios)),
        names=Names(
            embedding="embed",
            layers="layers",
            norm="norm",
            head="head",
            layer_norms=("attn_norm", "ffn_norm"),
        ),
        extras=(
            Weight(
                name="hc_head_fn",
                parts=(Part(source="hc_head_fn", rows=streams),),
                columns=streams * hidden_size,
                where=Stage.EVERY,
                dtype="F32",
            ),
            vector("hc_head_base", streams, Stage.EVERY, "F32"),
            vector("hc_head_scale", 1, Stage.EVERY, "F32"),
        ),
        quantization=_quantization(config),
        ignored_sources=(r"^mtp\.",),
        verified_for_sharding=False,
    )


def _quantization(config: Config) -> Quantization | None:
    """fp8 blocks, but experts in fp4; scales are `scale` on disk, and e8m0 if experts are fp4.

    (vLLM's `models/deepseek_v4/quant_config.py`.)
    """
    section = config.section("quantization_config")
    if section is None:
        return None
    method = section.text("quant_method", default="unnamed")
    experts = config.text("expert_dtype", default="fp4")
    blocks = section.integers("weight_block_size")
    if (
        method not in ("fp8", "deepseek_v4_fp8")
        or len(blocks) != 2
        or section.has("moe_quant_algo")
    ):
        raise UnsupportedModelError(
            f"DeepSeek V4 with quant_method {method!r} is not modelled", hint="modelled: fp8 blocks"
        )
    if experts not in ("fp4", "fp8"):
        raise UnsupportedModelError(f"an expert_dtype of {experts!r} is not modelled")
    packed = experts == "fp4"
    block = Form(
        kind="scale",
        dtype="F8_E8M0" if packed else "F32",
        engine_kind="weight_scale_inv",
        rows=blocks[0],
        columns=blocks[1],
        ragged=True,
    )
    fp8 = Rule(forms=(Form(kind="weight", dtype="F8_E4M3"), block), everything=True)
    fp4 = (
        Form(kind="weight", dtype="U8", columns=2),
        Form(kind="scale", dtype="U8", columns=32, engine_kind="weight_scale"),
    )
    rules = (Rule(forms=fp4, names=Modules(inside=("ffn.experts",))), fp8) if packed else (fp8,)
    name = f"deepseek_v4_fp8 (block {blocks[0]}x{blocks[1]}, experts {experts})"
    return Recipe(name=name, rules=rules)


def _ratios(config: Config) -> tuple[int, ...]:
    count = decoder.num_layers(config)
    ratios = config.integers("compress_ratios")
    if not ratios:
        raise UnsupportedModelError(f"{config.name} without compress_ratios is not modelled")
    if len(ratios) < count:
        raise ConfigError(
            f"{config.name} has {len(ratios)} compress_ratios for num_hidden_layers = {count}",
            hint="correct the config.json",
        )
    for ratio in ratios[:count]:
        if ratio not in _KNOWN_RATIOS:
            raise UnsupportedModelError(f"a compress_ratio of {ratio} is not modelled")
    return ratios[:count]


def _attention(config: Config, ratio: int) -> CompressedAttention:
    head_dim = config.integer("head_dim", default=512)
    indexer = CompressedIndexer(
        num_heads=config.integer("index_n_heads", default=64),
        topk=config.integer("index_topk", default=512),
        compressor=Compressor(
            ratio=OVERLAPPING, head_dim=config.integer("index_head_dim", default=128)
        ),
    )
    return CompressedAttention(
        num_heads=config.integer("num_attention_heads"),
        head_dim=head_dim,
        q_lora_rank=config.integer("q_lora_rank", default=1024),
        o_lora_rank=config.integer("o_lora_rank", default=1024),
        o_groups=config.integer("o_groups", default=8),
        window=config.integer("sliding_window", default=128),
        rope=_rope(config, compressed=ratio > 0),
        scale=head_dim**-0.5,
        compressor=Compressor(ratio=ratio, head_dim=head_dim) if ratio else None,
        index=indexer if ratio == OVERLAPPING else None,
    )


def _rope(config: Config, *, compressed: bool) -> Rope:
    """Compressed layers have a base of their own and yarn, the others neither."""
    rope = replace(
        decoder.rope(config, config.integer("qk_rope_head_dim", default=64)), interleaved=True
    )
    if not compressed:
        return replace(rope, scaling=None)
    theta = config.positive("compress_rope_theta", default=160_000.0)
    if rope.scaling is None:
        return replace(rope, theta=theta)
    return replace(rope, theta=theta, scaling={**rope.scaling, "rope_type": "deepseek_yarn"})


def _experts(config: Config, *, biased: bool) -> MoE:
    width = config.integer("moe_intermediate_size", default=2048)
    activation = config.text("hidden_act", default="silu")
    shared = config.integer("n_shared_experts", default=1, minimum=0)
    method = config.text("topk_method", default="noaux_tc")
    return MoE(
        num_experts=config.integer("n_routed_experts", default=256, maximum=decoder.MOST_EXPERTS),
        top_k=config.integer("num_experts_per_tok", default=6),
        intermediate_size=width,
        activation=activation,
        renormalize=config.boolean("norm_topk_prob", default=True),
        module="ffn",
        names=ExpertNames(
            gate="experts.{expert}.w1.weight",
            up="experts.{expert}.w3.weight",
            down="experts.{expert}.w2.weight",
        ),
        correction_bias="gate.bias" if biased and method == "noaux_tc" else None,
        shared=DenseMLP(
            intermediate_size=width * shared,
            activation=activation,
            module="shared_experts",
            gate="w1",
            up="w3",
            down="w2",
        )
        if shared
        else None,
    )
