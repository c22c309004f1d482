"""What can be said of a checkpoint whose architecture no family describes."""

from tightfit.checkpoint.checkpoint import Checkpoint
from tightfit.checkpoint.meta_device import is_installed, meta_module
from tightfit.errors import UnknownArchitectureError
from tightfit.model.config import Config
from tightfit.model.listed import listed_spec
from tightfit.model.spec import ModelSpec


def unknown_spec(checkpoint: Checkpoint, error: UnknownArchitectureError) -> ModelSpec:
    """Its weights as a list: from the headers, else from transformers where that is installed.

    Raises:
        UnknownArchitectureError: `error`, with what else was tried.
    """
    config = Config(checkpoint.config)
    if checkpoint.has_weights:
        return listed_spec(config, checkpoint.tensors(), "headers")
    if config.has("quantization_config"):
        raise _with(error, "its weights are quantized, and only their headers would tell how")
    if not is_installed():
        raise _with(
            error,
            "without weights here, transformers might know its shapes: pip install 'tightfit[hf]'",
        )
    found = meta_module(checkpoint.config)
    if isinstance(found, str):
        raise _with(error, found)
    sized = Config({**checkpoint.config, **found.sizes})
    return listed_spec(sized, found.parameters, "transformers")


def _with(error: UnknownArchitectureError, tried: str) -> UnknownArchitectureError:
    hint = tried if error.hint is None else f"{error.hint}; {tried}"
    return UnknownArchitectureError(error.message, hint=hint)
