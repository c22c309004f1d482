"""The decoder: embedding, layers of attention and MLP, logits. One class for every family.

Temporaries are freed as soon as they are used up, and there are few: the activation formulas of
`planner.engines.builtin_memory` are read off this file, so change them together.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from tightfit.model.blocks.attention import Attention, Rope
from tightfit.model.blocks.latent_attention import LatentAttention
from tightfit.model.blocks.mamba import Mamba2
from tightfit.model.blocks.mlp import DenseMLP, MoE
from tightfit.model.layout import Rank
from tightfit.model.parameters import layer_norms, plain_parameters, stage_layers
from tightfit.model.spec import Layer, ModelSpec, NormStyle
from tightfit.runtime.attention.base import Attend
from tightfit.runtime.attention.kv_cache import attending_layers
from tightfit.runtime.layers import PlainMatrix, VocabEmbedding, Weights
from tightfit.runtime.models.latent import LatentSelfAttention
from tightfit.runtime.models.mamba import MambaMixer
from tightfit.runtime.models.mlp import MLP
from tightfit.runtime.models.moe import MoELayer
from tightfit.runtime.models.norms import Norm, make_norm
from tightfit.runtime.models.self_attention import SelfAttention
from tightfit.runtime.ranks.world import World
from tightfit.runtime.rope import Rotation, rotation
from tightfit.runtime.sampling import Vocabulary
from tightfit.runtime.states import Recurrence

RopeTables = Mapping[Rope, Tensor]
"""[max_model_len, rotary_dim] for every kind of rope in the model."""


class DecoderLayer:
    """Attention or a recurrence, then the MLP, each with a norm before it, after it, or both."""

    def __init__(
        self, spec: ModelSpec, layer: Layer, weights: Weights, index: int, rank: Rank, world: World
    ) -> None:
        name = f"{spec.names.layers}.{index}"
        (mixer,) = layer.mixers
        assert isinstance(mixer, Attention | LatentAttention | Mamba2)
        self.index = index
        self.residual_scale = spec.residual_scale
        self.rope = None if isinstance(mixer, Mamba2) else mixer.rope
        module = f"{name}.{mixer.module}"
        self.mixer: SelfAttention | LatentSelfAttention | MambaMixer
        if isinstance(mixer, Attention):
            self.mixer = SelfAttention(spec, mixer, weights, module, rank, world)
        elif isinstance(mixer, Mamba2):
            self.mixer = MambaMixer(spec, mixer, weights, module, rank, world)
        else:
            self.mixer = LatentSelfAttention(spec, mixer, weights, module, rank, world)
        self.cache = attending_layers(spec, rank).index(index) if not mixer.is_recurrent else -1
        self.mlp = _mlp(layer, weights, name, world)
        self._take_norms(spec, _norms(spec, layer, weights, name))

    def _take_norms(self, spec: ModelSpec, norms: list[Norm]) -> None:
        """Norms in the order in which they are applied: two or four."""
        given = iter(norms)
        before = len(norms) > 2 or spec.norm_style is not NormStyle.POST
        after = len(norms) > 2 or not before
        self.before_attention = next(given) if before else None
        self.after_attention = next(given) if after else None
        self.before_mlp = next(given) if before else None
        self.after_mlp = next(given) if after else None

    def _mixed(
        self,
        x: Tensor,
        rotations: Mapping[Rope, Rotation],
        attend: Attend,
        recurrence: Recurrence | None,
    ) -> Tensor:
        if isinstance(self.mixer, MambaMixer):
            assert recurrence is not None
            return self.mixer(self.index, x, recurrence)
        rotation = None if self.rope is None else rotations[self.rope]
        return self.mixer(self.cache, x, rotation, attend)

    def __call__(
        self,
        stream: "Residual",
        rotations: Mapping[Rope, Rotation],
        attend: Attend,
        recurrence: Recurrence | None = None,
    ) -> None:
        """Add to the residual stream."""
        x = stream.normalized(self.before_attention)
        x = self._mixed(x, rotations, attend, recurrence)
        if self.after_attention:
            x = self.after_attention(x)
        stream.add(x, self.residual_scale)
        del x
        x = stream.normalized(self.before_mlp)
        x = self.mlp(x)
        if self.after_mlp:
            x = self.after_mlp(x)
        stream.add(x, self.residual_scale)


class ParallelLayer(DecoderLayer):
    """Attention and MLP beside each other, with a norm for both or one for each."""

    def _take_norms(self, spec: ModelSpec, norms: list[Norm]) -> None:
        self.norms = norms

    def __call__(
        self,
        stream: "Residual",
        rotations: Mapping[Rope, Rotation],
        attend: Attend,
        recurrence: Recurrence | None = None,
    ) -> None:
        """Add to the residual stream."""
        x = stream.normalized(self.norms[0])
        y = x if len(self.norms) == 1 else stream.normalized(self.norms[1])
        x = self._mixed(x, rotations, attend, recurrence)
        stream.add(x.add_(self.mlp(y)), self.residual_scale)


def decoder_layer(
    spec: ModelSpec, weights: Weights, index: int, rank: Rank, world: World
) -> DecoderLayer:
    """One layer of a model, by its number."""
    kind = ParallelLayer if spec.parallel_residual else DecoderLayer
    return kind(spec, spec.layers[index], weights, index, rank, world)


def _mlp(layer: Layer, weights: Weights, name: str, world: World) -> MLP | MoELayer:
    if isinstance(layer.mlp, MoE):
        beside = [extra for extra in layer.extras if isinstance(extra, DenseMLP)]
        return MoELayer(layer.mlp, beside, weights, name, world)
    assert layer.mlp is not None
    return MLP(layer.mlp, weights, name, world)


def _norms(spec: ModelSpec, layer: Layer, weights: Weights, name: str) -> list[Norm]:
    """In the order in which they are applied; two of a model whose norms have no parameters."""
    names = layer_norms(spec, layer) if spec.norm_weights else ("", "")
    return [make_norm(spec, weights.tensors, f"{name}.{norm}") for norm in names]


class Residual:
    """The residual stream, `hidden` [tokens, hidden], to which layers add in place.

    What is to be added waits for the norm that follows, since one kernel can do both.
    """

    def __init__(self, hidden: Tensor) -> None:
        self._hidden = hidden
        self._delta: Tensor | None = None
        self._scale = 1.0

    def add(self, delta: Tensor, scale: float) -> None:
        """`hidden += scale * delta`, by the time somebody looks."""
        assert self._delta is None
        self._delta, self._scale = delta, scale

    def normalized(self, norm: Norm | None) -> Tensor:
        """A norm of it, or without a norm itself: [tokens, hidden]."""
        if norm is None:
            return self.hidden
        delta, self._delta = self._delta, None
        if delta is None:
            return norm(self._hidden)
        return norm.after_adding(delta, self._hidden, self._scale)

    @property
    def hidden(self) -> Tensor:
        """All that was added so far."""
        if self._delta is not None:
            self._hidden.add_(self._delta, alpha=self._scale)
            self._delta = None
        return self._hidden


class Decoder:
    """The model of one rank: all of it, or a stage of the pipeline.

    Raises:
        UnsupportedModelError: the model uses an activation that is not modelled.
    """

    implementation = "tightfit's decoder"

    def __init__(
        self, spec: ModelSpec, weights: Weights, rope_tables: RopeTables, rank: Rank, world: World
    ) -> None:
        self.spec = spec
        self.world = world
        self.rope_tables = rope_tables
        names = spec.names
        name = f"{names.embedding}.weight"
        table = next(weight for weight in plain_parameters(spec) if weight.name == name)
        axis = table.parts[0].axis
        assert axis is not None
        stage = [other for other in rank.parallel.ranks() if other.pp_rank == rank.pp_rank]
        self.vocabulary = Vocabulary(
            size=spec.vocab_size,
            widths=[axis.span(other)[1] for other in stage],
            scale=spec.logits_scale,
            softcap=spec.logits_softcap,
        )
        if rank.is_first_stage:
            embedding = weights.tensors[name]
            self.embed_tokens = VocabEmbedding(embedding, axis.span(rank)[0], world)
            self.positions = None if spec.positions is None else weights.tensors[spec.positions]
        if rank.is_last_stage:
            # A tied table stays as it is: rows of it are looked up too.
            tied = spec.tie_word_embeddings
            self.lm_head = (
                PlainMatrix(weights.tensors[name])
                if tied
                else weights.matrix(f"{names.head}.weight")
            )
            self.head_bias = weights.tensors.get(f"{names.head}.bias")
            self.norm = make_norm(spec, weights.tensors, names.norm)
        self.layers = [
            decoder_layer(spec, weights, i, rank, world) for i in stage_layers(spec, rank)
        ]

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        attend: Attend,
        recurrence: Recurrence | None = None,
        hidden: Tensor | None = None,
    ) -> Tensor:
        """The residual stream after the last layer, not yet normalized: [tokens, hidden].

        `hidden` is that of the stage before, to which this one adds in place.
        """
        if hidden is None:
            hidden = self._embedded(token_ids, positions)
        rotations = {
            rope: rotation(rope, table, positions) for rope, table in self.rope_tables.items()
        }
        stream = Residual(hidden)
        for layer in self.layers:
            layer(stream, rotations, attend, recurrence)
        return stream.hidden

    def _embedded(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        hidden = self.embed_tokens(token_ids)
        if self.spec.embedding_scale != 1.0:
            # transformers multiplies by a scalar of the model's dtype.
            hidden *= torch.tensor(self.spec.embedding_scale, dtype=hidden.dtype)
        if self.positions is not None:
            hidden += self.positions[positions + self.spec.first_position]
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """What the sampler makes scores of, as `vocabulary` says: of the rank's tokens.

        Only the last stage has them.

        Args:
            hidden: rows of what `forward` gave, [rows, hidden].

        Returns:
            [rows, tokens], with padding.
        """
        return self.lm_head(self.norm(hidden), self.head_bias)
