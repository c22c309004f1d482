"""MiniMax-Text-01 and M1: lightning attention, full attention in every eighth layer, and experts.

vLLM serves them up to 0.22.
"""

from tightfit.errors import UnsupportedModelError
from tightfit.model.blocks.linear_attention import LightningAttention
from tightfit.model.blocks.mlp import ExpertNames, MoE
from tightfit.model.config import Config
from tightfit.model.families import decoder, hybrid
from tightfit.model.spec import Layer, ModelSpec

ARCHITECTURES = ("MiniMaxForCausalLM", "MiniMaxText01ForCausalLM", "MiniMaxM1ForCausalLM")

_KINDS = {"linear_attention": "linear_attention", "full_attention": "full_attention"}


def spec(config: Config) -> ModelSpec:
    """Layers by `layer_types`, or by `attn_type_list`, where 1 is full attention."""
    architecture = config.strings("architectures")[0]
    if config.integer("shared_intermediate_size", default=0, minimum=0):
        raise UnsupportedModelError(f"shared_intermediate_size in {architecture} is not modelled")
    full = decoder.attention(_with_rotary_factor(config))
    linear = LightningAttention(num_heads=full.num_heads, head_dim=full.head_dim)
    experts = MoE(
        num_experts=config.integer("num_local_experts", default=8, maximum=decoder.MOST_EXPERTS),
        top_k=config.integer("num_experts_per_tok", default=2),
        intermediate_size=config.integer("intermediate_size"),
        activation=config.text("hidden_act", default="silu"),
        renormalize=True,
        module="block_sparse_moe",
        names=ExpertNames(
            gate="experts.{expert}.w1.weight",
            up="experts.{expert}.w3.weight",
            down="experts.{expert}.w2.weight",
        ),
    )
    mixers = {"linear_attention": linear, "full_attention": full}
    layers = {kind: Layer(mixers=(mixer,), mlp=experts) for kind, mixer in mixers.items()}
    count = decoder.num_layers(config)
    kinds = hybrid.layer_kinds(config, _words(config, count), _KINDS, count=count)
    return decoder.model(
        config,
        tuple(layers[kind] for kind in kinds),
        norm_eps=config.positive("rms_norm_eps", default=1e-5),
        verified_for_sharding=False,
    )


def _words(config: Config, count: int) -> tuple[str, ...]:
    words = config.strings("layer_types")
    numbers = config.integers("attn_type_list")
    if set(numbers) - {0, 1}:
        raise UnsupportedModelError("an attn_type_list of other than 0 and 1 is not modelled")
    if not words and numbers:
        words = tuple("full_attention" if n else "linear_attention" for n in numbers)
    return words or tuple("linear_attention" if i % 2 else "full_attention" for i in range(count))


def _with_rotary_factor(config: Config) -> Config:
    """The published configs give `rotary_dim`, half a head."""
    if not config.has("rotary_dim"):
        return config
    size = config.integer("head_dim", default=config.integer("hidden_size"))
    return config.with_defaults({"partial_rotary_factor": config.integer("rotary_dim") / size})
