"""`tightfit-quantize.json`: how a checkpoint was quantized, and a checksum of every tensor.

Engines ignore it. The config comes after it, so that a directory with both is a complete one.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tightfit import __version__
from tightfit.checkpoint.source import Source
from tightfit.errors import VerificationError
from tightfit.sharding.manifest import StoredFile, stored_files

NAME = "tightfit-quantize.json"
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
            "recipe": dict(self.recipe),
            "job": dict(self.job),
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
