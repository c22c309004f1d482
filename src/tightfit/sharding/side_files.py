"""What belongs to a model beside its weights: config, tokenizer, templates, code."""

import json
from collections.abc import Iterator, Mapping

from tightfit.checkpoint.checkpoint import Checkpoint
from tightfit.checkpoint.files import CONFIG, INDEX

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")


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
