"""Whether rank files are those of their manifest, as far as their headers tell.

vLLM's loader looks at names only. A tensor of another shape it loads into a corner of the
parameter, one of another dtype it converts, and a file too many it reads like the others.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from tightfit.checkpoint.header import TensorInfo, read_header
from tightfit.checkpoint.source import LocalSource, Source, safe_name
from tightfit.errors import CheckpointError, VerificationError
from tightfit.sharding.manifest import Manifest, StoredFile


def require_headers(directory: Path, manifest: Manifest) -> None:
    """Refuse files that are not those that the manifest describes, without reading them.

    Raises:
        VerificationError: they are not; the message names the first difference.
    """
    source = LocalSource(directory)
    found = [*stray_files(source, manifest)]
    for file in manifest.files:
        found += file_problems(source, file)
    if found:
        others = f" (and {len(found) - 1:,} more)" if len(found) > 1 else ""
        raise VerificationError(
            f"{directory}: {found[0]}{others}",
            hint="run `tightfit verify`, or shard the model again",
        )


def stray_files(source: Source, manifest: Manifest) -> Iterator[str]:
    """Weights that nobody vouches for."""
    listed = {file.name for file in manifest.files}
    for name in source.files():
        if name.endswith(".safetensors") and name not in listed:
            yield f"{name} is not in the manifest; engines would load it as well"


def file_problems(source: Source, file: StoredFile) -> Iterator[str]:
    """Is the file there, and does its header agree with the manifest?"""
    try:
        name = safe_name(file.name, "the manifest")
        if not source.exists(name):
            yield f"{name} is missing"
            return
        header = read_header(
            name, source.size(name), lambda start, stop: source.read(name, start, stop)
        )
    except CheckpointError as error:
        yield error.message
    else:
        yield from disagreements(file, header)


def disagreements(file: StoredFile, header: Mapping[str, TensorInfo]) -> Iterator[str]:
    """What a header says otherwise than the manifest."""
    stored = {tensor.name: tensor for tensor in file.tensors}
    missing, unknown = stored.keys() - header.keys(), header.keys() - stored.keys()
    moved: list[str] = []
    other: list[str] = []
    for name in sorted(stored.keys() & header.keys()):
        wanted, found = stored[name], header[name]
        if wanted.dtype != found.dtype:
            other.append(f"{name!r} is {found.dtype}, and the manifest says {wanted.dtype}")
        elif wanted.shape != found.shape:
            shapes = list(found.shape), list(wanted.shape)
            other.append(f"{name!r} has the shape {shapes[0]}, and the manifest says {shapes[1]}")
        elif (wanted.offset, wanted.nbytes) != (found.offset, found.nbytes):
            moved.append(name)
    for name in sorted(missing):
        yield f"{file.name} lacks {name!r}, which the manifest says is there"
    for name in sorted(unknown):
        yield f"{file.name} has {name!r}, which the manifest does not know"
    for what in other:
        yield f"{file.name}: {what}"
    # What is otherwise makes all that follows it move.
    if moved and not (missing or unknown or other):
        yield _moved(file.name, moved)


def _moved(file: str, names: Iterable[str]) -> str:
    first, *rest = names
    others = f" and {len(rest):,} other tensors" if rest else ""
    return (
        f"{file}: {first!r}{others} are not where the manifest says: something else has written "
        "the file anew, which engines would load all the same"
    )
