"""The decoder: embedding, layers of attention and MLP, logits. One class for every family.

Temporaries are freed as soon as they are used up, and there are few: the activation formulas of
`planner.engines.builtin_memory` are read off this file, so change them together.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from tightfit.model.blocks.attention import Attention, QKNorm, Rope, head_axes
from tightfit.model.blocks.mlp import DenseMLP, MoE
from tightfit.model.layout import Rank
from tightfit.model.parameters import NORMS, parameters
from tightfit.model.spec import Layer, ModelSpec, NormStyle
from tightfit.planner.engines.builtin_memory import NORM_ROWS
from tightfit.runtime.attention import Attend
from tightfit.runtime.dist import World
from tightfit.runtime.layers import (
    Linear,
    RMSNorm,
    RowParallelLinear,
    VocabEmbedding,
    Weights,
    activation,
)
from tightfit.runtime.models.moe import MoELayer
from tightfit.runtime.rope import rotate_

RopeTables = Mapping[Rope, Tensor]
"""[max_model_len, rotary_dim] for every kind of rope in the model."""


class SelfAttention:
    """Fused projection, optional norms of queries and keys, rope, attention, output projection."""

    def __init__(
        self,
        spec: ModelSpec,
        attention: Attention,
        weights: Weights,
        name: str,
        rank: Rank,
        world: World,
    ) -> None:
        queries, keys = (axis.span(rank)[1] for axis in head_axes(attention))
        self.head_dim = attention.head_dim
        self.heads = queries // self.head_dim
        self.kv_heads = keys // self.head_dim
        self.qkv_proj = Linear(weights, f"{name}.qkv_proj")
        self.o_proj = RowParallelLinear(weights, f"{name}.o_proj", world)
        self.qk_norm: QKNormHead | QKNormFull | None = None
        if attention.qk_norm is QKNorm.HEAD:
            self.qk_norm = QKNormHead(spec, weights, name)
        elif attention.qk_norm is QKNorm.FULL:
            self.qk_norm = QKNormFull(spec, attention, weights, name, rank, world)

    def __call__(self, layer: int, x: Tensor, rope_rows: Tensor, attend: Attend) -> Tensor:
        """[tokens, hidden] -> the same."""
        qkv = self.qkv_proj(x).unflatten(-1, (-1, self.head_dim))
        q, k, v = qkv.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        if self.qk_norm is not None:
            self.qk_norm(q, k)
        rotate_(qkv[:, : self.heads + self.kv_heads], rope_rows)
        return self.o_proj(attend(layer, q, k, v))


class QKNormHead:
    """Each head of queries and keys normalized by itself, in place."""

    def __init__(self, spec: ModelSpec, weights: Weights, name: str) -> None:
        self.q_norm, self.k_norm = (
            RMSNorm(
                weights.tensors[f"{name}.{norm}.weight"],
                eps=spec.norm_eps,
                unit_offset=spec.norm_unit_offset,
            )
            for norm in ("q_norm", "k_norm")
        )

    def __call__(self, q: Tensor, k: Tensor) -> None:
        """[tokens, heads, head_dim] each."""
        q.copy_(self.q_norm(q))
        k.copy_(self.k_norm(k))


class QKNormFull:
    """All heads of all ranks normalized together, in place: ranks add their sums of squares.

    The weights are whole on every rank. KV heads that several ranks hold must count once, so each
    of those ranks gives a part of their squares.
    """

    def __init__(
        self,
        spec: ModelSpec,
        attention: Attention,
        weights: Weights,
        name: str,
        rank: Rank,
        world: World,
    ) -> None:
        self.eps = spec.norm_eps
        self.world = world
        axes = head_axes(attention)
        self.weights: list[Tensor] = []
        for norm, axis in zip(("q_norm", "k_norm"), axes, strict=True):
            first, rows = axis.span(rank)
            weight = weights.tensors[f"{name}.{norm}.weight"][first : first + rows]
            self.weights.append(weight.unflatten(0, (-1, attention.head_dim)))
        copies = max(1, world.size // attention.num_kv_heads)
        self.features = (axes[0].rows, axes[1].rows * copies)

    def __call__(self, q: Tensor, k: Tensor) -> None:
        """[tokens, heads, head_dim] each."""
        squares = [
            torch.cat([rows.float().square().sum(dim=(1, 2)) for rows in x.split(NORM_ROWS)])
            for x in (q, k)
        ]
        totals = self.world.all_reduce(torch.stack(squares))
        for x, total, weight, features in zip(
            (q, k), totals, self.weights, self.features, strict=True
        ):
            scale = (total / features + self.eps).rsqrt_()[:, None, None]
            for rows, factor in zip(x.split(NORM_ROWS), scale.split(NORM_ROWS), strict=True):
                rows.copy_(rows.float().mul_(factor).mul_(weight))


class MLP:
    """`down(activation(gate(x)) * up(x))`."""

    def __init__(self, mlp: DenseMLP, weights: Weights, name: str, world: World) -> None:
        self.gate_up_proj = Linear(weights, f"{name}.gate_up_proj")
        self.down_proj = RowParallelLinear(weights, f"{name}.down_proj", world)
        self.activation = activation(mlp.activation)

    def __call__(self, x: Tensor) -> Tensor:
        """[tokens, hidden] -> the same."""
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        inner = self.activation(gate).mul_(up)
        del gate, up
        return self.down_proj(inner)


class DecoderLayer:
    """Attention and MLP, each with a norm before it, after it, or both."""

    def __init__(
        self, spec: ModelSpec, layer: Layer, weights: Weights, index: int, rank: Rank, world: World
    ) -> None:
        name = f"model.layers.{index}"
        self.index = index
        assert layer.attention.rope is not None
        assert layer.mlp is not None
        self.rope = layer.attention.rope
        self.residual_scale = spec.residual_scale
        self.self_attn = SelfAttention(
            spec, layer.attention, weights, f"{name}.self_attn", rank, world
        )
        if isinstance(layer.mlp, MoE):
            module = f"{name}.{layer.mlp.module}"
            self.mlp: MLP | MoELayer = MoELayer(layer.mlp, weights, module, world)
        else:
            self.mlp = MLP(layer.mlp, weights, f"{name}.mlp", world)
        norms = iter(
            RMSNorm(
                weights.tensors[f"{name}.{norm}.weight"],
                eps=spec.norm_eps,
                unit_offset=spec.norm_unit_offset,
            )
            for norm in NORMS[spec.norm_style]
        )
        before = spec.norm_style is not NormStyle.POST
        after = spec.norm_style is not NormStyle.PRE
        self.before_attention = next(norms) if before else None
        self.after_attention = next(norms) if after else None
        self.before_mlp = next(norms) if before else None
        self.after_mlp = next(norms) if after else None

    def __call__(self, hidden: Tensor, rope_tables: Mapping[Rope, Tensor], attend: Attend) -> None:
        """Add to the residual stream [tokens, hidden] in place."""
        x = self.before_attention(hidden) if self.before_attention else hidden
        x = self.self_attn(self.index, x, rope_tables[self.rope], attend)
        if self.after_attention:
            x = self.after_attention(x)
        hidden.add_(x, alpha=self.residual_scale)
        x = self.before_mlp(hidden) if self.before_mlp else hidden
        x = self.mlp(x)
        if self.after_mlp:
            x = self.after_mlp(x)
        hidden.add_(x, alpha=self.residual_scale)


class Decoder:
    """A whole model of one rank.

    Raises:
        UnsupportedModelError: the model uses an activation that is not modelled.
    """

    def __init__(
        self, spec: ModelSpec, weights: Weights, rope_tables: RopeTables, rank: Rank, world: World
    ) -> None:
        self.spec = spec
        self.world = world
        self.rope_tables = rope_tables
        table = next(weight for weight in parameters(spec) if weight.name == _EMBEDDING)
        axis = table.parts[0].axis
        assert axis is not None
        ranks = rank.parallel.ranks()
        self.vocab_shares = [axis.span(other)[1] for other in ranks]
        embedding = weights.tensors[_EMBEDDING]
        self.embed_tokens = VocabEmbedding(embedding, axis.span(rank)[0], world)
        tied = spec.tie_word_embeddings
        self.lm_head = weights.matrix(_EMBEDDING if tied else "lm_head.weight")
        self.norm = RMSNorm(
            weights.tensors["model.norm.weight"],
            eps=spec.norm_eps,
            unit_offset=spec.norm_unit_offset,
        )
        self.layers = [
            DecoderLayer(spec, layer, weights, i, rank, world)
            for i, layer in enumerate(spec.layers)
        ]

    def forward(self, token_ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """The residual stream after the last layer, not yet normalized: [tokens, hidden]."""
        hidden = self.embed_tokens(token_ids)
        if self.spec.embedding_scale != 1.0:
            # transformers multiplies by a scalar of the model's dtype.
            hidden *= torch.tensor(self.spec.embedding_scale, dtype=hidden.dtype)
        rope_rows = {rope: table[positions] for rope, table in self.rope_tables.items()}
        for layer in self.layers:
            layer(hidden, rope_rows, attend)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor | None:
        """Scores of the whole vocabulary, without its padding.

        Args:
            hidden: rows of what `forward` gave, [rows, hidden].

        Returns:
            float32 [rows, vocab_size] on rank 0, elsewhere None.
        """
        local = self.lm_head(self.norm(hidden))
        shares = self.world.gather_columns(local, self.vocab_shares)
        if shares is None:
            return None
        vocab = self.spec.vocab_size
        logits = torch.empty(len(hidden), vocab, dtype=torch.float32, device=hidden.device)
        first = 0
        for share in shares:
            width = min(share.shape[1], vocab - first)
            if width > 0:
                logits[:, first : first + width] = share[:, :width]
            first += share.shape[1]
        if self.spec.logits_scale != 1.0:
            logits *= self.spec.logits_scale
        if (cap := self.spec.logits_softcap) is not None:
            logits.div_(cap).tanh_().mul_(cap)
        return logits


_EMBEDDING = "model.embed_tokens.weight"
