"""Choosing the next token: greedy, temperature, top-k, top-p.

The noise of a token depends on (seed, request, position) alone, so a request gets the same tokens
whatever else is in its batch. Sampling takes the largest of p / e with exponential e, which draws
from p (the exponential race that vLLM and nano-vllm use), without a cumulative sum per row.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import torch
from torch import Tensor

from tightfit.planner.engines.builtin_memory import SAMPLER_ELEMENTS
from tightfit.runtime.options import SamplingParams

GREEDY_BELOW = 1e-5
"""Logits divided by less overflow, so that is greedy (vLLM's `_SAMPLING_EPS`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleRow:
    """Whose token a row of logits decides: `position` counts from the start of the prompt."""

    params: SamplingParams
    request_id: int
    position: int


def sample(logits: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    """Choose one token per row.

    Args:
        logits: float32 [rows, vocab], overwritten.
        rows: how to sample each row.

    Returns:
        int64 [rows].
    """
    tokens = logits.argmax(dim=-1)
    random = [i for i, row in enumerate(rows) if row.params.temperature >= GREEDY_BELOW]
    step = max(1, SAMPLER_ELEMENTS // logits.shape[-1])
    for i in range(0, len(random), step):
        picked = random[i : i + step]
        chosen = [rows[j] for j in picked]
        index = torch.tensor(picked, device=logits.device)
        tokens[index] = _race(filter_logits(logits[index], chosen), chosen)
    return tokens


def filter_logits(logits: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    """Divide by the temperature, and give -inf to all tokens that top-k and top-p exclude.

    Of equal logits at the edge of top-k or top-p, the lower token ids stay.

    Args:
        logits: float32 [rows, vocab], overwritten.
        rows: how to sample each row.
    """

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, device=logits.device)[:, None]

    logits /= column([row.params.temperature for row in rows])
    if all(row.params.top_k == 0 and row.params.top_p == 1 for row in rows):
        return logits
    values, order = logits.sort(dim=-1, descending=True, stable=True)
    vocab = logits.shape[-1]
    keep = column([row.params.top_k or vocab for row in rows])
    beyond = torch.arange(vocab, device=logits.device) >= keep
    values.masked_fill_(beyond, float("-inf"))
    probabilities = values.softmax(dim=-1)
    # A token stays while the likelier ones before it do not yet make up top_p.
    before = probabilities.cumsum(dim=-1).sub_(probabilities)
    beyond |= before >= column([row.params.top_p for row in rows])
    beyond[:, 0] = False
    return logits.masked_fill_(beyond.scatter(-1, order, beyond), float("-inf"))


def _race(logits: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    probabilities = logits.softmax(dim=-1)
    noise = torch.empty_like(probabilities)
    generator = torch.Generator(device=logits.device)
    for i, row in enumerate(rows):
        generator.manual_seed(_noise_seed(row))
        noise[i].exponential_(generator=generator)
    return probabilities.div_(noise).argmax(dim=-1)


def _noise_seed(row: SampleRow) -> int:
    key = struct.pack("<qqq", row.params.seed, row.request_id, row.position)
    return int.from_bytes(blake2b(key, digest_size=7).digest(), "little")
