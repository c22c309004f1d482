"""What belongs to a model beside its weights: config, tokenizer, templates, code."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

from tightfit.checkpoint.checkpoint import Checkpoint
from tightfit.checkpoint.files import CONFIG, INDEX, OTHER_FORMATS
from tightfit.errors import CheckpointError

_BLOCK_BYTES = 2**23
_NOT_BESIDE = (".safetensors", *OTHER_FORMATS, ".index.json", ".partial")


@dataclass(frozen=True, slots=True, kw_only=True)
class SideFile:
    """A file beside the weights; `read` gives its bytes from one place to another."""

    name: str
    nbytes: int
    read: Callable[[int, int], bytes]

    def blocks(self) -> Iterator[bytes]:
        """All of it, a few megabytes at a time."""
        for start in range(0, self.nbytes, _BLOCK_BYTES):
            yield self.read(start, min(start + _BLOCK_BYTES, self.nbytes))


def copied_side_files(checkpoint: Checkpoint) -> tuple[SideFile, ...]:
    """All that are as in the source.

    Raises:
        CheckpointError: one cannot be read, or is a link that leads out of the source, or nowhere.
    """
    source = checkpoint.source
    lost = [n for n in source.others() if not n.endswith("/") and _is_beside(n)]
    if lost:
        raise CheckpointError(
            f"{lost[0]} of {source.label} is a link that leads nowhere"
            + (f", and so are {len(lost) - 1} more" if len(lost) > 1 else ""),
            hint="the download is incomplete; download the missing files, or remove the links",
        )
    return tuple(
        SideFile(name=name, nbytes=source.size(name), read=partial(source.read, name))
        for name in side_files(checkpoint)
    )


def side_files(checkpoint: Checkpoint) -> Iterator[str]:
    """Names of all files but the config, the weights, their index and a manifest of ours."""
    return filter(_is_beside, checkpoint.source.files())


def left_behind(checkpoint: Checkpoint) -> Iterator[str]:
    """A line that names subdirectories, of which nothing is copied, if there are any."""
    weights = {file.partition("/")[0] for file in checkpoint.files if "/" in file}
    found = [name.rstrip("/") for name in checkpoint.source.others() if name.endswith("/")]
    found = [name for name in found if name not in weights and not name.startswith((".", "__"))]
    if found:
        yield (
            f"subdirectories of {checkpoint.name} are not copied ({', '.join(found)}): copy those "
            "that the model needs"
        )


def _is_beside(name: str) -> bool:
    if name in (CONFIG, INDEX) or name.startswith("tightfit-"):
        return False
    return not name.endswith(_NOT_BESIDE)


def config_text(config: Mapping[str, object]) -> str:
    """A config as transformers spells it; escaped where it holds what UTF-8 has no bytes for."""
    text = json.dumps(config, indent=2, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        text = json.dumps(config, indent=2)
    return text + "\n"
