"""The walk through the layers."""

from collections.abc import Callable
from pathlib import Path

from tightfit.model.quantization.written import Wish
from tightfit.quantize.calibration.options import CalibrationOptions
from tightfit.quantize.computed_source import Kept
from tightfit.quantize.job import QuantizeJob
from tightfit.sharding.progress import Progress

METHODS = ("gptq", "awq", "smoothquant")


def is_needed(wish: Wish, method: str) -> bool:
    """Whether something has to be calibrated: by the method, or for scales of activations."""
    static = any(choice.scheme == "nvfp4" for choice in wish.choices)
    return method in METHODS or static or wish.kv_cache


def calibrate(
    job: QuantizeJob,
    options: CalibrationOptions,
    directory: Path,
    progress: Progress,
    *,
    resume: bool = False,
    warn: Callable[[str], None] = lambda text: None,
) -> dict[str, Kept]:
    """Choose the tensors of a quantized checkpoint with the help of data.

    Args:
        job: of a checkpoint whose files are local, and of any method.
        options: the text.
        directory: a new one, for a file for each layer and the activations between two layers; to
            be removed by the caller when the output is complete.
        progress: told of the source bytes of the layers.
        resume: go on after what a killed call has left in `directory`.
        warn: told of experts that saw too few tokens, and of short texts.

    Returns:
        Tensors of the result by name, for `prepare(..., given=...)`.

    Raises:
        UsageError: the method makes no sense for a scheme, or the text is too short.
        UnsupportedModelError: the built-in runtime cannot run the model.
        CheckpointError: weights that are damaged or not finite.
        OutputError: `directory` holds something else, or cannot be written.
    """
    raise NotImplementedError
