"""What the files of a sharded checkpoint call the parameters, per engine and version.

vLLM's `ShardedStateLoader` demands exactly the names of its own state dict, which follow its module
tree and drift between versions. Found by building vLLM's own models without weights and listing
their state: of tensors that share memory only the alphabetically first name is stored, and every
attention layer wants four float32 scalars, although nothing is quantized.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from tightfit.errors import UsageError
from tightfit.model.layout import Rank, RankTensor, on_rank
from tightfit.model.parameters import parameters
from tightfit.model.spec import ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredLayout:
    """The naming of one engine version; `uneven` layouts need an engine that accepts them."""

    name: str
    uneven: bool
    renamed: Mapping[str, str]
    """Regular expression of a parameter -> its name in the file."""
    attention_constants: tuple[str, ...]
    """float32 scalars, all 1.0, beside every attention layer."""


_VLLM_0_32 = StoredLayout(
    name="vllm-0.32",
    uneven=False,
    renamed={
        r"\.experts\.(w13_weight|w2_weight)$": r".experts.routed_experts.\1",
        r"\.mlp\.gate\.weight$": r".mlp.experts.gate.weight",
    },
    attention_constants=("_k_scale", "_prob_scale", "_q_scale", "_v_scale"),
)

LAYOUTS: Mapping[str, StoredLayout] = {
    "vllm-0.32": _VLLM_0_32,
    "builtin": replace(_VLLM_0_32, name="builtin", uneven=True),
}
"""`builtin` has vLLM's names, but heads and widths that do not divide are dealt unevenly."""

DEFAULT_LAYOUT = "vllm-0.32"


def stored_layout(name: str) -> StoredLayout:
    """Find a layout by name.

    Raises:
        UsageError: no such layout.
    """
    if name not in LAYOUTS:
        raise UsageError(f"unknown layout {name!r}", hint="layouts: " + ", ".join(LAYOUTS))
    return LAYOUTS[name]


def rank_tensors(spec: ModelSpec, rank: Rank, layout: StoredLayout) -> tuple[RankTensor, ...]:
    """All tensors of one rank's files, in the order of the model.

    Raises:
        LayoutError: the model cannot be cut that way.
    """
    found: list[RankTensor] = []
    for weight in parameters(spec):
        if not on_rank(weight, rank, spec.num_layers):
            continue
        tensor = weight.rank_tensor(rank, spec.dtype)
        found.append(replace(tensor, name=_stored_name(weight.name, spec, rank, layout)))
        if weight.name.endswith(".qkv_proj.weight"):
            module = weight.name.removesuffix(".qkv_proj.weight")
            found += (
                RankTensor(
                    name=f"{module}.attn.{name}", parameter=None, dtype="F32", shape=(), fill=1.0
                )
                for name in layout.attention_constants
            )
    return tuple(found)


def _stored_name(name: str, spec: ModelSpec, rank: Rank, layout: StoredLayout) -> str:
    if name == "model.embed_tokens.weight" and spec.tie_word_embeddings:
        last = rank.pp_rank == rank.parallel.pipeline_parallel_size - 1
        return "lm_head.weight" if spec.has_lm_head_module and last else name
    for pattern, replacement in layout.renamed.items():
        name = re.sub(pattern, replacement, name)
    return name
