"""A plain vision transformer: patches, positions, alike layers. CLIP, SigLIP, InternViT, Qwen-VL.

Layers are made of the decoder's own blocks, `Attention` and `DenseMLP`, with the names that the
checkpoint uses, for vLLM cuts them the same way (`mm_encoder_tp_mode="weights"`): QKV and the first
linear layers by output, the others by input. Everything else is whole on every rank, and vLLM
builds towers on every pipeline stage.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod

from tightfit.model.blocks.attention import Attention
from tightfit.model.blocks.base import Place
from tightfit.model.blocks.linear import norm, replicated, vector
from tightfit.model.blocks.mlp import DenseMLP
from tightfit.model.layout import Axis, Cut, Part, Stage, Weight

WHERE = Stage.EVERY
"""vLLM's towers ignore pipeline parallelism (`models/interfaces.py: _mark_tower_model`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionLayers:
    """The layers of an encoder, all alike; a layer is `{prefix}.{i}`."""

    prefix: str
    num_layers: int
    hidden_size: int
    attention: Attention
    mlp: DenseMLP
    norms: tuple[str, ...] = ("layer_norm1", "layer_norm2")
    norm_bias: bool = True
    vectors: tuple[str, ...] = ()
    """Parameters of hidden_size features, such as the scales of a layer: InternViT."""
    whole_unless_heads_divide: bool = False
    """vLLM replicates the layers when their heads cannot be dealt: MoonViT."""

    def weights(self) -> Iterator[Weight]:
        """Every layer's parameters."""
        for i in range(self.num_layers):
            yield from self.layer(i)

    def layer(self, index: int) -> Iterator[Weight]:
        """The parameters of one layer."""
        place = Place(prefix=f"{self.prefix}.{index}", where=WHERE, hidden_size=self.hidden_size)
        divisor = self.attention.num_heads if self.whole_unless_heads_divide else None
        for block in (self.attention, self.mlp):
            for weight in block.weights(place):
                yield weight if divisor is None else whole_unless(weight, divisor)
        for name in self.norms:
            yield from norm(f"{place.prefix}.{name}", self.hidden_size, WHERE, bias=self.norm_bias)
        for name in self.vectors:
            yield vector(f"{place.prefix}.{name}", self.hidden_size, WHERE)


def vision_attention(num_heads: int, head_dim: int, **changes: object) -> Attention:
    """Attention of an encoder: as many KV heads as query heads, with biases unless said."""
    fields: dict[str, object] = {
        "num_heads": num_heads,
        "num_kv_heads": num_heads,
        "head_dim": head_dim,
        "rope": None,
        "scale": head_dim**-0.5,
        "qkv_bias": True,
        "output_bias": True,
    }
    return Attention(**{**fields, **changes})  # type: ignore[arg-type]


def vision_mlp(intermediate_size: int, activation: str, **changes: object) -> DenseMLP:
    """The two linear layers `fc1` and `fc2`, with biases, unless said."""
    fields: dict[str, object] = {
        "intermediate_size": intermediate_size,
        "activation": activation,
        "bias": True,
        "gated": False,
        "up": "fc1",
        "down": "fc2",
    }
    return DenseMLP(**{**fields, **changes})  # type: ignore[arg-type]


def parameter(name: str, *shape: int, dtype: str | None = None) -> Weight:
    """A parameter of any shape, whole on every rank: positions, class tokens."""
    return Weight(
        name=name,
        parts=(Part(source=name, rows=prod(shape[:-1]) if len(shape) > 1 else shape[0]),),
        columns=shape[-1] if len(shape) > 1 else None,
        where=WHERE,
        dtype=dtype,
        stored_shape=shape if len(shape) > 2 else None,
    )


def convolution(name: str, *, rows: int, kernel: tuple[int, ...], bias: bool) -> Iterator[Weight]:
    """A convolution with `rows` outputs; its weight is `[rows, *kernel]` in the checkpoint."""
    yield (
        parameter(f"{name}.weight", rows, *kernel)
        if len(kernel) == 1
        else Weight(
            name=f"{name}.weight",
            parts=(Part(source=f"{name}.weight", rows=rows),),
            columns=prod(kernel),
            where=WHERE,
            stored_shape=(rows, *kernel),
        )
    )
    if bias:
        yield vector(f"{name}.bias", rows, WHERE)


def plain_linear(name: str, *, rows: int, columns: int, bias: bool = True) -> Iterator[Weight]:
    """A `torch.nn.Linear`, which vLLM neither cuts nor quantizes."""
    yield parameter(f"{name}.weight", rows, columns)
    if bias:
        yield vector(f"{name}.bias", rows, WHERE)


def pooling_head(prefix: str, hidden_size: int, intermediate_size: int) -> Iterator[Weight]:
    """SigLIP's attention pooling: a learned query, torch's own attention, a norm, an MLP."""
    yield parameter(f"{prefix}.probe", 1, 1, hidden_size)
    inner = f"{prefix}.attention"
    yield parameter(f"{inner}.in_proj_weight", 3 * hidden_size, hidden_size)
    yield vector(f"{inner}.in_proj_bias", 3 * hidden_size, WHERE)
    yield from replicated(
        f"{inner}.out_proj", rows=hidden_size, columns=hidden_size, where=WHERE, bias=True
    )
    yield from norm(f"{prefix}.layernorm", hidden_size, WHERE, bias=True)
    place = Place(prefix=prefix, where=WHERE, hidden_size=hidden_size)
    yield from vision_mlp(intermediate_size, "gelu").weights(place)


def whole_unless(weight: Weight, divisor: int) -> Weight:
    """The weight, whole on every rank unless the number of ranks divides `divisor`."""

    def fall_back(axis: Axis | None) -> Axis | None:
        return axis and replace(axis, whole_unless=divisor)

    parts = tuple(replace(part, axis=fall_back(part.axis)) for part in weight.parts)
    return replace(weight, parts=parts, input_axis=fall_back(weight.input_axis))


def uncut(weight: Weight) -> Weight:
    """The weight, whole on every rank: `mm_encoder_tp_mode="data"`, or a plain `nn.Linear`."""
    parts = tuple(replace(part, axis=None) for part in weight.parts)
    return replace(weight, cut=Cut.NONE, parts=parts, input_axis=None)


def apart(weight: Weight) -> Iterator[Weight]:
    """The parts of a weight as plain `nn.Linear`s, as transformers' own modules have them."""
    for part in uncut(weight).parts:
        if part.rows:
            yield replace(uncut(weight), name=part.source, parts=(part,))
