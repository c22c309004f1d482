"""Choosing the next token: greedy, temperature, top-k, top-p.

The noise of a token is a hash of (seed, position, token id), so a request with a seed gets the same
tokens whatever else is in its batch, on whatever device, and however many ranks share the
vocabulary. The largest of `logit / temperature + Gumbel noise` is a draw from the softmax, so every
rank looks for the best of its own tokens, and only the best ones are compared.

A row's filters are brought down to one bound: the last token that they keep when tokens are sorted
by logit, and equal ones by id. So a token knows by itself whether it takes part.
"""

import struct
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import accumulate

import torch
from torch import Tensor

from tightfit.planner.engines.builtin_memory import GATHERED_ELEMENTS, SAMPLER_ELEMENTS
from tightfit.runtime.options import SamplingParams
from tightfit.runtime.ranks.world import World

GREEDY_BELOW = 1e-5
"""Logits divided by less overflow, so that is greedy (vLLM's `_SAMPLING_EPS`)."""

_LARGEST = 1e30

LAST_TOKEN = 2**31 - 1
"""No token id is larger."""


@dataclass(slots=True)
class SampleRow:
    """Whose token a row of logits decides: `position` counts from the start of the prompt."""

    # Like spans: hundreds in a step, and a frozen dataclass takes long to create.
    params: SamplingParams
    position: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingRows:
    """How the rows of a step are sampled, on the device.

    `temperature` is float32 and 0 where a row is greedy, `top_k` int32 and at least the size of the
    vocabulary where it is off, `top_p` float32, `key` int32 [rows, 2], `position` int32. `filtered`
    are the rows with top-k or top-p, int64.
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    key: Tensor
    position: Tensor
    filtered: Tensor

    def __getitem__(self, rows: Tensor | slice) -> "SamplingRows":
        """Some of the rows, which are all filtered or all looked at by themselves."""
        return SamplingRows(
            temperature=self.temperature[rows],
            top_k=self.top_k[rows],
            top_p=self.top_p[rows],
            key=self.key[rows],
            position=self.position[rows],
            filtered=self.filtered[:0],
        )


def on_device(rows: Sequence[SampleRow], device: torch.device) -> SamplingRows:
    """Send everything in one copy, for which the host does not wait."""
    data, filtered = bytearray(), array("i")
    for i, row in enumerate(rows):
        known = _known.get(id(row.params))
        if known is None or known[0] is not row.params:
            known = _describe(row.params)
        data += known[1]
        if known[2]:
            filtered.append(i)
    data += array("i", [row.position for row in rows]).tobytes() + filtered.tobytes()
    host = torch.frombuffer(data, dtype=torch.int32)
    if device.type == "cuda":
        host = host.pin_memory()
    sent = host.to(device, non_blocking=True)
    count = len(rows)
    table, position, chosen = sent.split([5 * count, count, len(filtered)])
    table = table.view(count, 5)
    floats = table.view(torch.float32)
    return SamplingRows(
        temperature=floats[:, 0],
        top_k=table[:, 1],
        top_p=floats[:, 2],
        key=table[:, 3:],
        position=position,
        filtered=chosen.long(),
    )


_Described = tuple[SamplingParams, bytes, bool]
"""Parameters; temperature, top-k, top-p and key as the device gets them; whether it is filtered."""

_known: dict[int, _Described] = {}
"""By identity of the parameters, since hashing takes longer than a step should."""


def _describe(params: SamplingParams) -> _Described:
    greedy = params.temperature < GREEDY_BELOW
    filters = not greedy and (params.top_k > 0 or params.top_p < 1)
    key = blake2b(str(params.seed).encode(), digest_size=8).digest()
    top_k = min(params.top_k or LAST_TOKEN, LAST_TOKEN)
    temperature = 0.0 if greedy else params.temperature
    # In float32 a smaller top-p would be 0, which nothing exceeds, and such a temperature infinite.
    temperature, top_p = min(temperature, _LARGEST), max(params.top_p, 1 / _LARGEST)
    packed = struct.pack("<fif", temperature, top_k, top_p) + key
    if len(_known) >= 2**14:
        _known.clear()
    found = _known[id(params)] = params, packed, filters
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """Which logits the ranks have: `widths` columns of each, in order, which end with padding.

    What a model multiplies them by, or caps them with (`softcap * tanh(logits / softcap)`), is left
    to the sampler, since neither changes their order.
    """

    size: int
    widths: Sequence[int]
    scale: float = 1.0
    softcap: float | None = None

    def scores_(self, logits: Tensor) -> Tensor:
        """Scaled and capped in place, float32."""
        if self.scale != 1.0:
            logits *= self.scale
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """The last token that a row keeps, in the order of falling logits and then of ids.

    `logits`, float32 [rows], are as the model gave them; `tokens` are int64 [rows].
    """

    logits: Tensor
    tokens: Tensor


class Sampler:
    """Chooses tokens of logits that are shared among ranks. Nothing waits for the device."""

    def __init__(self, vocabulary: Vocabulary, world: World) -> None:
        self.vocabulary = vocabulary
        self.world = world
        ends = list(accumulate(vocabulary.widths, initial=0))
        self.first_token = ends[world.tp_rank]
        self.width = max(0, min(ends[world.tp_rank + 1], vocabulary.size) - self.first_token)

    def __call__(self, logits: Tensor, rows: SamplingRows) -> Tensor:
        """Choose one token per row.

        Args:
            logits: the rank's, [rows, columns], in the model's dtype.
            rows: how to sample each row.

        Returns:
            int64 [rows], the same on all ranks.
        """
        bounds = self._bounds(logits, rows) if len(rows.filtered) else None
        if logits.is_cuda:
            from tightfit.runtime.kernels import sampling

            some = logits[:, : self.width]
            best = sampling.race(some, rows, bounds, self.vocabulary, self.first_token)
        else:
            best = self._race(logits, rows, bounds)
        return token_of(self.world.all_max(best))

    def whole(self, logits: Tensor) -> Tensor:
        """Scores of the whole vocabulary, without its padding: float32 [rows, size]."""
        return self.vocabulary.scores_(_copied(self._gathered(logits)))

    def _bounds(self, logits: Tensor, rows: SamplingRows) -> Bounds:
        vocabulary, device = self.vocabulary, logits.device
        found = Bounds(
            logits=torch.full((len(logits),), float("-inf"), device=device),
            tokens=torch.full((len(logits),), LAST_TOKEN, device=device),
        )
        if logits.is_cuda:
            from tightfit.runtime.kernels import sampling

            if self.world.tp_size == 1:
                whole = logits[:, : vocabulary.size]
                sampling.bounds_(found, whole, rows.filtered, rows, vocabulary)
                return found
            for piece in self._pieces(len(rows.filtered), GATHERED_ELEMENTS // vocabulary.size):
                chosen = rows.filtered[piece]
                gathered = self._gathered(logits[chosen])
                sampling.bounds_(found, gathered, chosen, rows, vocabulary)
                del gathered
            return found
        for piece in self._pieces(len(rows.filtered), SAMPLER_ELEMENTS // vocabulary.size):
            chosen = rows.filtered[piece]
            bounds = last_kept(self._gathered(logits[chosen]), rows[chosen], vocabulary)
            found.logits[chosen] = bounds.logits
            found.tokens[chosen] = bounds.tokens
        return found

    def _gathered(self, logits: Tensor) -> Tensor:
        shares = self.world.all_gather_columns(logits, self.vocabulary.widths)
        return shares[:, : self.vocabulary.size]

    def _race(self, logits: Tensor, rows: SamplingRows, bounds: Bounds | None) -> Tensor:
        """The best of the rank's tokens, as `ranked`: int64 [rows]."""
        best = torch.full((len(logits),), -(2**63), device=logits.device)
        if not self.width:
            return best
        tokens = torch.arange(
            self.first_token,
            self.first_token + self.width,
            dtype=torch.int32,
            device=logits.device,
        )
        for piece in self._pieces(len(logits), SAMPLER_ELEMENTS // self.width):
            scores, some = _copied(logits[piece, : self.width]), rows[piece]
            excluded = None
            if bounds is not None:
                last, last_token = bounds.logits[piece, None], bounds.tokens[piece, None]
                excluded = (scores == last) & (tokens > last_token) | (scores < last)
            self.vocabulary.scores_(scores)
            greedy = some.temperature[:, None] == 0
            if not greedy.all():
                noise = gumbel(uniforms(some.key, some.position, tokens))
                scores.div_(some.temperature[:, None].masked_fill(greedy, 1))
                scores.add_(noise.masked_fill_(greedy, 0))
                del noise
            if excluded is not None:
                scores.masked_fill_(excluded, float("-inf"))
            score, column = scores.max(dim=-1)
            best[piece] = ranked(score, column + self.first_token)
            # Not to be held beside the next ones.
            del scores, excluded
        return best

    @staticmethod
    def _pieces(count: int, at_once: int) -> list[slice]:
        step = max(1, at_once)
        return [slice(i, min(i + step, count)) for i in range(0, count, step)]


def last_kept(logits: Tensor, rows: SamplingRows, vocabulary: Vocabulary) -> Bounds:
    """The bounds of rows with top-k or top-p, where top-p looks at what top-k has left.

    Args:
        logits: [rows, vocab], as the model gave them.
        rows: how to sample each row.
        vocabulary: what is done to logits.
    """
    values, order = logits.float().sort(dim=-1, descending=True, stable=True)
    del logits
    scores = vocabulary.scores_(values.clone()).div_(rows.temperature[:, None])
    beyond = torch.arange(scores.shape[-1], device=scores.device) >= rows.top_k[:, None]
    probabilities = scores.masked_fill_(beyond, float("-inf")).softmax(dim=-1)
    del scores
    # A token stays while the likelier ones before it do not yet make up top_p.
    before = probabilities.cumsum(dim=-1).sub_(probabilities)
    del probabilities
    beyond |= before >= rows.top_p.masked_fill(rows.top_p == 1, 2)[:, None]
    del before
    last = (beyond.shape[-1] - 1 - beyond.sum(dim=-1, keepdim=True)).clamp_(min=0)
    return Bounds(logits=values.gather(-1, last)[:, 0], tokens=order.gather(-1, last)[:, 0])


def ranked(scores: Tensor, tokens: Tensor) -> Tensor:
    """Integers in the order of scores, and of equal ones the lower token is the larger.

    Args:
        scores: float32.
        tokens: int64, of the same shape.

    Returns:
        int64: 32 bits that sort like the score, 1 bit of 0, 31 bits of LAST_TOKEN - token.
    """
    # Adding 0 makes -0 and 0 equal. Floats sort like their bits, negative ones in reverse.
    bits = (scores + 0.0).view(torch.int32)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (bits.long() << 32) | (LAST_TOKEN - tokens)


def token_of(best: Tensor) -> Tensor:
    """The tokens of `ranked` integers."""
    return LAST_TOKEN - (best & LAST_TOKEN)


def uniforms(key: Tensor, position: Tensor, tokens: Tensor) -> Tensor:
    """Numbers in (0, 1), the same on every device: float32 [rows, tokens].

    Args:
        key: int32 [rows, 2].
        position: int32 [rows].
        tokens: int32 [tokens].
    """
    first = _mix_(position ^ key[:, 0])
    second = _mix_(first ^ key[:, 1])
    bits = _mix_(tokens ^ first[:, None])
    bits = _mix_(bits.bitwise_xor_(second[:, None]))
    bits = _shifted(bits, 1)
    # The small ones, which decide, keep all 31 bits; the largest would round to 1.
    return bits.float().add_(0.5).mul_(2.0**-31).clamp_(max=1 - 2.0**-24)


def gumbel(uniform: Tensor) -> Tensor:
    """Gumbel noise of uniform numbers, in place: `-log(-log(1 - u))`."""
    return uniform.neg_().log1p_().neg_().log_().neg_()


def _mix_(x: Tensor) -> Tensor:
    """Hash int32 in place: `lowbias32` of https://github.com/skeeto/hash-prospector."""
    x ^= _shifted(x, 16)
    x *= 0x7FEB352D
    x ^= _shifted(x, 15)
    x *= 0x846CA68B - 2**32
    x ^= _shifted(x, 16)
    return x


def _shifted(x: Tensor, bits: int) -> Tensor:
    """A shift to the right as if int32 had no sign."""
    return (x >> bits).bitwise_and_(2 ** (32 - bits) - 1)


def _copied(logits: Tensor) -> Tensor:
    return logits.to(torch.float32, copy=True)
