"""Rotary position embedding: tables of cosines and sines for every kind of scaling.

The formulas are those of transformers' `modeling_rope_utils.py`. Two kinds depend on the length of
a sequence there, which a cache of rotated keys cannot follow; they depend on max_model_len here, as
longrope does in vLLM (`Phi3LongRoPEScaledRotaryEmbedding`): beyond the original context all
positions use the long factors (or the stretched base), within it none does.
"""

import math

import torch
from torch import Tensor

from tightfit.model.blocks.attention import Rope


def rope_table(rope: Rope, max_model_len: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Cosines, then sines, of every position: [max_model_len, rotary_dim]."""
    frequencies, factor = inverse_frequencies(rope, max_model_len)
    angles = torch.outer(torch.arange(max_model_len, dtype=torch.float32), frequencies)
    table = torch.empty(max_model_len, rope.rotary_dim, dtype=dtype, device=device)
    half = rope.rotary_dim // 2
    table[:, :half] = angles.cos().mul_(factor)
    table[:, half:] = angles.sin().mul_(factor)
    return table


def rotate_(x: Tensor, rows: Tensor) -> None:
    """Rotate the first features of every head in place; the halves of a head are the pairs.

    Args:
        x: [tokens, heads, head_dim], any strides.
        rows: the table's rows of the tokens' positions, [tokens, rotary_dim].
    """
    half = rows.shape[-1] // 2
    cos, sin = rows[:, None, :half], rows[:, None, half:]
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
        case "yarn":
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
