"""The walk through the layers."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from tightfit import __version__
from tightfit.checkpoint.header import TensorInfo
from tightfit.errors import UsageError
from tightfit.model.quantization.written import SCHEMES, Wish
from tightfit.quantize.calibration.layer import LayerCalibration
from tightfit.quantize.calibration.observers import INPUT_SCALE, Observer
from tightfit.quantize.calibration.options import CalibrationOptions
from tightfit.quantize.calibration.samples import token_windows
from tightfit.quantize.calibration.state import State
from tightfit.quantize.computed_source import FILE, Kept
from tightfit.quantize.job import QuantizeJob
from tightfit.quantize.recipe_file import document_of
from tightfit.runtime.layerwise import LayerwiseModel, LoadedLayer
from tightfit.sharding.progress import Progress

_TOKENS = 2048
"""That go through a layer together."""
_SCHEMES = {
    "gptq": SCHEMES,
    "awq": ("w4a16", "w4a16-asym", "nvfp4", "nvfp4a16", "mxfp4"),
    "smoothquant": ("int8", "fp8-tensor", "fp8-channel", "fp8-block"),
}
_WHY = {
    "awq": "protects the weights of large inputs from being rounded to 4 bits",
    "smoothquant": "makes the rounding of activations to 8 bits easier",
}


def is_needed(wish: Wish, method: str) -> bool:
    """Whether something has to be calibrated: by the method, or for scales of activations.

    Raises:
        UsageError: the method makes no sense for a scheme.
    """
    if method in _SCHEMES:
        for choice in wish.choices:
            if choice.scheme not in _SCHEMES[method]:
                raise UsageError(
                    f"the method {method} makes no sense for the scheme {choice.scheme}: it "
                    f"{_WHY[method]}",
                    hint=f"{method} is for {', '.join(_SCHEMES[method])}; gptq is for all schemes",
                )
    static = any(choice.scheme == "nvfp4" for choice in wish.choices)
    return method in _SCHEMES or static or wish.kv_cache


@torch.no_grad()
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

    The samples' activations are in a file of `directory`, whatever their size, and of weights only
    those of one layer are in memory, as float32, with the Gram matrices of its inputs. What is
    not in a decoder layer, such as the output layer, is left to the stream.

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
    is_needed(job.wish, job.method)
    _check_observed(job)
    model = LayerwiseModel(job.checkpoint)
    tokens = token_windows(job.checkpoint, options, warn)
    state = State(directory, _identity(job, tokens), resume=resume)
    shape = (*tokens.shape, job.spec.hidden_size)
    step = max(1, _TOKENS // tokens.shape[1])
    sizes = [_layer_bytes(job, index) for index in range(model.num_layers)]
    progress.phase("calibrate", sum(sizes))
    progress.advance(sum(sizes[: state.done]))
    if not state.has_begun:
        state.begin(shape, (model.embed(part) for part in tokens.split(step)))
    while state.done < model.num_layers:
        index = state.done
        hidden = state.hidden()

        def samples(hidden: Tensor = hidden) -> Iterable[Tensor]:
            return hidden.split(step)

        layer = model.layer(index)
        work = LayerCalibration(job, index, layer, samples, tokens=tokens.numel(), warn=warn)
        tensors = work.run()
        state.add(shape, _onward(job, index, work, layer, samples(), tensors), tensors)
        progress.advance(sizes[index])
    return state.kept()


def _onward(
    job: QuantizeJob,
    index: int,
    work: LayerCalibration,
    layer: LoadedLayer,
    samples: Iterable[Tensor],
    tensors: dict[str, Tensor],
) -> Iterator[Tensor]:
    """The activations after the quantized layer; observed scales are then among its `tensors`."""
    observer = Observer()
    layer.watch(observer.on_input, observer.on_cache)
    for part in samples:
        yield layer(part)
    tensors |= observer.input_scales(work.groups)
    if job.wish.kv_cache:
        tensors |= observer.cache_scales(_attention(job, index))


def promised_scales(job: QuantizeJob) -> dict[str, Kept]:
    """The scales of keys and values that calibration would add, by name; of no value."""
    names = [
        f"{_attention(job, index)}.{kind}_scale"
        for index in range(job.spec.num_layers)
        for kind in ("k", "v")
    ]
    return {
        name: Kept(
            name=name,
            source=job.checkpoint.source,
            info=TensorInfo(name=name, dtype="F32", shape=(1,), file=FILE, offset=0, nbytes=4),
        )
        for name in names
    }


def _attention(job: QuantizeJob, index: int) -> str:
    return f"{job.spec.names.layers}.{index}.{job.spec.layers[index].attention.module}"


def _check_observed(job: QuantizeJob) -> None:
    """Only inputs inside the layers are seen."""
    for matrix in job.matrices:
        inside = matrix.module.startswith(f"{job.spec.names.layers}.")
        if INPUT_SCALE in matrix.outputs and not inside:
            raise UsageError(
                f"{matrix.module} with the scheme {matrix.choice.scheme}, whose activations are "
                "calibrated, which is done only inside decoder layers",
                hint=f"give {matrix.module} the scheme nvfp4a16, or leave it as it is",
            )


def _identity(job: QuantizeJob, tokens: Tensor) -> dict[str, Any]:
    """What the result depends on."""
    samples, length = tokens.shape
    return {
        "recipe": document_of(job.wish),
        "method": job.method,
        "calibration": {
            "samples": samples,
            "length": length,
            "tokens": xxhash.xxh3_128(tokens.numpy().data).hexdigest(),
        },
        "tightfit": __version__,
        "source": job.virtual.source.state(FILE),
        "quantization": job.virtual.config["quantization_config"],
    }


def _layer_bytes(job: QuantizeJob, index: int) -> int:
    prefix = f"{job.spec.names.layers}.{index}."
    tensors = job.checkpoint.tensors().values()
    return sum(info.nbytes for info in tensors if info.name.startswith(prefix))
