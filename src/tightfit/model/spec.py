"""`ModelSpec`: the hyperparameters of a model, normalized, whatever its config calls them."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from tightfit.errors import UnsupportedModelError
from tightfit.model.blocks.attention import Attention, Rope
from tightfit.model.blocks.base import Block, Mixer
from tightfit.model.blocks.mlp import DenseMLP, MoE
from tightfit.model.layout import Weight
from tightfit.model.quantization.base import Quantization
from tightfit.model.towers.base import Tower


class NormStyle(Enum):
    """Where a decoder layer normalizes."""

    PRE = "pre"
    """Before attention and before the MLP: `input_layernorm`, `post_attention_layernorm`."""
    POST = "post"
    """After each, before the residual is added: OLMo 2."""
    SANDWICH = "sandwich"
    """Before and after each: Gemma 2 and 3."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One decoder layer: what mixes its tokens, and its MLP. Layers alike share one object."""

    mixers: tuple[Mixer, ...]
    mlp: DenseMLP | MoE | None
    extras: tuple[Block, ...] = ()
    """Blocks beside them, such as a second MLP or a gate of the layer."""
    norms: tuple[str, ...] | None = None
    """Names of its norms, where the model's own do not apply."""

    @property
    def attention(self) -> Attention:
        """The attention of a layer that has nothing else.

        Raises:
            UnsupportedModelError: its tokens are mixed by something else, or by several things.
        """
        if len(self.mixers) == 1 and isinstance(self.mixers[0], Attention):
            return self.mixers[0]
        kinds = " and ".join(type(mixer).__name__ for mixer in self.mixers) or "nothing"
        raise UnsupportedModelError(f"a layer with {kinds} where plain attention is needed")


def mixers_of(layers: Iterable[Layer]) -> tuple[Mixer, ...]:
    """One of each kind, in the order of the layers."""
    return tuple(dict.fromkeys(mixer for layer in layers for mixer in layer.mixers))


