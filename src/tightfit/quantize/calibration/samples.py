"""Calibration text as windows of tokens."""

import json
import random
from codecs import getincrementaldecoder
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from tightfit.checkpoint.checkpoint import Checkpoint
from tightfit.errors import UsageError
from tightfit.quantize.calibration.options import CalibrationOptions
from tightfit.runtime.text import Text
from tightfit.units import MiB

_LARGEST_BYTES = 64 * MiB
"""Of a file; the rest of a longer one is not read."""


def token_windows(
    checkpoint: Checkpoint,
    options: CalibrationOptions,
    warn: Callable[[str], None] = lambda text: None,
) -> Tensor:
    """int64 `[samples, length]`: windows of the text that do not overlap, drawn by the seed.

    Each begins with the token that the model expects at the beginning of a text, if any.

    Raises:
        UsageError: a file cannot be read or is not what its name says, or the text is too short.
    """
    text = Text(checkpoint)
    first = text.first_ids
    documents = (document for path in options.texts for document in _documents(path))
    ids = text.tokenizer.encode("\n\n".join(documents), add_special_tokens=False).ids
    step = options.length - len(first)
    count = len(ids) // step
    if not count:
        raise UsageError(
            f"the calibration text has {len(ids)} tokens, and a sample has {options.length}",
            hint="give a longer text, or --calibration-length",
        )
    if count < options.samples:
        warn(f"the calibration text has {count} samples of {options.length} tokens, not more")
    chosen = random.Random(options.seed).sample(range(count), min(options.samples, count))
    return torch.tensor([first + ids[step * i : step * (i + 1)] for i in sorted(chosen)])


def _documents(path: Path) -> Iterator[str]:
    text, is_cut = _text(path)
    if path.suffix.lower() != ".jsonl":
        yield text
        return
    # JSON strings may hold all that `splitlines` splits at beside this.
    lines = text.split("\n")
    if is_cut:
        lines.pop()
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield _text_of(line, path, number)


def _text(path: Path) -> tuple[str, bool]:
    """A file, and whether it is longer than what is read of it."""
    try:
        with open(path, "rb") as file:
            data = file.read(_LARGEST_BYTES + 1)
    except OSError as error:
        raise UsageError(
            f"cannot read the calibration text {path}: {error.strerror or error}",
            hint="check the path",
        ) from error
    is_cut = len(data) > _LARGEST_BYTES
    decoder = getincrementaldecoder("utf-8-sig")()
    try:
        # A character that the end has cut in two is left out.
        return decoder.decode(data[:_LARGEST_BYTES], final=not is_cut), is_cut
    except UnicodeDecodeError as error:
        raise UsageError(
            f"the calibration text {path} is no UTF-8: {error.reason} at byte {error.start:,}",
            hint="give a .txt or .jsonl file in UTF-8",
        ) from None


def _text_of(line: str, path: Path, number: int) -> str:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        value = None
    found = value.get("text") if isinstance(value, dict) else None
    if not isinstance(found, str):
        raise UsageError(
            f"line {number} of {path} is not a JSON object with a `text`",
            hint="a .jsonl file has one such object on each line; others are .txt",
        )
    return found
