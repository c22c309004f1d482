"""The parameters of a class of transformers, from a module without memory.

Building one imports torch and transformers, takes seconds, and runs a lot of code for a config of
unknown origin, so it happens in another process that is offline and may fail: this file is its
script too. No code of a checkpoint is ever run (`trust_remote_code=False`).
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

_NEEDED = ("torch", "transformers", "accelerate")
_SECONDS = 300
_MOST_PARAMETERS = 5_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """A tensor that a checkpoint would hold, in safetensors' spelling."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int


def is_installed() -> bool:
    """Whether the extra `hf` is, found without importing it."""
    return all(find_spec(package) is not None for package in _NEEDED)


@dataclass(frozen=True, slots=True, kw_only=True)
class MetaModule:
    """What transformers makes of a config: parameters, and sizes under their usual names."""

    parameters: Mapping[str, Parameter]
    sizes: Mapping[str, int]


def meta_module(config: Mapping[str, Any]) -> MetaModule | str:
    """The module of the class that a config names, or why there is none, in a sentence."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    # Isolated (-I), so that no module of the working directory is imported.
    command = [sys.executable, "-I", __file__]
    try:
        done = subprocess.run(
            command,
            input=json.dumps(config).encode(),
            capture_output=True,
            timeout=_SECONDS,
            env=environment,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"transformers did not build it within {_SECONDS} s"
    except OSError as error:
        return f"no process could be started for it: {error}"
    lines = done.stdout.splitlines()
    try:
        answer = json.loads(lines[-1])
        if isinstance(answer, str):
            return answer
        parameters = {
            name: Parameter(dtype=dtype, shape=tuple(shape), nbytes=nbytes)
            for name, dtype, shape, nbytes in answer["parameters"]
        }
        return MetaModule(parameters=parameters, sizes=answer["sizes"])
    except (IndexError, KeyError, ValueError, TypeError):
        return "transformers failed to build it"


_SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "max_position_embeddings",
    "vocab_size",
)
_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


def _build(values: dict[str, Any]) -> dict[str, Any] | str:
    import torch
    import transformers
    from accelerate import init_empty_weights

    kind = values.pop("model_type", None)
    values.pop("auto_map", None)
    name = values["architectures"][0]
    cls = getattr(transformers, name, None)
    if kind not in transformers.CONFIG_MAPPING or cls is None:
        return f"transformers {transformers.__version__} does not know {name} either"
    config = transformers.CONFIG_MAPPING[kind](**values)
    torch.set_default_dtype(getattr(config, "dtype", None) or torch.float32)
    with init_empty_weights(include_buffers=False):
        model = cls(config)
    model.tie_weights()
    found = []
    for parameter_name, parameter in model.named_parameters():
        dtype = _DTYPES[str(parameter.dtype).removeprefix("torch.")]
        nbytes = parameter.numel() * parameter.element_size()
        found.append([parameter_name, dtype, list(parameter.shape), nbytes])
        if len(found) > _MOST_PARAMETERS:
            return "it has too many parameters"
    text = config.get_text_config()
    sizes = {key: getattr(text, key, None) for key in _SIZES}
    known = {key: value for key, value in sizes.items() if isinstance(value, int)}
    return {"parameters": found, "sizes": known}


def _main() -> None:
    answer: dict[str, Any] | str
    try:
        answer = _build(json.load(sys.stdin))
    # Whatever a config makes transformers raise.
    except Exception as error:
        shown = str(error).strip().splitlines() or [""]
        answer = f"transformers failed to build it ({type(error).__name__}: {shown[0][:200]})"
    print(json.dumps(answer))


if __name__ == "__main__":
    _main()
