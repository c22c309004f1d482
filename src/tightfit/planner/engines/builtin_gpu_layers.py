"""What a layer of the built-in runtime needs on a GPU while it works, beside the residual stream.

The formulas are read off `runtime.models`. Letters are those of `builtin_cuda`. What a quantized
matrix needs while it is used is there with what else is there then.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from tightfit.model.blocks.latent_attention import LatentAttention
from tightfit.model.blocks.mamba import Mamba2
from tightfit.model.blocks.mlp import DenseMLP, MoE
from tightfit.model.layout import Rank
from tightfit.model.parameters import plain_parameters, stage_layers
from tightfit.model.quantization.recipe import Recipe
from tightfit.model.spec import Layer, ModelSpec
from tightfit.planner.engines.builtin_layers import Stages, absorbed_stages, routing_bytes
from tightfit.planner.engines.builtin_quantized import expert_bytes, gpu_workspaces
from tightfit.planner.engines.builtin_states import mamba_stages


def gpu_stages(
    spec: ModelSpec, rank: Rank, b: int, tokens: int, seqs: int
) -> Iterator[tuple[str, int]]:
    """What is there at once in each kind of layer: how it comes about, and bytes."""
    step = _Step(
        spec=spec,
        rank=rank,
        b=b,
        tokens=tokens,
        seqs=seqs,
        shapes={weight.name: weight.rank_shape(rank) for weight in plain_parameters(spec)},
        workspaces=gpu_workspaces(spec, rank, b, tokens),
    )
    kinds: dict[Layer, int] = {}
    for index in stage_layers(spec, rank):
        kinds.setdefault(spec.layers[index], index)
    for layer, index in kinds.items():
        yield from step.mixer(layer, index)
        yield from step.mlps(layer, index)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    """A forward pass of a rank."""

    spec: ModelSpec
    rank: Rank
    b: int
    tokens: int
    seqs: int
    shapes: Mapping[str, tuple[int, ...]]
    """What a rank has of each parameter."""
    workspaces: Mapping[str, int]
    """What quantized matrices need, by their names within a layer."""

    def mixer(self, layer: Layer, index: int) -> Iterator[tuple[str, int]]:
        """Attention, or what is in its place."""
        mixer, hidden = layer.mixers[0], self.spec.hidden_size
        if isinstance(mixer, Mamba2):
            stages = mamba_stages(self.spec, mixer, self.rank, self.b, self.tokens, self.seqs)
            yield from self._with_any(stages, mixer.module)
        elif isinstance(mixer, LatentAttention):
            stages = absorbed_stages(hidden, mixer, self.rank, self.b, self.tokens)
            yield from self._with_any(stages, mixer.module)
        else:
            module = layer.attention.module
            qkv = self._shape(index, f"{module}.qkv_proj")[-2]
            out = self._shape(index, f"{module}.o_proj")[-1]
            yield self._with(
                f"{module}.qkv_proj",
                f"queries, keys and values (H + Q + K + V) x T x b with Q + K + V = {qkv}",
                hidden + qkv,
            )
            yield self._with(
                f"{module}.o_proj",
                f"attention (2H + Q + K + V + O) x T x b with Q + K + V = {qkv}, O = {out}",
                2 * hidden + qkv + out,
            )

    def mlps(self, layer: Layer, index: int) -> Iterator[tuple[str, int]]:
        """The MLP, or experts and the MLPs beside them."""
        moe = layer.mlp
        if isinstance(moe, DenseMLP):
            yield from self._mlp(moe, moe.module, index)
        if not isinstance(moe, MoE):
            return
        yield from self._with_any(self._experts(moe, index), f"{moe.module}.experts")
        shared = {f"{moe.module}.{moe.shared.module}": moe.shared} if moe.shared else {}
        extras = {one.module: one for one in layer.extras if isinstance(one, DenseMLP)}
        beside = self.tokens * self.spec.hidden_size * self.b
        for module, mlp in (shared | extras).items():
            for name, size in self._mlp(mlp, module, index):
                yield f"{mlp.module}, beside H x T x b of experts, {name}", size + beside

    def _mlp(self, mlp: DenseMLP, module: str, index: int) -> Iterator[tuple[str, int]]:
        module = f"{module}." if module else ""
        up, down = ("gate_up_proj", "down_proj") if mlp.gated else (mlp.up, mlp.down)
        hidden, inner = self.spec.hidden_size, self._shape(index, module + down)[-1]
        made = 2 if mlp.gated else 1
        first = "(H + 2I)" if mlp.gated else "(H + I)"
        yield self._with(
            module + up,
            f"first projection {first} x T x b with I = {inner}",
            hidden + made * inner,
        )
        yield self._with(
            "", f"MLP (H + {made + 1}I) x T x b with I = {inner}", hidden + (made + 1) * inner
        )
        yield self._with(
            module + down,
            f"down projection (2H + I) x T x b with I = {inner}",
            2 * hidden + inner,
        )

    def _experts(self, moe: MoE, index: int) -> Stages:
        """Inputs and outputs of the layer, scores of the router, and what experts work with."""
        hidden, recipe = self.spec.hidden_size, self.spec.quantization
        name = f"{self.spec.names.layers}.{index}.{moe.module}.experts.w13_weight"
        inner = self.shapes[name][-2] // 2
        rounds = isinstance(recipe, Recipe) and any(
            recipe.inputs(weight) is not None
            for weight in plain_parameters(self.spec)
            if weight.experts
        )
        working = expert_bytes(
            self.tokens,
            num_experts=moe.num_experts,
            top_k=moe.top_k,
            hidden=hidden,
            inner=inner,
            b=self.b,
            rounds=rounds,
        )
        routing = routing_bytes(moe, hidden, self.b, self.tokens)
        return {
            f"experts (2H + routing) x T x b, and {inner} features of each assignment": (
                2 * self.tokens * hidden * self.b + routing + working
            )
        }

    def _with(self, matrix: str, name: str, features: int) -> tuple[str, int]:
        """A stage of so many features of each token, in which a matrix is used."""
        needed = self.workspaces.get(f"{matrix}.weight", 0)
        return _named(name, needed), features * self.tokens * self.b + needed

    def _with_any(self, stages: Stages, module: str) -> Iterator[tuple[str, int]]:
        """Stages during which any matrix of a module may be used."""
        mine = [size for name, size in self.workspaces.items() if name.startswith(f"{module}.")]
        needed = max(mine, default=0)
        for name, size in stages.items():
            yield _named(name, needed), size + needed

    def _shape(self, index: int, matrix: str) -> tuple[int, ...]:
        return self.shapes[f"{self.spec.names.layers}.{index}.{matrix}.weight"]


def _named(name: str, needed: int) -> str:
    return f"{name} + {needed} for its quantized matrix" if needed else name
