"""What is known of the inputs of linear layers, summed up over all calibration tokens."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import isqrt

import torch
from torch import Tensor

ROWS = 1024
"""Tokens that are kept as they are, where a method needs some."""


@dataclass(slots=True)
class Inputs:
    """Of layers that share an input of `columns` channels.

    `gram`, float32 `[columns, columns]`, is the sum of `x x^T`, and `largest` and `total` are the
    largest and the sum of absolute values of each channel.
    """

    largest: Tensor
    total: Tensor
    gram: Tensor | None = None
    rows: Tensor | None = None
    tokens: int = 0

    @staticmethod
    def nothing(columns: int, *, gram: bool, rows: bool) -> "Inputs":
        """Of no tokens so far."""
        return Inputs(
            largest=torch.zeros(columns),
            total=torch.zeros(columns),
            gram=torch.zeros(columns, columns) if gram else None,
            rows=torch.empty(0, columns) if rows else None,
        )

    def add(self, x: Tensor, share: float) -> None:
        """Take in `[tokens, columns]`, of which `share` are kept as they are, if any."""
        step = _prime(max(1, round(1 / share)))
        # Every `step`-th token of all, wherever a call begins.
        kept = x[-self.tokens % step :: step]
        self.tokens += len(x)
        size = x.abs()
        if len(x):
            torch.maximum(self.largest, size.amax(dim=0), out=self.largest)
        self.total += size.sum(dim=0)
        if self.gram is not None:
            self.gram.addmm_(x.T, x)
        if self.rows is not None:
            self.rows = torch.cat([self.rows, kept])

    @property
    def mean(self) -> Tensor:
        """Of the absolute values of each channel."""
        return self.total / max(self.tokens, 1)

    @property
    def is_finite(self) -> bool:
        """Whether nothing has overflowed."""
        seen = self.largest if self.gram is None else self.gram.diagonal()
        return bool(torch.isfinite(seen).all())

    def divide(self, scales: Tensor) -> None:
        """What it would have been with channels divided by `scales`."""
        for vector in (self.largest, self.total):
            vector.div_(scales)
        if self.gram is not None:
            self.gram.div_(scales).div_(scales[:, None])
        if self.rows is not None:
            self.rows.div_(scales)


def _prime(most: int) -> int:
    """The largest up to `most`: a step that meets all positions of windows of a round length."""
    return next(n for n in range(most, 0, -1) if all(n % d for d in range(2, isqrt(n) + 1)))


class Collector:
    """Sums up inputs by module, to be called before linear layers."""

    def __init__(self, found: Mapping[str, Inputs], *, share: float) -> None:
        self._found = found
        self._share = share

    def __call__(self, modules: tuple[str, ...], x: Tensor) -> None:
        """The input `[tokens, columns]` of some modules."""
        if modules[0] in self._found:
            self._found[modules[0]].add(x, self._share)
