"""`ModelSpec`: the hyperparameters of a model, normalized, whatever its config calls them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any


class NormStyle(Enum):
    """Where a decoder layer normalizes."""

    PRE = "pre"
    """Before attention and before the MLP: `input_layernorm`, `post_attention_layernorm`."""
    POST = "post"
    """After each, before the residual is added: OLMo 2."""
    SANDWICH = "sandwich"
    """Before and after each: Gemma 2 and 3."""


class QKNorm(Enum):
    """Whether queries and keys are normalized, and over what."""

    NONE = "none"
    HEAD = "head"
    """Each head by itself, one weight of head_dim: Qwen3, Gemma 3."""
    FULL = "full"
    """All heads together, a weight per feature: OLMo 2. Not separable by rank."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """Rotary position embedding: base, rotated features, and the scaling as its config gives it."""

    theta: float
    rotary_dim: int
    scaling: Mapping[str, Any] | None = field(default=None, hash=False)
    """`rope_type` and its factors, or None for the plain kind."""
    max_position_embeddings: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """Multi-head attention with grouped KV heads, full or sliding."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: Rope
    scale: float
    """What scores are multiplied by, usually head_dim ** -0.5."""
    window: int | None = None
    """Tokens that a sliding layer sees, the current one included; None sees all."""
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: QKNorm = QKNorm.NONE
    softcap: float | None = None
    """Scores become `softcap * tanh(scores / softcap)`."""

    @property
    def kv_elements_per_token(self) -> int:
        """Elements of keys and values that one token needs in this layer, on all ranks."""
        return 2 * self.num_kv_heads * self.head_dim


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseMLP:
    """A gated MLP: `down(activation(gate(x)) * up(x))`."""

    intermediate_size: int
    activation: str
    bias: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class MoE:
    """A router and gated experts, of which every token uses `top_k`."""

    num_experts: int
    top_k: int
    intermediate_size: int
    activation: str
    renormalize: bool
    """Whether the weights of the chosen experts are made to sum to one."""
    module: str
    """The name of the module inside a layer: `mlp` or `block_sparse_moe`."""
    gate_up_down: tuple[str, str, str]
    """The checkpoint's names of an expert's three matrices."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One decoder layer. Layers that are alike share one object."""

    attention: Attention
    mlp: DenseMLP | MoE


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockQuantization:
    """DeepSeek-style fp8: e4m3 weights with one float32 scale per block of rows and columns."""

    block_rows: int
    block_columns: int
    ignored: tuple[str, ...]
    """Modules that stay in the model's dtype."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A decoder-only language model.

    `dtype` is the checkpoint's, in safetensors' spelling. The defaults of the scalar factors are
    those of a plain Llama.
    """

    architecture: str
    model_type: str
    dtype: str
    hidden_size: int
    vocab_size: int
    layers: tuple[Layer, ...]
    max_position_embeddings: int
    norm_eps: float
    norm_style: NormStyle = NormStyle.PRE
    norm_unit_offset: bool = False
    """Norms multiply by `1 + weight`: Gemma."""
    tie_word_embeddings: bool = False
    fused_in_checkpoint: bool = False
    """The checkpoint already holds `qkv_proj` and `gate_up_proj`: Phi-3."""
    has_lm_head_module: bool = True
    """vLLM's class has an `lm_head` even when it is tied; Gemma 2 has not."""
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logits_scale: float = 1.0
    logits_softcap: float | None = None
    quantization: BlockQuantization | None = None

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return len(self.layers)
