"""What belongs to a model beside its weights: config, tokenizer, templates, code."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

from tightfit.checkpoint.checkpoint import Checkpoint
from tightfit.checkpoint.files import CONFIG, INDEX

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")


@dataclass(frozen=True, slots=True, kw_only=True)
class SideFile:
    """A file beside the weights; `read` gives its bytes from one place to another."""

    name: str
    nbytes: int
    read: Callable[[int, int], bytes]


def copied_side_files(checkpoint: Checkpoint) -> tuple[SideFile, ...]:
    """All that are as in the source.

    Raises:
        CheckpointError: one cannot be read, or is a link that leads out of the source.
    """
    source = checkpoint.source
    return tuple(
        SideFile(name=name, nbytes=source.size(name), read=partial(source.read, name))
        for name in side_files(checkpoint)
    )


def side_files(checkpoint: Checkpoint) -> Iterator[str]:
    """Names of all files but the config, the weights, their index and a manifest of ours."""
    for name in checkpoint.source.files():
        if name in (CONFIG, INDEX) or name.startswith("tightfit-"):
            continue
        if not name.endswith((*_WEIGHT_SUFFIXES, ".index.json", ".partial")):
            yield name


def config_text(config: Mapping[str, object]) -> str:
    """A config as transformers spells it."""
    return json.dumps(config, indent=2, ensure_ascii=False) + "\n"
