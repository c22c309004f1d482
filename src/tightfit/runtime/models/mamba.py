"""Mamba 2: a gated convolution, and a state space whose states are matrices of each head.

With a decay `a = exp(dt * A)` of each head and token, the state is `S = a * S + dt * x B^T` and the
output `S C + D x` (Dao and Gu, "Transformers are SSMs", 2024). Sequences of one token take one such
step, all at once. Longer ones are computed in chunks (SSD, section 6 there): inside a chunk it is
attention with decaying scores, and between chunks only the state is carried, so that a prompt may
also go on in a later step. All of it is in float32, as in transformers' plain code.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from tightfit.errors import LayoutError
from tightfit.model.blocks.mamba import Mamba2
from tightfit.model.cache import StateCache
from tightfit.model.layout import Rank
from tightfit.model.spec import ModelSpec
from tightfit.planner.engines.builtin_states import (
    CHUNK_TOKENS,
    GATE_ELEMENTS,
    SCAN_ELEMENTS,
    STATE_ELEMENTS,
)
from tightfit.runtime.layers import Linear, RowParallelLinear, Weights
from tightfit.runtime.ranks.world import World
from tightfit.runtime.states import LayerStates, Recurrence


class MambaMixer:
    """The heads of a rank, and the groups that share B and C among them.

    Raises:
        LayoutError: a group would have heads on several ranks, and others of them.
    """

    def __init__(
        self,
        spec: ModelSpec,
        mamba: Mamba2,
        weights: Weights,
        name: str,
        rank: Rank,
        world: World,
    ) -> None:
        (cache,) = mamba.caches(rank)
        assert isinstance(cache, StateCache)
        conv, ssm = cache.states
        self.heads, self.head_dim, self.state_size = ssm.shape
        self.inner = self.heads * self.head_dim
        self.channels = conv.shape[-1]
        self.groups = (self.channels - self.inner) // (2 * self.state_size)
        self.world = world
        self.eps = spec.norm_eps
        # Of a group, and of the norm of its outputs. Ranks share the only group, or have their own.
        self.shares_group = mamba.num_groups == 1 and world.tp_size > 1
        self.normalized = mamba.num_heads * mamba.head_dim // mamba.num_groups
        if not self.shares_group and self.inner != self.groups * self.normalized:
            raise LayoutError(
                f"{self.groups} of {mamba.num_groups} groups of Mamba with {self.heads} heads on a "
                "rank: its heads are not those of its groups",
                hint="use a tensor parallel size that divides the groups",
            )
        self.in_proj = Linear(weights, f"{name}.in_proj")
        self.out_proj = RowParallelLinear(weights, f"{name}.out_proj", world)
        self.conv_weight = weights.tensors[f"{name}.conv1d.weight"]
        self.conv_bias = weights.tensors.get(f"{name}.conv1d.bias")
        self.norm = weights.tensors.get(f"{name}.norm.weight")
        self.decay = weights.tensors[f"{name}.A"].view(self.groups, -1)
        self.skip = weights.tensors[f"{name}.D"].float().view(self.groups, -1, 1)
        self.dt_bias = weights.tensors[f"{name}.dt_bias"].float()

    def __call__(self, layer: int, x: Tensor, recurrence: Recurrence) -> Tensor:
        """[tokens, hidden] -> the same; the states of the sequences go on."""
        gate, inputs, dt = self.in_proj(x).split([self.inner, self.channels, self.heads], dim=-1)
        states = recurrence.layers[layer]
        out = torch.empty(len(x), self.inner, dtype=x.dtype, device=x.device)
        decodes = len(recurrence.rows)
        step = max(1, STATE_ELEMENTS // (self.inner * self.state_size))
        for i in range(0, decodes, step):
            some = slice(i, min(i + step, decodes))
            out[some] = self._update(
                inputs[some], dt[some], states, recurrence.rows[some], recurrence.begins[some]
            )
        for prefill in recurrence.prefills:
            tokens = prefill.tokens
            self._scan(out[tokens], inputs[tokens], dt[tokens], states, prefill.row, prefill.begins)
        return self.out_proj(self._gated(out, gate))

    def _update(
        self, inputs: Tensor, dt: Tensor, states: LayerStates, rows: Tensor, begins: Tensor
    ) -> Tensor:
        """One token of each of several sequences: inputs [rows, channels] -> [rows, inner]."""
        window = states.conv.index_select(0, rows).masked_fill_(begins[:, None, None], 0)
        window = torch.cat([window, inputs[:, None]], dim=1)
        states.conv.index_copy_(0, rows, window[:, 1:])
        mixed = (window.float() * self.conv_weight[:, 0].T.float()).sum(dim=1)
        if self.conv_bias is not None:
            mixed += self.conv_bias
        x, b, c = self._parts(F.silu(mixed))
        dt = self._time_steps(dt)
        state = states.ssm.index_select(0, rows).masked_fill_(begins[:, None, None, None], 0)
        grouped = state.unflatten(1, (self.groups, -1))
        grouped *= (dt * self.decay).exp_()[..., None, None]
        grouped.addcmul_((x * dt[..., None])[..., None], b[:, :, None, None])
        states.ssm.index_copy_(0, rows, state)
        y = torch.matmul(grouped, c[:, :, None, :, None]).squeeze(-1)
        return y.addcmul_(x, self.skip).flatten(1)

    def _scan(
        self,
        out: Tensor,
        inputs: Tensor,
        dt: Tensor,
        states: LayerStates,
        row: int,
        begins: bool,
    ) -> None:
        """Many tokens of one sequence: inputs [tokens, channels] -> out [tokens, inner]."""
        history = states.conv[row].new_zeros(states.conv.shape[1:]) if begins else states.conv[row]
        padded = torch.cat([history, inputs])
        states.conv[row] = padded[len(inputs) :]
        mixed = F.conv1d(padded.T[None], self.conv_weight, self.conv_bias, groups=self.channels)
        del padded
        mixed = F.silu(mixed[0].T)
        state = torch.zeros_like(states.ssm[row]) if begins else states.ssm[row].clone()
        state = state.unflatten(0, (self.groups, -1))
        chunks = max(1, SCAN_ELEMENTS // (self.heads * CHUNK_TOKENS**2))
        for i in range(0, len(inputs), chunks * CHUNK_TOKENS):
            some = slice(i, min(i + chunks * CHUNK_TOKENS, len(inputs)))
            x, b, c = self._parts(mixed[some].float())
            y = chunk_scan(x, self._time_steps(dt[some]), self.decay, b, c, state)
            out[some] = y.addcmul_(x, self.skip).flatten(1)
        states.ssm[row] = state.flatten(0, 1)

    def _parts(self, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[rows, channels] -> x [rows, groups, heads, head_dim], B and C [rows, groups, state]."""
        shared = self.groups * self.state_size
        x, b, c = mixed.split([self.inner, shared, shared], dim=-1)
        x = x.unflatten(-1, (self.groups, -1, self.head_dim))
        return x, b.unflatten(-1, (self.groups, -1)), c.unflatten(-1, (self.groups, -1))

    def _time_steps(self, dt: Tensor) -> Tensor:
        """[rows, heads] -> float32 [rows, groups, heads of a group]."""
        return F.softplus(dt + self.dt_bias).unflatten(-1, (self.groups, -1))

    def _gated(self, y: Tensor, gate: Tensor) -> Tensor:
        """`y * silu(gate)`, normalized in each group; y [tokens, inner] is overwritten."""
        step = max(1, GATE_ELEMENTS // self.inner)
        pairs = list(zip(y.split(step), gate.split(step), strict=True))
        if self.norm is None:
            for rows, gates in pairs:
                rows.copy_(_gate(rows, gates))
            return y
        squares = None
        if self.shares_group:
            own = [_gate(*pair).square_().sum(dim=-1, keepdim=True) for pair in pairs]
            squares = self.world.all_reduce(torch.cat(own)).split(step)
        for i, (rows, gates) in enumerate(pairs):
            gated = _gate(rows, gates).unflatten(-1, (self.groups, -1))
            total = gated.square().sum(dim=-1) if squares is None else squares[i]
            gated *= (total / self.normalized + self.eps).rsqrt_()[..., None]
            rows.copy_(gated.flatten(1)).mul_(self.norm)
        return y


def _gate(y: Tensor, gate: Tensor) -> Tensor:
    """In float32."""
    return y.float() * F.silu(gate.float())


def chunk_scan(x: Tensor, dt: Tensor, decay: Tensor, b: Tensor, c: Tensor, state: Tensor) -> Tensor:
    """Outputs of consecutive tokens of one sequence, without D, all in float32.

    Args:
        x: [tokens, groups, heads, head_dim], with the heads of a group.
        dt: [tokens, groups, heads].
        decay: A, negative: [groups, heads].
        b: [tokens, groups, state_size].
        c: like `b`.
        state: [groups, heads, head_dim, state_size] before the first token; overwritten with that
            after the last.

    Returns:
        Like `x`.
    """
    tokens = len(x)
    padding = -tokens % CHUNK_TOKENS
    # A token with dt = 0 changes nothing.
    x, dt, b, c = (
        F.pad(one, (0, 0) * (one.dim() - 1) + (0, padding)).unflatten(0, (-1, CHUNK_TOKENS))
        for one in (x, dt, b, c)
    )
    passed = (dt * decay).cumsum(dim=1).permute(0, 2, 3, 1)
    x = (x * dt[..., None]).permute(0, 2, 3, 1, 4)
    b, c = b.transpose(1, 2)[:, :, None], c.transpose(1, 2)[:, :, None]
    scores = passed[..., :, None] - passed[..., None, :]
    later = torch.ones(CHUNK_TOKENS, CHUNK_TOKENS, dtype=torch.bool, device=x.device).triu_(1)
    scores.masked_fill_(later, float("-inf")).exp_().mul_(c @ b.transpose(-1, -2))
    y = scores @ x
    del scores
    remaining = (passed[..., -1:] - passed).exp_()
    added = (x * remaining[..., None]).transpose(-1, -2) @ b
    before = torch.empty_like(added)
    kept = passed[..., -1].exp()[..., None, None]
    for i in range(len(added)):
        before[i] = state
        state.mul_(kept[i]).add_(added[i])
    y += (c @ before.transpose(-1, -2)).mul_(passed.exp_()[..., None])
    return y.permute(0, 3, 1, 2, 4).flatten(0, 1)[:tokens]
