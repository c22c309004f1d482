"""Which layers, and which kinds of modules, suffer most from a scheme."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tightfit.checkpoint.checkpoint import Checkpoint
from tightfit.quantize.calibration.options import CalibrationOptions
from tightfit.quantize.job import QuantizeJob
from tightfit.quantize.matrices import Matrix
from tightfit.quantize.observe import observe
from tightfit.quantize.places import places
from tightfit.quantize.quality import MatrixQuality, Quality
from tightfit.sharding.progress import Progress

K = TypeVar("K", int | None, str)

_OF_WEIGHTS = (
    "relative errors of weights, each times its share of all that is quantized; they say nothing "
    "of how much a layer matters to what the model says, which calibration data would show"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Damage:
    """What quantizing one layer, or all modules of a kind, does; `name` is `layer 3` or a kind."""

    name: str
    layer: int | None
    damage: float
    share: float
    """Of the damage of all."""
    parameters: int
    """That are quantized."""

    def to_json(self) -> dict[str, Any]:
        """All fields."""
        return {
            "name": self.name,
            "layer": self.layer,
            "damage": self.damage,
            "share": self.share,
            "parameters": self.parameters,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Sensitivity:
    """Rankings, most damaged first; `measure` says in words what `damage` is."""

    scheme: str
    measure: str
    calibrated: bool
    layers: tuple[Damage, ...]
    kinds: tuple[Damage, ...]

    def to_json(self) -> dict[str, Any]:
        """Schema 1: `scheme`, `measure`, `calibrated`, `layers` and `kinds`."""
        return {
            "schema": 1,
            "scheme": self.scheme,
            "measure": self.measure,
            "calibrated": self.calibrated,
            "layers": [one.to_json() for one in self.layers],
            "kinds": [one.to_json() for one in self.kinds],
        }


def weight_sensitivity(quality: Quality) -> Sensitivity:
    """Without data: the relative error of each matrix, weighted by its parameters."""
    whole = quality.total.parameters

    def damage(some: Iterable[MatrixQuality]) -> float:
        figures = (one.figures for one in some)
        return math.fsum(one.relative_error * one.parameters / whole for one in figures)

    def ranked(grouped: Mapping[K, list[MatrixQuality]]) -> tuple[Damage, ...]:
        return _ranked(
            {key: damage(some) for key, some in grouped.items()},
            {key: sum(one.figures.parameters for one in some) for key, some in grouped.items()},
        )

    layers, kinds = _grouped(quality)
    return Sensitivity(
        scheme=quality.scheme,
        measure=_OF_WEIGHTS,
        calibrated=False,
        layers=ranked(layers),
        kinds=ranked(kinds),
    )


def output_sensitivity(
    job: QuantizeJob,
    options: CalibrationOptions,
    directory: Path,
    *,
    written: Checkpoint | None = None,
    progress: Progress | None = None,
) -> Sensitivity:
    """With calibration data: how much the output of each layer changes if it alone is quantized.

    Args:
        job: from `prepare`.
        options: the text.
        directory: an empty one for activations between two layers.
        written: the checkpoint that was written (`open_checkpoint(out)`), which a method that
            calibrates needs; without it the matrices are encoded for this.
        progress: told of the source bytes of the layers.

    Raises:
        UsageError: the text is too short.
        UnsupportedModelError: the built-in runtime cannot run the model.
        CheckpointError: weights that are damaged or not finite.
    """
    observed = observe(job, options, directory, written=written, progress=progress)
    where = places(job.spec)
    modules = [(matrix, where[matrix.module]) for matrix in job.matrices]
    layers: dict[int | None, float] = {
        layer: math.sqrt(one) for layer, one in observed.layers.items()
    }
    kinds: dict[str, float] = {}
    for place, error in observed.places.items():
        kinds[place.kind] = kinds.get(place.kind, 0.0) + error / len(layers)
    return Sensitivity(
        scheme=job.wish.label,
        measure=_OF_OUTPUTS,
        calibrated=True,
        layers=_ranked(layers, _parameters((place.layer, matrix) for matrix, place in modules)),
        kinds=_ranked(
            {kind: math.sqrt(error) for kind, error in kinds.items()},
            _parameters((place.kind, matrix) for matrix, place in modules),
        ),
    )


_OF_OUTPUTS = (
    "the change of a layer's output relative to that output, with the layer alone quantized, over "
    "the calibration text; of a kind of modules the root mean square over the layers"
)


def _grouped(
    quality: Quality,
) -> tuple[dict[int | None, list[MatrixQuality]], dict[str, list[MatrixQuality]]]:
    """By layer, None for what is in none, and by kind."""
    layers: dict[int | None, list[MatrixQuality]] = {}
    kinds: dict[str, list[MatrixQuality]] = {}
    for one in quality.matrices:
        layers.setdefault(one.where.layer, []).append(one)
        kinds.setdefault(one.where.kind, []).append(one)
    return layers, kinds


def _parameters(some: Iterable[tuple[K, Matrix]]) -> dict[K, int]:
    found: dict[K, int] = {}
    for key, matrix in some:
        found[key] = found.get(key, 0) + matrix.rows * matrix.columns
    return found


def _ranked(damages: Mapping[K, float], parameters: Mapping[K, int]) -> tuple[Damage, ...]:
    whole = math.fsum(damages.values())
    found = []
    for key, damage in damages.items():
        layer = key if isinstance(key, int) else None
        name = key if isinstance(key, str) else "outside" if key is None else f"layer {key}"
        found.append(
            Damage(
                name=name,
                layer=layer,
                damage=damage,
                share=damage / whole if whole else 0.0,
                parameters=parameters.get(key, 0),
            )
        )
    return tuple(sorted(found, key=lambda one: -one.damage))
