"""Rotary position embedding: tables of cosines and sines for every kind of scaling.

The formulas are those of transformers' `modeling_rope_utils.py`. Two kinds depend on the length of
a sequence there, which a cache of rotated keys cannot follow; they depend on max_model_len here, as
longrope does in vLLM (`Phi3LongRoPEScaledRotaryEmbedding`): beyond the original context all
positions use the long factors (or the stretched base), within it none does.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tightfit.model.blocks.attention import Rope
from tightfit.runtime.loading.files import TORCH_DTYPES


def rope_table(rope: Rope, max_model_len: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Cosines, then sines, of every position: [max_model_len, rotary_dim].

    They are of `dtype`, unless the rope has one of its own.
    """
    dtype = dtype if rope.dtype is None else TORCH_DTYPES[rope.dtype]
    frequencies, factor = inverse_frequencies(rope, max_model_len)
    angles = torch.outer(torch.arange(max_model_len, dtype=torch.float32), frequencies)
    table = torch.empty(max_model_len, rope.rotary_dim, dtype=dtype, device=device)
    half = rope.rotary_dim // 2
    table[:, :half] = angles.cos().mul_(factor)
    table[:, half:] = angles.sin().mul_(factor)
    return table


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotation:
    """How the heads of a step's tokens are rotated.

    `rows` are a table's rows of the tokens' positions, [tokens, rotary_dim]. Where `positions`,
    int64 [tokens], are given, they are the whole table, of which a kernel looks up the rows.
    """

    rows: Tensor
    positions: Tensor | None = None
    interleaved: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadNorms:
    """How the heads of queries and keys are normalized before they are rotated.

    The weights are [head_dim], one for all heads, or [heads, head_dim]. Each head is normalized by
    itself, or with `squares`, float32 [2, tokens], all heads of a token together: these are the
    sums of squares of `features` features, of queries and of keys.
    """

    q_weight: Tensor
    k_weight: Tensor
    eps: float
    unit_offset: bool = False
    squares: Tensor | None = None
    features: tuple[int, int] = (1, 1)


def rotation(rope: Rope, table: Tensor, positions: Tensor) -> Rotation:
    """That of tokens at `positions`; on a CPU the table's rows are gathered once for all layers."""
    if table.is_cuda:
        return Rotation(rows=table, positions=positions, interleaved=rope.interleaved)
    return Rotation(rows=table[positions], interleaved=rope.interleaved)


def rotate_(
    x: Tensor, rotation: Rotation | None, *, q_heads: int = 0, norms: HeadNorms | None = None
) -> None:
    """Rotate the first features of every head in place, if there is a rotation.

    Args:
        x: [tokens, heads, head_dim], any strides.
        rotation: of the tokens.
        q_heads: how many of the heads are those of queries, if there are norms.
        norms: on a GPU, norms of the heads of queries and keys, which the same kernel applies.
    """
    if x.is_cuda:
        from tightfit.runtime.kernels import rotary

        rotary.rotate_(x, rotation, q_heads=q_heads, norms=norms)
        return
    assert norms is None
    if rotation is None:
        return
    rows = rotation.rows
    half = rows.shape[-1] // 2
    cos, sin = rows[:, None, :half], rows[:, None, half:]
    if rotation.interleaved:
        first, second = x[..., 0 : 2 * half : 2], x[..., 1 : 2 * half : 2]
    else:
        first, second = x[..., :half], x[..., half : 2 * half]
    rotated = torch.addcmul(first * cos, second, sin, value=-1)
    second.mul_(cos).addcmul_(first, sin)
    first.copy_(rotated)


def inverse_frequencies(rope: Rope, max_model_len: int) -> tuple[Tensor, float]:
    """Radians per position, float32 [rotary_dim / 2], and what cosines and sines are scaled by."""
    scaling = rope.scaling or {}
    plain = _powers(rope.theta, rope.rotary_dim).reciprocal()
    match scaling.get("rope_type", "default"):
        case "default":
            return plain, 1.0
        case "linear":
            return plain / scaling["factor"], 1.0
        case "dynamic":
            return _dynamic(rope, max_model_len), 1.0
        case "llama3":
            return _llama3(rope, plain), 1.0
        case "yarn" | "deepseek_yarn" | "deepseek_llama_scaling":
            return _yarn(rope, plain)
        case "longrope":
            return _longrope(rope, max_model_len)
        case kind:
            raise AssertionError(f"rope type {kind}")


def _powers(theta: float, rotary_dim: int) -> Tensor:
    return theta ** (torch.arange(0, rotary_dim, 2, dtype=torch.int64).float() / rotary_dim)


def _context_factor(rope: Rope) -> float:
    """How much longer the context is than that of the first training."""
    scaling = rope.scaling or {}
    factor = scaling.get("factor")
    if factor is None:
        factor = rope.max_position_embeddings / scaling["original_max_position_embeddings"]
    return float(factor)


def _dynamic(rope: Rope, max_model_len: int) -> Tensor:
    original = rope.max_position_embeddings
    factor, dim = _context_factor(rope), rope.rotary_dim
    length = max(max_model_len, original)
    stretch = (factor * length / original) - (factor - 1)
    return _powers(rope.theta * stretch ** (dim / (dim - 2)), dim).reciprocal()


def _llama3(rope: Rope, plain: Tensor) -> Tensor:
    scaling = rope.scaling or {}
    factor, original = scaling["factor"], scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = original * plain / (2 * math.pi)
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - smooth) * plain / factor + smooth * plain


def _yarn(rope: Rope, plain: Tensor) -> tuple[Tensor, float]:
    scaling = rope.scaling or {}
    factor, dim = _context_factor(rope), rope.rotary_dim
    original = scaling["original_max_position_embeddings"]

    def mscale(scale: float = 1.0) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    def dimension(turns: float) -> float:
        """The feature that turns that often in the original context."""
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    attention_factor = scaling.get("attention_factor")
    if attention_factor is None:
        one, all_dims = scaling.get("mscale"), scaling.get("mscale_all_dim")
        attention_factor = mscale(one) / mscale(all_dims) if one and all_dims else mscale()
    low = dimension(scaling.get("beta_fast") or 32)
    high = dimension(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    span = (high - low) or 0.001
    interpolated = ((torch.arange(dim // 2, dtype=torch.float32) - low) / span).clamp(0, 1)
    return plain / factor * interpolated + plain * (1 - interpolated), float(attention_factor)


def _longrope(rope: Rope, max_model_len: int) -> tuple[Tensor, float]:
    scaling = rope.scaling or {}
    original = scaling["original_max_position_embeddings"]
    factors = scaling["long_factor" if max_model_len > original else "short_factor"]
    attention_factor = scaling.get("attention_factor")
    if attention_factor is None:
        factor = _context_factor(rope)
        stretch = math.log(factor) / math.log(original) if factor > 1 else 0.0
        attention_factor = math.sqrt(1 + stretch)
    frequencies = _powers(rope.theta, rope.rotary_dim) * torch.tensor(factors)
    return frequencies.reciprocal(), float(attention_factor)
