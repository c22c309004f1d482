"""What quantizing one layer does to what it gives out.

The calibration text goes through the original layers, one by one. Beside each of them the same
layer of the quantized checkpoint gets the same inputs, whole and with only its attention or only
its MLP quantized. Nothing is quantized below, so that every layer is judged alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tightfit.checkpoint.checkpoint import Checkpoint
from tightfit.quantize.calibration.options import CalibrationOptions
from tightfit.quantize.calibration.samples import token_windows
from tightfit.quantize.dequantize import open_dequantized
from tightfit.quantize.job import QuantizeJob
from tightfit.quantize.places import ATTENTION, Where, layer_kinds
from tightfit.runtime.layerwise import LayerwiseModel, LoadedLayer
from tightfit.sharding.progress import Progress

_AT_ONCE = 2**12
"""Tokens that go through a layer together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """Squared errors of what layers give out, relative to the square of that.

    `layers` are for the whole layer quantized, `places` for one kind of modules in it.
    """

    layers: Mapping[int, float]
    places: Mapping[Where, float]


@torch.no_grad()
def observe(
    job: QuantizeJob,
    options: CalibrationOptions,
    directory: Path,
    *,
    written: Checkpoint | None = None,
    progress: Progress | None = None,
) -> Observed:
    """Send text through all layers.

    Args:
        job: from `prepare`.
        options: the text.
        directory: an empty one for the activations between two layers.
        written: the checkpoint that was written (`open_checkpoint(out)`), of any method; without
            it the matrices are encoded for this.
        progress: told of the source bytes of the layers.

    Raises:
        UsageError: the text is too short.
        UnsupportedModelError: the built-in runtime cannot run the model.
        CheckpointError: weights that are damaged or not finite.
    """
    model = LayerwiseModel(job.checkpoint)
    quantized = LayerwiseModel(open_dequantized(written or job.virtual))
    tokens = token_windows(job.checkpoint, options)
    sizes = [_layer_bytes(job, index) for index in range(model.num_layers)]
    if progress is not None:
        progress.phase("observing", sum(sizes))
    hidden, after = _activations(directory, (*tokens.shape, job.spec.hidden_size))
    rows = max(1, _AT_ONCE // tokens.shape[1])
    for some, ids in zip(hidden.split(rows), tokens.split(rows), strict=True):
        some.copy_(model.embed(ids))
    layers: dict[int, float] = {}
    places: dict[Where, float] = {}
    for index in range(model.num_layers):
        one, other = model.layer(index), quantized.layer(index)
        for before, out in zip(hidden.split(rows), after.split(rows), strict=True):
            out.copy_(one(before))
        layers[index] = _error(other, hidden, after, rows)
        kinds = layer_kinds(job.spec, index)
        rest = next((kind for kind in kinds.values() if kind != ATTENTION), None)
        if rest is not None:
            # Afterwards one has quantized attention alone, and the other all but that.
            _swap(one, other, {name for name, kind in kinds.items() if kind == ATTENTION})
            places[Where(kind=ATTENTION, layer=index)] = _error(one, hidden, after, rows)
            places[Where(kind=rest, layer=index)] = _error(other, hidden, after, rows)
        hidden, after = after, hidden
        if progress is not None:
            progress.advance(sizes[index])
    return Observed(layers=layers, places=places)


def _error(layer: LoadedLayer, hidden: Tensor, expected: Tensor, rows: int) -> float:
    error = norm = 0.0
    for some, right in zip(hidden.split(rows), expected.split(rows), strict=True):
        error += float((layer(some) - right).square().sum(dtype=torch.float64))
        norm += float(right.square().sum(dtype=torch.float64))
    return error / norm if error else 0.0


def _swap(one: LoadedLayer, other: LoadedLayer, names: set[str]) -> None:
    for name in names & one.parameters.keys():
        kept = one.parameters[name].clone()
        one.parameters[name].copy_(other.parameters[name])
        other.parameters[name].copy_(kept)


def _activations(directory: Path, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Two, in files, so that they may be larger than memory."""
    count = torch.Size(shape).numel()
    first, second = (
        torch.from_file(str(directory / name), shared=True, size=count).view(shape)
        for name in ("before", "after")
    )
    return first, second


def _layer_bytes(job: QuantizeJob, index: int) -> int:
    names = layer_kinds(job.spec, index)
    tensors = job.checkpoint.tensors()
    return sum(tensors[name].nbytes for name in names if name in tensors)
