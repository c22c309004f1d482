"""`tightfit verify` of a quantized checkpoint: what was written, and what its source gives?"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from tightfit.checkpoint.checkpoint import open_checkpoint
from tightfit.checkpoint.source import Source
from tightfit.errors import TightfitError, UsageError, VerificationError
from tightfit.quantize.manifest import NAME, Manifest, problems_beside, read_manifest
from tightfit.quantize.recipe_file import DATA_FREE, wish_of
from tightfit.sharding.boxes import whole
from tightfit.sharding.manifest import StoredFile
from tightfit.sharding.progress import Progress
from tightfit.sharding.proof.content import damages, differences
from tightfit.sharding.proof.headers import file_problems


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What was checked, and every difference that was found."""

    manifest: Manifest
    compared_with_source: bool
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """No problem was found."""
        return not self.problems

    @property
    def tensors(self) -> int:
        """How many there are."""
        return sum(len(file.tensors) for file in self.manifest.files)

    @property
    def nbytes(self) -> int:
        """Of all files."""
        return sum(file.nbytes for file in self.manifest.files)

    def to_json(self, directory: str) -> dict[str, Any]:
        """The document of `--json`."""
        return {
            "schema": 1,
            "directory": directory,
            "ok": self.ok,
            "source": self.manifest.source_name,
            "method": self.manifest.method,
            "recipe": dict(self.manifest.recipe),
            "tensors": self.tensors,
            "total_bytes": self.nbytes,
            "compared_with_source": self.compared_with_source,
            "problems": list(self.problems),
        }


def verify(place: Source, progress: Progress, against: str | None) -> Report:
    """Check headers and checksums, and with `against`, a model, make everything once more.

    Raises:
        VerificationError: the manifest is damaged, or `against` cannot be quantized so.
        UsageError: it was calibrated, and `against` is given.
        TightfitError: `against` cannot be opened.
    """
    manifest = read_manifest(place)
    if against is not None and (manifest.method not in DATA_FREE or manifest.job["calibration"]):
        raise UsageError(
            f"{place.label} was calibrated ({manifest.method}), and cannot be made again for this",
            hint="without --against its checksums are verified",
        )
    problems = [*_strays(place, manifest), *problems_beside(place, manifest)]
    good = []
    for file in manifest.files:
        found = [*file_problems(place, file)]
        problems += found
        if not found:
            good.append(file)
    problems += damages(place, good, progress)
    if against is not None:
        problems += _against(place, manifest, good, against, progress)
    return Report(
        manifest=manifest, compared_with_source=against is not None, problems=tuple(problems)
    )


def _strays(place: Source, manifest: Manifest) -> Iterator[str]:
    listed = {file.name for file in manifest.files}
    for name in place.files():
        if name.endswith(".safetensors") and name not in listed:
            yield f"{name} is not in {NAME}; engines would load it as well"


def _against(
    place: Source,
    manifest: Manifest,
    files: list[StoredFile],
    against: str,
    progress: Progress,
) -> list[str]:
    """What is made of the model in the same way, held against what is there."""
    wish = wish_of(manifest.recipe, NAME)
    from tightfit.quantize.dequantize import open_dequantized
    from tightfit.quantize.job import prepare

    source = open_checkpoint(against, download=True)
    try:
        # Of a quantized one what it stands for, as for --dequantize.
        source = open_dequantized(source)
        # One file of each tensor, computed when it is compared.
        job = prepare(source, wish, method=manifest.method)
    except TightfitError as error:
        raise VerificationError(
            f"{against} cannot be what {place.label} was made from: {error.message}",
            hint=f"it was quantized from {manifest.source_name}",
        ) from error
    made, there = job.virtual.tensors(), {one.name for file in files for one in file.tensors}
    problems = [
        f"there is no {name!r}, which {against} gives" for name in made if name not in there
    ]
    todo = []
    for file in files:
        same = [t for t in file.tensors if t.name in made and made[t.name].shape == t.shape]
        names = {one.name for one in same}
        problems += [
            f"{file.name}: {one.name!r} is nothing that {against} gives"
            for one in file.tensors
            if one.name not in names
        ]
        pieces = {name: (whole(made[name], name),) for name in names}
        todo.append(replace(file, tensors=tuple(replace(t, pieces=pieces[t.name]) for t in same)))
    return [*problems, *differences(place, todo, job.virtual, progress)]
