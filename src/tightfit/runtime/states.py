"""The states of recurrent layers, which a sequence keeps instead of keys and values.

There is a row for each sequence that may run, and one more for the places of a CUDA graph that
have none. A sequence that begins finds whatever the last one of its row has left, and takes zeros
for it: nothing is ever cleared.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tightfit.model.cache import StateCache
from tightfit.model.layout import Rank
from tightfit.model.parameters import stage_layers
from tightfit.model.spec import ModelSpec
from tightfit.planner.engines.builtin_states import STATE_DTYPES, state_rows
from tightfit.runtime.batch import Batch
from tightfit.runtime.loading.files import TORCH_DTYPES


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerStates:
    """`conv`: the last inputs of the convolution, [rows, kernel - 1, channels].

    `ssm`: float32 [rows, heads, head_dim, state_size].
    """

    conv: Tensor
    ssm: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefill:
    """Several tokens of one sequence: where they are in the batch, and its row."""

    tokens: slice
    row: int
    begins: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Recurrence:
    """One step's use of the states: of `num_decodes` sequences of one token, and of others.

    `rows` are those of the former, int64 [num_decodes], and `begins` says which of them have no
    state yet.
    """

    layers: dict[int, LayerStates]
    rows: Tensor
    begins: Tensor
    prefills: tuple[Prefill, ...]


class States:
    """The states of all recurrent layers of a rank, by layer."""

    def __init__(
        self, spec: ModelSpec, rank: Rank, *, max_num_seqs: int, dtype: str, device: torch.device
    ) -> None:
        self.layers: dict[int, LayerStates] = {}
        rows = state_rows(max_num_seqs)
        for i in stage_layers(spec, rank):
            for mixer in spec.layers[i].mixers:
                for cache in mixer.caches(rank):
                    if isinstance(cache, StateCache):
                        arrays = {
                            state.role: torch.zeros(
                                rows,
                                *state.shape,
                                dtype=TORCH_DTYPES[STATE_DTYPES.get(state.role, dtype)],
                                device=device,
                            ).fill_(0)
                            for state in cache.states
                        }
                        self.layers[i] = LayerStates(conv=arrays["conv"], ssm=arrays["ssm"])

    def step(self, batch: Batch) -> Recurrence:
        """Look at the batch once."""
        rows = batch.rows
        if rows is None:
            decodes = batch.spans[: batch.num_decodes]
            rows = torch.tensor([span.row for span in decodes], dtype=torch.int64)
        return Recurrence(
            layers=self.layers,
            rows=rows[: batch.num_decodes],
            begins=batch.positions[: batch.num_decodes] == 0,
            prefills=tuple(_prefills(batch)),
        )


def _prefills(batch: Batch) -> Iterator[Prefill]:
    first = 0
    for span in batch.spans:
        if span.count > 1:
            tokens = slice(first, first + span.count)
            yield Prefill(tokens=tokens, row=span.row, begins=span.start == 0)
        first += span.count
