"""Which layers, and which kinds of modules, suffer most from a scheme."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tightfit.quantize.calibration.options import CalibrationOptions
from tightfit.quantize.job import QuantizeJob
from tightfit.quantize.quality import Quality
from tightfit.sharding.progress import Progress


@dataclass(frozen=True, slots=True, kw_only=True)
class Damage:
    """What quantizing one layer, or all modules of a kind, does; `name` is `layer 3` or a kind."""

    name: str
    layer: int | None
    damage: float
    share: float
    """Of the damage of all."""
    parameters: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Sensitivity:
    """Rankings, most damaged first; `measure` says in a sentence what `damage` is."""

    scheme: str
    measure: str
    calibrated: bool
    layers: tuple[Damage, ...]
    kinds: tuple[Damage, ...]

    def to_json(self) -> dict[str, Any]:
        """Schema 1: `{"schema", "scheme", "measure", "calibrated", "layers", "kinds"}`."""
        raise NotImplementedError


def weight_sensitivity(quality: Quality) -> Sensitivity:
    """Without data: the relative error of each matrix, weighted by its parameters."""
    raise NotImplementedError


def output_sensitivity(
    job: QuantizeJob,
    options: CalibrationOptions,
    directory: Path,
    *,
    progress: Progress | None = None,
) -> Sensitivity:
    """With calibration data: how much the output of each layer changes if it alone is quantized.

    Args:
        job: from `prepare`, of a checkpoint whose files are local.
        options: the text.
        directory: an empty one for activations between two layers.
        progress: told of the source bytes of the layers.

    Raises:
        UsageError: the text is too short.
        UnsupportedModelError: the built-in runtime cannot run the model.
        CheckpointError: weights that are damaged or not finite.
    """
    raise NotImplementedError
