"""`tightfit-quantize.json`: how a checkpoint was quantized; checksums of tensors and other files.

Engines ignore it. The config comes after it, so that a directory with both is a complete one.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import xxhash

from tightfit import __version__
from tightfit.checkpoint.files import CONFIG, INDEX, find_weights, read_config
from tightfit.checkpoint.source import Source
from tightfit.errors import TightfitError, VerificationError
from tightfit.sharding.manifest import StoredFile, stored_files
from tightfit.sharding.origin import States, states_of
from tightfit.sharding.ranks import plain_journal, plain_manifest
from tightfit.sharding.side_files import SideFile

VERB = "quantize"
NAME, JOURNAL = plain_manifest(VERB), plain_journal(VERB)
FORMAT = "tightfit-quantize-1"
_LARGEST_BYTES = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What was done to which source, and what came of it.

    `recipe` is a document of `recipe_file`; `job` is what has to be the same to go on with it.
    """

    source_name: str
    recipe: Mapping[str, Any]
    job: Mapping[str, Any]
    files: tuple[StoredFile, ...]
    beside: Mapping[str, str] = field(default_factory=dict)
    """Checksums of the other files, by name; of older versions not of all, or of none."""
    source_states: States = field(default_factory=dict)
    """Of the weight files of the source; older versions have none."""
    tightfit: str = __version__

    @property
    def method(self) -> str:
        """How values were chosen."""
        return str(self.job["method"])

    def encoded(self) -> bytes:
        """The document."""
        document = {
            "format": FORMAT,
            "tightfit": self.tightfit,
            "source": self.source_name,
            **({"source_states": dict(self.source_states)} if self.source_states else {}),
            "recipe": dict(self.recipe),
            "job": dict(self.job),
            "beside": dict(self.beside),
            "files": [file.to_json() for file in self.files],
        }
        return json.dumps(document, separators=(",", ":")).encode()


def read_manifest(place: Source) -> Manifest:
    """The manifest of a quantized checkpoint.

    Raises:
        CheckpointError: there is none, or it cannot be read.
        VerificationError: it is not one of ours.
    """
    try:
        if place.size(NAME) > _LARGEST_BYTES:
            raise ValueError("it is larger than any manifest")
        document = json.loads(place.read(NAME))
        if document["format"] != FORMAT:
            raise ValueError(f"its format is not {FORMAT}")
        recipe, job = document["recipe"], document["job"]
        if not isinstance(recipe, dict) or not isinstance(job, dict):
            raise ValueError("no recipe or job")
        job["method"], job["calibration"]
        return Manifest(
            tightfit=str(document["tightfit"]),
            source_name=str(document["source"]),
            recipe=recipe,
            job=job,
            files=stored_files(document["files"]),
            beside=dict(document.get("beside", {})),
            source_states=states_of(document.get("source_states", {})),
        )
    except (
        *(KeyError, TypeError, ValueError, AttributeError),
        *(OverflowError, RecursionError),
    ) as error:
        raise VerificationError(
            f"{place.label}/{NAME} is damaged or of another version of tightfit: "
            f"{type(error).__name__}: {error!s:.80}",
            hint="quantize the model again",
        ) from None


def problems_beside(place: Source, manifest: Manifest) -> Iterator[str]:
    """What is wrong with the config and the index, and with what else is beside the weights."""
    yield from _config_problems(place, manifest)
    there = place.files()
    for name in manifest.beside:
        if name in (CONFIG, INDEX):
            continue
        if name not in there:
            yield f"{name} is missing, which belongs beside the weights"
        elif _differs(place, name, manifest):
            yield f"{name} is not the one that was written"


def _config_problems(place: Source, manifest: Manifest) -> Iterator[str]:
    try:
        config, index = read_config(place), find_weights(place).index
    except TightfitError as error:
        yield error.message
        return
    if config.get("quantization_config") != manifest.job.get("quantization_config"):
        yield f"the quantization_config in {CONFIG} is not the one that was written"
    elif _differs(place, CONFIG, manifest):
        yield f"{CONFIG} is not the one that was written"
    files = {one.name: file.name for file in manifest.files for one in file.tensors}
    if not place.exists(INDEX):
        if len(manifest.files) > 1:
            yield f"{INDEX} is missing, which says that the weights are several files"
    elif index != files or _differs(place, INDEX, manifest):
        yield f"{INDEX} is not the one that was written"


def digest(blocks: Iterable[bytes]) -> str:
    """The checksum of a file beside the weights."""
    found = xxhash.xxh3_128()
    for data in blocks:
        found.update(data)
    return found.hexdigest()


def _differs(place: Source, name: str, manifest: Manifest) -> bool:
    there = manifest.beside.get(name)
    here = SideFile(name=name, nbytes=place.size(name), read=partial(place.read, name))
    return there is not None and there != digest(here.blocks())