def ropes(layers: Iterable[Layer]) -> tuple[Rope, ...]:
    """The distinct rotary embeddings of layers, each of which needs one table."""
    mixers = [mixer for layer in layers for mixer in layer.mixers]
    blocks = [block for mixer in mixers for block in (mixer, getattr(mixer, "indexer", None))]
    found = (getattr(block, "rope", None) for block in blocks)
    return tuple(dict.fromkeys(rope for rope in found if isinstance(rope, Rope)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Names:
    """What a checkpoint calls the modules around and inside the decoder."""

    embedding: str = "model.embed_tokens"
    layers: str = "model.layers"
    norm: str | None = "model.norm"
    head: str = "lm_head"
    layer_norms: tuple[str, ...] | None = None
    """The norms of a layer; by default those of the model's `NormStyle`."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ModelSpec:
    """A language model: a decoder, and the towers that feed it.

    `dtype` is the checkpoint's, in safetensors' spelling. The defaults of the scalar factors are
    those of a plain Llama. Specs are equal only if they are the same object, which makes them
    cheap keys of caches.
    """

    architecture: str
    model_type: str
    dtype: str
    hidden_size: int
    vocab_size: int
    layers: tuple[Layer, ...]
    max_position_embeddings: int
    original_length: int | None = None
    """The context that a longrope model was trained with first, and engines take by default."""
    length_is_free: bool = False
    """No length is in the config: engines take any that the user gives, and else this."""
    norm_eps: float
    norm_style: NormStyle = NormStyle.PRE
    norm_unit_offset: bool = False
    """Norms multiply by `1 + weight`: Gemma."""
    norm_bias: bool = False
    """Norms are LayerNorms with a bias: GPT-2, Falcon."""
    norm_centers: bool = False
    """Norms are LayerNorms, which subtract the mean, without a bias: Command-R."""
    norm_weights: bool = True
    """False for norms without any parameters: OLMo."""
    parallel_residual: bool = False
    """The MLP works beside attention, on the same stream, not after it: GPT-NeoX, Falcon."""
    tie_word_embeddings: bool = False
    head_bias: bool = False
    has_lm_head_module: bool = True
    """vLLM's class has an `lm_head` even when it is tied; Gemma 2 has not."""
    added_embeddings: int = 0
    """Rows of the embedding that the head has not: Llama 3.2 Vision."""
    whole_embedding: bool = False
    """vLLM holds the embedding whole and without padding on every rank: Whisper."""
    embedding_size: int | None = None
    """Width of the embedding and the head, where it is not hidden_size: OPT 350M."""
    every_stage_has_ends: bool = False
    """vLLM builds embedding, last norm and head on all pipeline stages: GPT-2, Command-R."""
    every_stage_has_head: bool | None = None
    """The same of the head alone, where it differs from the other ends: Qwen3.5."""
    every_stage_has_norm: bool | None = None
    """The same of the last norm alone, where it differs from the other ends: Gemma 2."""
    pooling: bool = False
    """Makes embeddings or scores: engines load no head and sample nothing."""
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logits_scale: float = 1.0
    logits_softcap: float | None = None
    names: Names = Names()
    extras: tuple[Weight, ...] = ()
    """Parameters of the decoder that belong to no layer, such as learned positions."""
    positions: str | None = None
    """Name of the one of them that is a table of learned positions."""
    first_position: int = 0
    """Its row for a sequence's first token: OPT."""
    unmodelled: str | None = None
    """What it computes that changes no size, and so is not described: only plans cope with it."""
    towers: tuple[Tower, ...] = ()
    """Encoders of images, video or audio, with their projectors."""
    wraps_decoder: bool = False
    """The class is a multimodal one, which embeds tokens itself, also without its towers."""
    encoder_tokens: int = 0
    """Tokens of the encoder of an encoder-decoder model; 0 for a decoder alone."""
    quantization: Quantization | None = None
    kv_cache_quantization: str | None = None
    """The dtype of the KV cache that the checkpoint asks for, in vLLM's spelling: `fp8`."""
    ignored_sources: tuple[str, ...] = ()
    """Regular expressions of tensors that a checkpoint may hold and no engine loads."""
    listed: tuple[Weight, ...] | None = None
    """All parameters, of a model whose architecture nobody knows: blocks then say nothing."""
    listed_from: str | None = None
    """Where they are from: `headers`, or `transformers` on the meta device."""
    cache_is_unknown: bool = False
    """Nothing says what the layers keep of a sequence, and nothing was assumed."""
    notes: tuple[str, ...] = ()
    """What a plan has to tell about how this description was made."""
    alias: str | None = None
    """A tensor of the checkpoint that has another name than its source: only plans cope with it."""
    verified_for_sharding: bool = True
    """vLLM's names of the parameters are known, so that rank files can be written."""

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return len(self.layers)

    @property
    def mixers(self) -> tuple[Mixer, ...]:
        """One of each kind, in the order of the layers."""
        return mixers_of(self.layers)

    @property
    def is_recurrent(self) -> bool:
        """Whether a layer keeps a state instead of keys and values."""
        return any(mixer.is_recurrent for mixer in self.mixers)

    @property
    def is_windowed(self) -> bool:
        """Whether attention of a layer sees only the last tokens."""
        return any(mixer.is_windowed for mixer in self.mixers)

    @property
    def is_chunked(self) -> bool:
        """Whether attention of a layer sees only a token's own chunk."""
        return any(mixer.is_chunked for mixer in self.mixers)

    @property
    def is_plain(self) -> bool:
        """A decoder of plain attention and gated MLPs, with names like Llama's.

        Such are executed layer by layer (`runtime.layerwise`) to be calibrated and judged.
        """
        beside = self.towers or self.extras or self.encoder_tokens or self.norm_bias
        beside = beside or self.pooling or self.listed is not None or self.alias is not None
        return not beside and self.names == Names() and all(map(_is_plain, self.layers))


def _is_plain(layer: Layer) -> bool:
    mixer, mlp = layer.mixers[0] if len(layer.mixers) == 1 else None, layer.mlp
    if not isinstance(mixer, Attention) or mlp is None or layer.extras or layer.norms is not None:
        return False
    special = mixer.chunk or mixer.value_dim or mixer.sinks or mixer.output_gate
    if special or mixer.shares_cache or mixer.rope is None or mixer.rope.interleaved:
        return False
    if isinstance(mlp, DenseMLP):
        return mlp.gated
    odd = mlp.shared or mlp.router_bias or mlp.correction_bias or mlp.latent_size
    return mlp.gated and not mlp.names.stacked and not odd
