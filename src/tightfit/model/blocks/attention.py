"""Attention with grouped KV heads: one fused projection, its norms, the output projection."""

from collections.abc import Iterator

from tightfit.model.blocks.linear import linear, stack, vector
from tightfit.model.layout import Axis, Cut, Part, Weight
from tightfit.model.spec import Attention, ModelSpec, QKNorm


def head_axes(attention: Attention) -> tuple[Axis, Axis]:
    """How query heads and KV heads go to ranks; an element is one feature of a head."""
    kv_heads = attention.num_kv_heads
    queries = Axis(
        label="num_attention_heads",
        units=attention.num_heads,
        unit_rows=attention.head_dim,
        groups=kv_heads,
    )
    keys = Axis(
        label="num_key_value_heads",
        units=kv_heads,
        unit_rows=attention.head_dim,
        groups=kv_heads,
        replicated=True,
    )
    return queries, keys


def attention_weights(
    spec: ModelSpec, attention: Attention, prefix: str, i: int
) -> Iterator[Weight]:
    """The attention of layer `i`, whose module is called `prefix`."""
    queries, keys = head_axes(attention)
    parts = stack(
        prefix,
        "qkv_proj" if spec.fused_in_checkpoint else None,
        (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)),
    )
    yield from linear(
        f"{prefix}.qkv_proj",
        parts,
        columns=spec.hidden_size,
        cut=Cut.OUTPUT,
        bias=attention.qkv_bias,
        where=i,
    )
    yield from linear(
        f"{prefix}.o_proj",
        lambda kind: (Part(source=f"{prefix}.o_proj.{kind}", rows=spec.hidden_size),),
        columns=queries.rows,
        cut=Cut.INPUT,
        input_axis=queries,
        bias=attention.output_bias,
        where=i,
    )
    if attention.qk_norm is not QKNorm.NONE:
        full = attention.qk_norm is QKNorm.FULL
        for name, axis in (("q_norm", queries), ("k_norm", keys)):
            size = axis.rows if full else attention.head_dim
            yield vector(f"{prefix}.{name}.weight", size, i)
