"""Models whose architecture nobody knows: their weights as a list, and what may be assumed.

The list comes from the headers of a checkpoint, or from transformers' module on the meta device.
What a layer keeps of a sequence no list tells, so that `assumed` has to be asked for, and for a
tensor parallel layout the cut is a guess that `assumed` puts into words.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import lru_cache
from math import prod
from typing import Literal

from tightfit.errors import ConfigError, UnsupportedModelError
from tightfit.model.blocks.attention import Attention
from tightfit.model.blocks.mlp import DenseMLP
from tightfit.model.config import Config
from tightfit.model.layout import Axis, Cut, Part, Stage, Weight
from tightfit.model.sources import Tensor
from tightfit.model.spec import Layer, ModelSpec
from tightfit.units import dtype_bytes, format_bytes

Origin = Literal["headers", "transformers"]

_LAYER = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks)\.(\d+)\.")
_FLOATS = ("BF16", "F16", "F32")
_MATRIX, _STACKED = 2, 3
_KEYS = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
}
_OLDER = {
    "hidden_size": "d_model",
    "num_hidden_layers": "num_layers",
    "max_position_embeddings": "seq_length",
}
_TEXT = ("text_config", "llm_config", "language_config")
_CUT = (
    "nobody knows how its weights are cut: matrices are assumed to be split evenly over the ranks, "
    "and everything else to be whole on each"
)
_STAGES = "weights of no layer are assumed to be on every pipeline stage"


def listed_spec(config: Config, tensors: Mapping[str, Tensor], origin: Origin) -> ModelSpec:
    """A spec whose weights are a list, and whose layers keep nobody knows what.

    Raises:
        ConfigError: a value that is there is impossible.
    """
    nested = next((section for key in _TEXT if (section := config.section(key))), Config({}))
    text = config if nested.raw("hidden_size") is None else nested.completed(config, "")
    text = text.renamed(_KEYS).renamed(_OLDER)
    count = text.integer("num_hidden_layers", default=0, minimum=0, maximum=10_000)
    dtype = text.dtype() if text.has("dtype") or text.has("torch_dtype") else _usual(tensors)
    main = _usual(tensors)
    known = {"headers": "the headers of its files", "transformers": "transformers' own modules"}
    return ModelSpec(
        architecture=config.strings("architectures")[0],
        model_type=config.text("model_type", default=""),
        dtype=dtype,
        hidden_size=text.integer("hidden_size", default=1),
        vocab_size=text.integer("vocab_size", default=1),
        layers=(_layer(text),) * count,
        max_position_embeddings=text.integer("max_position_embeddings", default=2048),
        norm_eps=1e-6,
        listed=tuple(
            _weight(name, tensor.shape, tensor.dtype, main, count)
            for name, tensor in tensors.items()
        ),
        listed_from=origin,
        cache_is_unknown=True,
        notes=(
            f"{config.strings('architectures')[0]} is not modelled: its weights are from "
            f"{known[origin]}, and the activations are a rough estimate",
        ),
        verified_for_sharding=False,
    )


def listed_bytes(spec: ModelSpec) -> int:
    """Bytes of all listed weights, as a checkpoint holds them."""
    return sum(
        dtype_bytes(weight.dtype or spec.dtype, prod(weight.source_shape(weight.parts[0])))
        for weight in spec.listed or ()
    )


@lru_cache(maxsize=16)
def assumed(spec: ModelSpec, *, full_attention: bool, ranks: int = 1, stages: int = 1) -> ModelSpec:
    """The spec as it may be planned, with the assumptions among its notes.

    The same object for the same arguments, so that caches by spec are of use.

    Raises:
        UnsupportedModelError: full attention is not to be assumed, or the config lacks what that
            needs. The message has the size of the weights.
    """
    if not spec.cache_is_unknown:
        return spec
    mixers = [mixer for layer in spec.layers for mixer in layer.mixers]
    size = format_bytes(listed_bytes(spec))
    if not full_attention or not mixers:
        lacking = "" if mixers else ", and config.json does not say how many heads it has"
        raise UnsupportedModelError(
            f"architecture {spec.architecture} is not modelled: its weights take {size} (from "
            f"{spec.listed_from}), but what its layers keep of a sequence is unknown{lacking}",
            hint="--assume-full-attention plans keys and values of every head in every layer"
            if mixers
            else "use an engine's own log, or a model of a known architecture",
        )
    first = mixers[0]
    assert isinstance(first, Attention)
    notes = [
        *spec.notes,
        f"full attention is assumed in each of {spec.num_layers} layers, with "
        f"{first.num_kv_heads} KV heads of {first.head_dim} features",
    ]
    notes += [_CUT] if ranks > 1 else []
    notes += [_STAGES] if stages > 1 else []
    return replace(spec, cache_is_unknown=False, notes=tuple(notes))


def _layer(text: Config) -> Layer:
    """What full attention would be, if the config has heads."""
    hidden_size = text.integer("hidden_size", default=0, minimum=0)
    width = text.integer("intermediate_size", default=4 * hidden_size, minimum=0)
    activation = text.raw("hidden_act", "activation_function")
    mlp = DenseMLP(
        intermediate_size=max(width, 1),
        activation=activation if isinstance(activation, str) else "silu",
    )
    heads = text.integer("num_attention_heads", default=0, minimum=0)
    head_dim = text.integer("head_dim", default=hidden_size // heads if heads else 0, minimum=0)
    if not heads or not head_dim:
        return Layer(mixers=(), mlp=mlp)
    kv_heads = text.integer("num_key_value_heads", default=heads)
    if heads % kv_heads:
        raise ConfigError(
            f"{text.name} has num_attention_heads = {heads}, which is not a multiple of "
            f"num_key_value_heads = {kv_heads}",
            hint="correct the config.json",
        )
    attention = Attention(
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rope=None,
        scale=head_dim**-0.5,
    )
    return Layer(mixers=(attention,), mlp=mlp)


def _usual(tensors: Mapping[str, Tensor]) -> str:
    """The floating dtype of most bytes, which an engine converts to its own."""
    found: Counter[str] = Counter()
    for tensor in tensors.values():
        if tensor.dtype in _FLOATS:
            found[tensor.dtype] += tensor.nbytes
    return found.most_common(1)[0][0] if found else "BF16"


def _weight(name: str, shape: Iterable[int], dtype: str, usual: str, layers: int) -> Weight:
    shape = tuple(shape)
    match = _LAYER.search(name)
    inside = match is not None and int(match[1]) < layers
    where: int | Stage = int(match[1]) if match is not None and inside else Stage.EVERY
    own = None if dtype == usual else dtype
    if len(shape) not in (_MATRIX, _STACKED) or 0 in shape:
        part = Part(source=name, rows=prod(shape))
        return Weight(name=name, parts=(part,), where=where, dtype=own, stored_shape=shape)
    rows, columns = shape[-2:]
    # Padding is how shares that do not divide come out alike.
    axis = Axis(label="the rows of matrices", units=rows, padded=1)
    return Weight(
        name=name,
        parts=(Part(source=name, rows=rows, axis=axis),),
        columns=columns,
        cut=Cut.OUTPUT,
        experts=shape[0] if len(shape) == _STACKED else 0,
        stacked=len(shape) == _STACKED,
        where=where,
        dtype=own,
    )
