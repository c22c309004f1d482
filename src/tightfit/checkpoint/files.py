"""Which of a model's files matter: its config, and the weight files that belong together.

Model directories hold more than one model's worth of files: shards and the whole, the original
format beside the converted one, adapters, optimizer states. The choice here is that of
transformers and vLLM (`filter_duplicate_safetensors_files` in vLLM's weight_utils.py).
"""

import json
import re
from dataclasses import dataclass
from typing import Any

from tightfit.checkpoint.source import Source, safe_name
from tightfit.errors import CheckpointError, ConfigError, TightfitError
from tightfit.units import MiB

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
MANIFEST = "tightfit-manifest.json"

MAX_CONFIG_BYTES = 32 * MiB
MAX_INDEX_BYTES = 256 * MiB

_RANK_FILE = re.compile(r"model-(rank-.*-part-|pp-).*\.safetensors")
_NUMBERED = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.safetensors")
OTHER_FORMATS = (".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
"""Suffixes of weights that are not safetensors."""
_NOT_WEIGHTS = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state).*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """The weight files of one place.

    `index` is the `weight_map` of the index file, tensor name to file name. `missing` are files
    that the index or the file names promise and that are not there. `unusable` are weights in
    other formats, filled in only if there are none in safetensors.
    """

    files: tuple[str, ...] = ()
    index: dict[str, str] | None = None
    missing: tuple[str, ...] = ()
    is_sharded: bool = False
    unusable: tuple[str, ...] = ()


def find_weights(source: Source) -> Weights:
    """Choose the weight files of a checkpoint.

    The index's files if there is an index; else `model.safetensors`; else every safetensors file
    that is not an adapter, and not in Mistral's `consolidated` form if others exist. An index of
    which not one file is there describes no weights.

    Raises:
        CheckpointError: the index is damaged or names files outside the directory.
    """
    names = source.files()

    def has(name: str) -> bool:
        return name in names or source.exists(name)

    candidates = [
        n
        for n in names
        if n.endswith(".safetensors") and not n.startswith(("adapter_model", "tightfit-"))
    ]
    if has(MANIFEST) or (candidates and all(_RANK_FILE.fullmatch(n) for n in candidates)):
        return Weights(is_sharded=True)
    if has(INDEX):
        index = _read_index(source)
        files = tuple(sorted(set(index.values())))
        missing = tuple(f for f in files if not has(f))
        if missing != files:
            return Weights(files=files, index=index, missing=missing)
        candidates = []
    elif has("model.safetensors"):
        return Weights(files=("model.safetensors",))
    others = [n for n in candidates if not n.startswith("consolidated")]
    if found := tuple(others or candidates):
        return Weights(files=found, missing=_gaps(found))
    return Weights(
        unusable=tuple(
            n for n in names if n.endswith(OTHER_FORMATS) and not _NOT_WEIGHTS.fullmatch(n)
        )
    )


def read_config(source: Source, name: str = CONFIG) -> dict[str, Any]:
    """Read a model's `config.json`.

    Raises:
        ConfigError: it is missing, larger than any config, or not a JSON object.
    """
    if not source.exists(name):
        raise ConfigError(
            f"{source.label} has no {name}",
            hint="give the directory of a Hugging Face model, which has a config.json",
        )
    return _read_object(source, name, MAX_CONFIG_BYTES, ConfigError)


def _read_index(source: Source) -> dict[str, str]:
    where = f"{INDEX} of {source.label}"
    weight_map = _read_object(source, INDEX, MAX_INDEX_BYTES, CheckpointError).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{where} has no weight_map from tensor names to file names",
            hint="download the file again",
        )
    for tensor, file in weight_map.items():
        if not isinstance(file, str):
            raise CheckpointError(
                f"{where} gives {tensor!r} the file name {file!r:.80}, which is not text",
                hint="download the file again",
            )
    for file in set(weight_map.values()):
        safe_name(file, where)
    return weight_map


def _read_object(
    source: Source, name: str, limit: int, error: type[TightfitError]
) -> dict[str, Any]:
    where = f"{name} of {source.label}"
    size = source.size(name)
    if size > limit:
        raise error(
            f"{where} has {size} bytes, and {limit} are the most that is read",
            hint="check that it is the right file",
        )
    try:
        value = json.loads(source.read(name, 0, size).decode("utf-8"))
    except json.JSONDecodeError as e:
        raise error(
            f"{where} is not JSON: {e.msg} (line {e.lineno}, column {e.colno})",
            hint="correct that line, or download the file again",
        ) from e
    except RecursionError as e:
        raise error(f"{where} is nested too deeply", hint="download the file again") from e
    except ValueError as e:
        raise error(f"{where} is not JSON: {e}", hint="download the file again") from e
    if not isinstance(value, dict):
        raise error(
            f"{where} is not a JSON object but a {type(value).__name__}",
            hint="check that it is the right file",
        )
    return value


def _gaps(files: tuple[str, ...]) -> tuple[str, ...]:
    """Files of `-00001-of-00003` sets that are not among `files`."""
    missing = []
    for prefix, total in {(m[1], m[3]) for n in files if (m := _NUMBERED.fullmatch(n))}:
        for i in range(1, int(total) + 1):
            name = f"{prefix}-{i:05}-of-{total}.safetensors"
            if name not in files:
                missing.append(name)
    return tuple(sorted(missing))
