"""Perplexity of a text under a checkpoint, quantized or not, layer by layer.

A text is cut into windows that do not overlap, and every token of a window but the first is
predicted from those before it. Only a layer and the windows' activations are in memory. Weights and
inputs of quantized layers are rounded as an engine does it; everything else is float32.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import exp, isfinite, sqrt

import torch
from torch import Tensor

from tightfit.checkpoint.checkpoint import Checkpoint
from tightfit.errors import UsageError
from tightfit.runtime.layerwise import LayerwiseModel
from tightfit.runtime.text import Text

_AT_ONCE = 2**12
"""Tokens that go through a layer together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Perplexity:
    """How well a model predicts a text.

    `nll` is the mean negative log likelihood of a token, in nats, `nll_error` its standard error
    over windows (0 for one window), and `value` its exponential.
    """

    nll: float
    nll_error: float
    windows: int
    tokens: int
    """That were predicted."""

    @property
    def value(self) -> float:
        """The perplexity; infinite where the model's numbers are."""
        return exp(self.nll) if self.nll < _LARGEST else float("inf")

    @property
    def error(self) -> float:
        """The standard error of the perplexity, to first order."""
        return self.value * self.nll_error


_LARGEST = 700.0


def perplexity(
    checkpoint: Checkpoint,
    text: str,
    *,
    window: int = 512,
    limit_tokens: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Measure the perplexity of a text.

    Args:
        checkpoint: anywhere, quantized or not; it needs a tokenizer.json.
        text: plain.
        window: tokens of a window; a rest that is shorter counts if it is the only one.
        limit_tokens: leave out the text after so many tokens.
        progress: gets (layers done, all layers).

    Raises:
        UsageError: the text has less than two tokens, or a window does.
        CheckpointError: weights or tokenizer are missing or damaged.
        UnsupportedModelError: the runtime cannot execute the model.
    """
    if window < 2:
        raise UsageError(f"a window of {window} tokens", hint="at least 2")
    ids = token_ids(checkpoint, text, limit_tokens)
    window = min(window, len(ids))
    count = len(ids) // window
    tokens = torch.tensor(ids[: count * window]).view(count, window)
    return _summary(window_losses(LayerwiseModel(checkpoint), tokens, progress), window)


def token_ids(checkpoint: Checkpoint, text: str, limit: int | None = None) -> list[int]:
    """The tokens of a text to evaluate, `limit` at most.

    Raises:
        UsageError: it has less than two.
        CheckpointError: there is no tokenizer, or it is damaged.
    """
    ids = Text(checkpoint).encode(text)[:limit]
    if len(ids) < 2:
        raise UsageError(f"the text has {len(ids)} tokens", hint="give one with thousands")
    return ids


@torch.no_grad()
def window_losses(
    model: LayerwiseModel, tokens: Tensor, progress: Callable[[int, int], None] | None = None
) -> Tensor:
    """The mean negative log likelihood of each window, float64 [windows].

    Args:
        model: which.
        tokens: int64 [windows, tokens].
        progress: gets (layers done, all layers).
    """
    hidden = model.embed(tokens)
    rows = max(1, _AT_ONCE // tokens.shape[1])
    for index in range(model.num_layers):
        if progress is not None:
            progress(index, model.num_layers)
        layer = model.layer(index)
        for some in hidden.split(rows):
            some.copy_(layer(some))
    losses = [
        -model.log_likelihood(some[:, :-1], following[:, 1:]).double().mean(dim=1)
        for some, following in zip(hidden.split(rows), tokens.split(rows), strict=True)
    ]
    if progress is not None:
        progress(model.num_layers, model.num_layers)
    return torch.cat(losses)


def _summary(losses: Tensor, window: int) -> Perplexity:
    count = len(losses)
    mean = float(losses.mean())
    spread = float(losses.std()) / sqrt(count) if count > 1 else 0.0
    return Perplexity(
        nll=mean if isfinite(mean) else float("inf"),
        nll_error=spread,
        windows=count,
        tokens=count * (window - 1),
    )
