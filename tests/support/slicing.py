"""An oracle for rank files: what a rank should hold, sliced with torch from the whole tensors.

It knows the architectures by their checkpoint names alone, and shares no code with tightfit.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

Tensors = dict[str, torch.Tensor]


def read_rank(directory: Path, rank: int) -> Tensors:
    """All tensors of a rank's files; a tensor may be in one part only."""
    found: Tensors = {}
    for path in sorted(directory.glob(f"model-rank-{rank}-part-*.safetensors")):
        part = load_file(path)
        assert not part.keys() & found.keys()
        found |= part
    return found


def expected_rank(model: Path, rank: int, size: int) -> Tensors:
    """The tensors of one rank of `size`, in vLLM's names."""
    config = json.loads((model / "config.json").read_bytes())
    source: Tensors = {}
    for path in model.glob("*.safetensors"):
        source |= load_file(path)
    return _Slicer(config, source, rank, size).run()


def bounds(count: int, rank: int, size: int) -> tuple[int, int]:
    return count * rank // size, count * (rank + 1) // size


class _Slicer:
    def __init__(self, config: dict[str, Any], source: Tensors, rank: int, size: int) -> None:
        self.source, self.rank, self.size = source, rank, size
        self.heads = config["num_attention_heads"]
        self.kv_heads = config.get("num_key_value_heads") or self.heads
        self.head_dim = config.get("head_dim") or config["hidden_size"] // self.heads
        self.layers = config["num_hidden_layers"]
        self.tied = "lm_head.weight" not in source
        self.has_head = config["architectures"][0] != "Gemma2ForCausalLM"

    def run(self) -> Tensors:
        found = {"model.norm.weight": self.source["model.norm.weight"]}
        table = self.table("model.embed_tokens.weight")
        if self.tied:
            found["lm_head.weight" if self.has_head else "model.embed_tokens.weight"] = table
        else:
            found["model.embed_tokens.weight"] = table
            found["lm_head.weight"] = self.table("lm_head.weight")
        for i in range(self.layers):
            for name, tensor in self.layer(f"model.layers.{i}.").items():
                found[f"model.layers.{i}.{name}"] = tensor
        return found

    def table(self, name: str) -> torch.Tensor:
        whole = self.source[name]
        rows = (whole.shape[0] + 63) // 64 * 64
        padded = torch.zeros(rows, whole.shape[1], dtype=whole.dtype)
        padded[: whole.shape[0]] = whole
        return self.share(padded, 0)

    def share(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        first, last = bounds(tensor.shape[dim], self.rank, self.size)
        return tensor.narrow(dim, first, last - first).contiguous()

    def head_ranges(self) -> tuple[slice, slice]:
        """Features of the rank's query heads and KV heads."""
        groups = self.heads // self.kv_heads
        if self.size <= self.kv_heads:
            first, last = bounds(self.kv_heads, self.rank, self.size)
            q_first, q_last = first * groups, last * groups
        else:
            first = self.rank * self.kv_heads // self.size
            last = first + 1
            q_first, q_last = bounds(self.heads, self.rank, self.size)
        dim = self.head_dim
        return slice(q_first * dim, q_last * dim), slice(first * dim, last * dim)

    def layer(self, prefix: str) -> Tensors:
        old = {n.removeprefix(prefix): t for n, t in self.source.items() if n.startswith(prefix)}
        new = {n: t for n, t in old.items() if "norm" in n}
        self.attention(old, new)
        if any(".experts." in name for name in old):
            self.experts(old, new)
        else:
            self.mlp(old, new)
        for name in ("_k_scale", "_prob_scale", "_q_scale", "_v_scale"):
            new[f"self_attn.attn.{name}"] = torch.tensor(1.0)
        return new

    def attention(self, old: Tensors, new: Tensors) -> None:
        q, kv = self.head_ranges()
        for kind in ("weight", "bias"):
            if f"self_attn.qkv_proj.{kind}" in old:
                sizes = [self.heads * self.head_dim, *[self.kv_heads * self.head_dim] * 2]
                members = old[f"self_attn.qkv_proj.{kind}"].split(sizes)
            elif f"self_attn.q_proj.{kind}" in old:
                members = [old[f"self_attn.{n}_proj.{kind}"] for n in "qkv"]
            else:
                continue
            rows = [members[0][q], members[1][kv], members[2][kv]]
            new[f"self_attn.qkv_proj.{kind}"] = torch.cat(rows)
        new["self_attn.o_proj.weight"] = old["self_attn.o_proj.weight"][:, q]
        if "self_attn.o_proj.bias" in old:
            new["self_attn.o_proj.bias"] = old["self_attn.o_proj.bias"]

    def mlp(self, old: Tensors, new: Tensors) -> None:
        for kind in ("weight", "bias"):
            if f"mlp.gate_up_proj.{kind}" in old:
                gate, up = old[f"mlp.gate_up_proj.{kind}"].chunk(2)
            elif f"mlp.gate_proj.{kind}" in old:
                gate, up = old[f"mlp.gate_proj.{kind}"], old[f"mlp.up_proj.{kind}"]
            else:
                continue
            new[f"mlp.gate_up_proj.{kind}"] = torch.cat([self.share(gate, 0), self.share(up, 0)])
        new["mlp.down_proj.weight"] = self.share(old["mlp.down_proj.weight"], 1)
        if "mlp.down_proj.bias" in old:
            new["mlp.down_proj.bias"] = old["mlp.down_proj.bias"]

    def experts(self, old: Tensors, new: Tensors) -> None:
        mixtral = "block_sparse_moe.gate.weight" in old
        module = "block_sparse_moe" if mixtral else "mlp"
        names = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
        router = f"{module}.gate.weight" if mixtral else f"{module}.experts.gate.weight"
        new[router] = old[f"{module}.gate.weight"]
        gate, up, down = (
            [
                old[f"{module}.experts.{e}.{name}.weight"]
                for e in range(old[f"{module}.gate.weight"].shape[0])
            ]
            for name in names
        )
        pairs = [
            torch.cat([self.share(g, 0), self.share(u, 0)]) for g, u in zip(gate, up, strict=True)
        ]
        routed = f"{module}.experts.routed_experts"
        new[f"{routed}.w13_weight"] = torch.stack(pairs)
        new[f"{routed}.w2_weight"] = torch.stack([self.share(d, 1) for d in down])
