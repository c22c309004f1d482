"""Run a decoder one layer at a time from its checkpoint: memory is for one layer and activations.

So models larger than memory can be calibrated and judged. The layers are those of `models.decoder`,
without ranks and without a cache: every sequence is computed whole. Linear layers can be watched,
their inputs replaced and their weights overwritten, by the names that the checkpoint has for them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from tightfit.checkpoint.checkpoint import Checkpoint
from tightfit.checkpoint.describe import describe, require_weights
from tightfit.errors import CheckpointError, UnsupportedModelError
from tightfit.model.blocks.attention import Rope
from tightfit.model.layout import Rank, RankTensor, Weight
from tightfit.model.parameters import plain_parameters
from tightfit.model.quantization.recipe import Recipe
from tightfit.model.spec import ropes
from tightfit.runtime.attention.base import AttentionLayer, attention_layer
from tightfit.runtime.attention.sdpa import attend_alone
from tightfit.runtime.layers import Matrix, RMSNorm, Weights
from tightfit.runtime.loading.loader import NO_DTYPES, load_checkpoint
from tightfit.runtime.loading.parameters import rank_parameters, require_executable
from tightfit.runtime.models.decoder import DecoderLayer, Residual, decoder_layer
from tightfit.runtime.quantized import rank_weights
from tightfit.runtime.ranks.world import World
from tightfit.runtime.rope import Rotation, rope_table

OnInput = Callable[[tuple[str, ...], Tensor], Tensor | None]
"""Gets the modules that share an input, such as q_proj, k_proj and v_proj, and that input [tokens,
inputs]; of experts, the tokens that the router sends there. What it returns, if anything, takes the
place of the input."""
OnCache = Callable[[Tensor, Tensor], None]

_TABLE_ELEMENTS = 2**24
"""Elements of the embedding and of the output layer that are in memory at a time."""
_CPU = torch.device("cpu")
_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_RANK = Rank()
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(slots=True)
class LoadedLayer:
    """One layer with its weights.

    `parameters` are the tensors of the layer by their names in the checkpoint, views of what the
    layer computes with: writing to one changes the next call. `linears` are those of them that are
    weights of linear layers `[outputs, inputs]`, by module (`model.layers.0.self_attn.q_proj`), and
    without the router of a mixture of experts. What is quantized is in neither.
    """

    parameters: dict[str, Tensor]
    linears: dict[str, Tensor]
    _layer: DecoderLayer
    _attention: AttentionLayer
    _model: "LayerwiseModel"
    _watched: "list[_Watched]"
    _on_cache: "OnCache | None" = None

    def watch(self, on_input: OnInput | None, on_cache: OnCache | None = None) -> None:
        """Call `on_input` before every linear layer from now on; None stops it.

        `on_cache` gets keys and values as a cache would hold them: [tokens, kv_heads, head_dim].
        """
        for matrix in self._watched:
            matrix.on_input = on_input
        self._on_cache = on_cache

    @torch.no_grad()
    def __call__(self, hidden: Tensor) -> Tensor:
        """The residual stream after the layer, a new tensor: [samples, tokens, hidden]."""
        samples, tokens, _ = hidden.shape
        out = hidden.flatten(0, 1).clone()
        rotations = self._model.rotations(samples, tokens)
        stream = Residual(out)
        attend = _Whole(self._attention, samples, self._on_cache)
        self._layer(stream, rotations, attend)
        return stream.hidden.view(hidden.shape)


class _Whole:
    """Attention of sequences of equal length that are computed whole: `Attend` without a cache."""

    def __init__(self, attention: AttentionLayer, samples: int, on_cache: "OnCache | None") -> None:
        self._attention = attention
        self._samples = samples
        self._on_cache = on_cache

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self._on_cache is not None:
            self._on_cache(k, v)
        return self._attend(q, k, v).flatten(1)

    def latent(self, layer: int, q: Tensor, latent: Tensor) -> Tensor:
        keys = latent[:, None]
        values = keys[..., : self._attention.value_dim]
        if self._on_cache is not None:
            self._on_cache(keys, values)
        return self._attend(q, keys, values)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = q.new_empty(len(q), self._attention.heads, self._attention.value_dim)
        by_sample = [x.unflatten(0, (self._samples, -1)) for x in (out, q, k, v)]
        for result, queries, keys, values in zip(*by_sample, strict=True):
            grouped, queries = (x.unflatten(1, (keys.shape[1], -1)) for x in (result, queries))
            attend_alone(grouped, queries, keys, values, self._attention)
        return out


class LayerwiseModel:
    """A decoder of a checkpoint, of which little is in memory.

    Args:
        checkpoint: anywhere; one whose tensors are computed when they are read is fine as well.
        dtype: what to compute in.

    Raises:
        CheckpointError: there are no weights, or not those that config.json says.
        UnsupportedModelError: the runtime cannot execute this architecture.
    """

    def __init__(self, checkpoint: Checkpoint, *, dtype: torch.dtype = torch.float32) -> None:
        require_weights(checkpoint, "evaluate")
        self.checkpoint = checkpoint
        self.dtype = dtype
        self.spec = describe(checkpoint).spec
        require_executable(self.spec)
        if self.spec.is_recurrent:
            raise UnsupportedModelError(
                f"{self.spec.architecture} cannot be run layer by layer: it has recurrent layers",
                hint="use a scheme that needs no calibration",
            )
        if not self.spec.is_plain:
            raise UnsupportedModelError(
                f"the built-in runtime cannot execute {self.spec.architecture} layer by layer",
                hint="it can for plain decoders, such as Llama, Qwen3 or Mixtral",
            )
        self._weights = plain_parameters(self.spec)
        self._rotations: tuple[tuple[int, int], Mapping[Rope, Rotation]] | None = None

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return self.spec.num_layers

    @torch.no_grad()
    def embed(self, token_ids: Tensor) -> Tensor:
        """int64 [samples, tokens] -> the residual stream before the first layer.

        Raises:
            CheckpointError: the embedding has no row for a token.
        """
        (table,) = (w for w in self._weights if w.name == _EMBEDDING)
        (part,) = table.parts
        strange = token_ids[(token_ids < 0) | (token_ids >= part.rows)]
        if len(strange):
            raise CheckpointError(
                f"the token {int(strange[0])} has no row in the embedding of "
                f"{self.checkpoint.name}, which has {part.rows}",
                hint="its tokenizer belongs to another model, or was changed",
            )
        hidden = torch.empty(*token_ids.shape, self.spec.hidden_size, dtype=self.dtype)
        for first, rows in self._table(_EMBEDDING, token_ids.unique()):
            here = (token_ids >= first) & (token_ids < first + len(rows))
            hidden[here] = F.embedding(token_ids[here] - first, rows)
        if self.spec.embedding_scale != 1.0:
            hidden *= torch.tensor(self.spec.embedding_scale, dtype=self.dtype)
        return hidden

    def layer(self, index: int) -> LoadedLayer:
        """Load a layer; it is gone when nobody has it any more."""
        mine = [weight for weight in self._weights if weight.where == index]
        weights = self._load(mine)
        watched: dict[str, list[_Watched]] = {}
        parameters: dict[str, Tensor] = {}
        linears: dict[str, Tensor] = {}
        for weight in mine:
            if weight.linear:
                matrices = (
                    weights.experts if weight.experts else lambda name: [weights.matrix(name)]
                )
                watched[weight.name] = [
                    _Watched(matrix, tuple(dict.fromkeys(_modules(weight, expert))))
                    for expert, matrix in enumerate(matrices(weight.name))
                ]
            if weight.name in weights.tensors:
                views = dict(_views(weight, weights.tensors[weight.name]))
                parameters |= views
                if weight.linear:
                    linears |= {n.removesuffix(".weight"): view for n, view in views.items()}
        layer = decoder_layer(
            self.spec, Weights(tensors=weights.tensors, matrices=watched), index, _RANK, World()
        )
        return LoadedLayer(
            parameters=parameters,
            linears=linears,
            _layer=layer,
            _attention=attention_layer(
                self.spec.layers[index].mixers[0],
                _RANK,
                weights.tensors,
                f"{self.spec.names.layers}.{index}",
            ),
            _model=self,
            _watched=[one for matrices in watched.values() for one in matrices],
        )

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the whole vocabulary, float32 [samples, tokens, vocab_size].

        That is large: `log_likelihood` needs only some of it at a time.
        """
        return torch.cat([logits for _, logits in self._logits(hidden)], dim=-1)

    @torch.no_grad()
    def log_likelihood(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Of each target given the tokens up to it.

        Args:
            hidden: after the last layer, [samples, tokens, hidden].
            targets: the tokens that follow, int64 [samples, tokens].

        Returns:
            float32 [samples, tokens], natural logarithms.
        """
        total = torch.full(targets.shape, float("-inf"))
        chosen = torch.zeros(targets.shape)
        for first, logits in self._logits(hidden):
            total = torch.logaddexp(total, logits.logsumexp(dim=-1))
            here = (targets >= first) & (targets < first + logits.shape[-1])
            chosen[here] = logits[here].gather(-1, (targets[here] - first)[:, None])[:, 0]
        return chosen - total

    def rotations(self, samples: int, tokens: int) -> Mapping[Rope, Rotation]:
        """Of sequences end to end, for every kind of rope; made once for a shape."""
        if self._rotations is None or self._rotations[0] != (samples, tokens):
            found = {
                rope: Rotation(
                    rows=rope_table(rope, tokens, self.dtype, _CPU).repeat(samples, 1),
                    interleaved=rope.interleaved,
                )
                for rope in ropes(self.spec.layers)
            }
            self._rotations = (samples, tokens), found
        return self._rotations[1]

    def _logits(self, hidden: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Scores of some tokens of the vocabulary, and the first of them."""
        spec = self.spec
        (weight,) = (w for w in self._weights if w.name == "model.norm.weight")
        scale = self._load([weight]).tensors[weight.name]
        normalize = RMSNorm(scale, eps=spec.norm_eps, unit_offset=spec.norm_unit_offset)
        hidden = normalize(hidden.flatten(0, 1)).view(hidden.shape)
        for first, logits in self._products(hidden):
            if spec.logits_scale != 1.0:
                logits *= spec.logits_scale
            if (cap := spec.logits_softcap) is not None:
                logits.div_(cap).tanh_().mul_(cap)
            yield first, logits

    def _products(self, hidden: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Float32 products with rows of the output layer, some of them at a time."""
        name = _EMBEDDING if self.spec.tie_word_embeddings else _HEAD
        (head,) = (w for w in self._weights if w.name == name)
        recipe = self.spec.quantization
        if isinstance(recipe, Recipe) and recipe.forms(head) is not None:
            matrix = self._load([head]).matrix(name)
            rows = matrix(hidden.flatten(0, 1)).unflatten(0, hidden.shape[:2])
            yield 0, rows[..., : self.spec.vocab_size].float()
            return
        for first, weight in self._table(name):
            yield first, F.linear(hidden, weight).float()

    def _table(self, name: str, wanted: Tensor | None = None) -> Iterator[tuple[int, Tensor]]:
        """Some rows at a time of the embedding or the output layer, and the first of them.

        Where `wanted` is given (int64, sorted), rows among which there is none of it are left out.
        """
        (weight,) = (w for w in self._weights if w.name == name)
        (part,) = weight.parts
        assert weight.columns is not None
        step = max(1, _TABLE_ELEMENTS // weight.columns)
        (whole,) = weight.rank_tensor(_RANK, self.spec.dtype).pieces
        for first in range(0, part.rows, step):
            count = min(step, part.rows - first)
            if wanted is not None and not ((wanted >= first) & (wanted < first + count)).any():
                continue
            shape = (count, weight.columns)
            piece = replace(whole, start=(first, 0), shape=shape, at=(0, 0))
            tensor = RankTensor(
                name=name, parameter=name, dtype=self.spec.dtype, shape=shape, pieces=(piece,)
            )
            yield first, self._read([tensor])[name]

    def _load(self, weights: list[Weight]) -> Weights:
        needed = rank_parameters(self.spec, weights, _RANK, _NAMES[self.dtype])
        tensors = needed.settled(self.checkpoint.tensors())
        return rank_weights(needed, self._read(tensors, needed.dtypes))

    def _read(
        self, tensors: Sequence[RankTensor], dtypes: Mapping[str, torch.dtype] = NO_DTYPES
    ) -> dict[str, Tensor]:
        return load_checkpoint(
            self.checkpoint, tensors, dtype=self.dtype, device=_CPU, dtypes=dtypes
        )


class _Watched:
    """A matrix that shows its inputs."""

    def __init__(self, matrix: Matrix, modules: tuple[str, ...]) -> None:
        self.matrix = matrix
        self.modules = modules
        self.on_input: OnInput | None = None

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if self.on_input is not None:
            replaced = self.on_input(self.modules, x)
            x = x if replaced is None else replaced
        return self.matrix(x, bias)

    def exact(self) -> Matrix:
        """The matrix itself: what is decoded of it is no input to show."""
        return self.matrix.exact()


def _modules(weight: Weight, expert: int) -> Iterator[str]:
    for part in weight.parts:
        yield part.source.format(expert=expert).removesuffix(".weight")


def _views(weight: Weight, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The parts of a parameter by their names in the checkpoint, whose rows are adjacent."""
    for expert, rows in enumerate(tensor if weight.experts else tensor[None]):
        spans: dict[str, list[int]] = {}
        first = 0
        for part in weight.parts:
            span = spans.setdefault(part.source.format(expert=expert), [first, first])
            span[1] = first = first + part.rows
        for name, (start, stop) in spans.items():
            yield name, rows[start:stop]
