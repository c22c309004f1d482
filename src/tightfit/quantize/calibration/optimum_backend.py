"""GPTQ by `optimum.gptq.GPTQQuantizer` instead of our own: the whole model is in memory.

Only its tensors are taken. What it writes itself is not fit to be published: its config.json holds
the calibration data, and names another format than its zero points are in.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tightfit.checkpoint.disk import output_error
from tightfit.checkpoint.source import LocalSource
from tightfit.codecs import codec
from tightfit.errors import CheckpointError, MissingExtraError, UsageError
from tightfit.quantize.calibration.directory import OPTIMUM, require_own
from tightfit.quantize.calibration.options import CalibrationOptions
from tightfit.quantize.calibration.samples import token_windows
from tightfit.quantize.computed_source import Kept
from tightfit.quantize.job import QuantizeJob
from tightfit.quantize.matrices import Matrix
from tightfit.runtime.loading.files import TORCH_DTYPES, TensorFile

_FILE = "optimum.safetensors"
_PACKAGES = ("optimum.gptq", "transformers", "gptqmodel")
_ONES = {4: 0x11111111, 8: 0x01010101}
"""What the zero points of gptq_v2 are larger by, in every word."""
_INSTALL = "pip install 'tightfit[optimum]' gptqmodel"


def calibrate_by_optimum(
    job: QuantizeJob,
    options: CalibrationOptions,
    directory: Path,
    *,
    resume: bool = False,
    warn: Callable[[str], None] = lambda text: None,
) -> dict[str, Kept]:
    """As `calibrate`, but what a killed call has left with `resume` is only replaced.

    Raises:
        MissingExtraError: optimum, transformers or GPTQModel is not installed.
        UsageError: something else than symmetric integers in the format gptq, or layers that
            differ; or the text is too short.
        CheckpointError: what came back is not what the format wants.
        RefusedDirectoryError: `directory` holds something else.
        OutputError: `directory` cannot be written.
    """
    require_own(directory, OPTIMUM, resume=resume)
    modules = _modules(job)
    optimum, transformers = _packages()
    tokens = token_windows(job.checkpoint, options, warn)
    path = job.checkpoint.source.local_path("config.json")
    assert path is not None, "a local checkpoint"
    (choice,) = job.wish.choices
    model = transformers.AutoModelForCausalLM.from_pretrained(
        str(path.parent), dtype="auto", use_safetensors=True, trust_remote_code=False
    )
    quantizer = optimum.GPTQQuantizer(
        bits=int(choice.scheme[1]),
        group_size=choice.group or -1,
        desc_act=False,
        sym=True,
        dataset=[{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in tokens.tolist()],
        model_seqlen=tokens.shape[1],
        block_name_to_quantize=job.spec.names.layers,
        modules_in_block_to_quantize=[[name] for name in modules],
    )
    found = quantizer.quantize_model(model).state_dict()
    tensors: dict[str, Tensor] = {}
    for matrix in job.matrices:
        tensors |= _repaired(matrix, found)
    return _written(tensors, directory)


def _modules(job: QuantizeJob) -> list[str]:
    """Of every layer, by their names inside it."""
    choices = job.wish.choices
    if job.method != "gptq" or job.wish.format != "gptq" or len(choices) != 1:
        raise UsageError(
            f"the backend optimum with {job.wish.label} by the method {job.method}",
            hint="it has --method gptq --format gptq with w4a16 or w8a16; the own backend has all",
        )
    by_layer: dict[str, list[str]] = {}
    for matrix in job.matrices:
        inside = matrix.module.removeprefix(f"{job.spec.names.layers}.")
        layer, _, name = inside.partition(".")
        by_layer.setdefault(layer, []).append(name)
    first, *others = by_layer.values()
    if any(names != first for names in others) or not all(map(str.isdigit, by_layer)):
        raise UsageError(
            "the backend optimum quantizes the same modules of every layer, and nothing else",
            hint="leave out the rules that single out layers, or use the own backend",
        )
    return first


def _packages() -> tuple[Any, Any]:
    from importlib import import_module

    found = []
    for name in _PACKAGES:
        try:
            found.append(import_module(name))
        except ImportError as error:
            package = name.partition(".")[0]
            missing = MissingExtraError("quantize --backend optimum", "quantize", package)
            missing.hint = _INSTALL
            raise missing from error
    return found[0], found[1]


def _repaired(matrix: Matrix, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a matrix as its format has them: zero points minus one, our scales' dtype."""
    coder = codec(matrix.choice, TORCH_DTYPES[matrix.source.dtype])
    # Zero points of symmetric weights are all alike, and the codec knows what they have to be.
    nothing = coder.encode(torch.zeros(matrix.rows, matrix.columns))
    one = torch.tensor(_ONES[int(matrix.choice.scheme[1])], dtype=torch.int32)
    result: dict[str, Tensor] = {}
    for kind, output in matrix.outputs.items():
        tensor = found.get(f"{matrix.module}.{kind}")
        if tensor is None or tuple(tensor.shape) != output.shape:
            raise _odd(f"{matrix.module}.{kind}")
        stored = tensor.cpu().to(TORCH_DTYPES[output.dtype])
        if kind in ("qzeros", "g_idx"):
            known = nothing[kind]
            later = kind == "qzeros" and torch.equal(stored, known + one)
            if not later and not torch.equal(stored, known):
                raise _odd(output.name)
            stored = known
        result[output.name] = stored.contiguous()
    return result


def _odd(name: str) -> CheckpointError:
    return CheckpointError(
        f"optimum gave back something else than the format wants for {name!r}",
        hint="this version of optimum or gptqmodel is not known; use the own backend",
    )


def _written(tensors: Mapping[str, Tensor], directory: Path) -> dict[str, Kept]:
    from safetensors.torch import save_file

    path, partial = directory / _FILE, directory / f"{_FILE}.partial"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        save_file(dict(tensors), partial)
        os.replace(partial, path)
    except OSError as error:
        raise output_error(error, path, 0) from error
    source = LocalSource(directory)
    return {
        name: Kept(name=name, source=source, info=info)
        for name, info in TensorFile(path).tensors.items()
    }
