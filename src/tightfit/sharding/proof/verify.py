"""`tightfit verify`: is a sharded checkpoint what its manifest says, and what its source holds?"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tightfit.checkpoint.checkpoint import Checkpoint
from tightfit.checkpoint.describe import require_weights, with_modelopt
from tightfit.checkpoint.files import MANIFEST, find_weights
from tightfit.checkpoint.source import LocalSource, Source
from tightfit.errors import CheckpointError, TightfitError, VerificationError
from tightfit.model.families import model_spec
from tightfit.model.layout import Rank, RankTensor
from tightfit.model.stored import rank_tensors, stored_layout
from tightfit.sharding.manifest import (
    ORIGINALS,
    Manifest,
    StoredFile,
    StoredTensor,
    read_manifest,
)
from tightfit.sharding.parts import file_name, natural
from tightfit.sharding.progress import Progress
from tightfit.sharding.proof.content import damages, differences
from tightfit.sharding.proof.headers import file_problems, stray_files
from tightfit.sharding.rank_files import sizes_by_names
from tightfit.sharding.ranks import not_whole


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What was checked, and every difference that was found."""

    manifest: Manifest
    tensors: int
    nbytes: int
    compared_with_source: bool
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """No problem was found."""
        return not self.problems


def verify(
    directory: Path | Source,
    config: dict[str, object],
    progress: Progress,
    against: Checkpoint | None,
) -> Report:
    """Check structure and checksums, and with `against` every byte.

    The directory may be distant; then all of it is read over the network.

    Raises:
        VerificationError: there is no readable manifest.
        CheckpointError: `against` has no weights.
    """
    manifest = read_manifest(directory)
    place = LocalSource(directory) if isinstance(directory, Path) else directory
    if against is not None:
        require_weights(against, "verify")
    problems = [*_structure(place, config, manifest), *_unlike(manifest)]
    good: list[StoredFile] = []
    for file in manifest.files:
        found = list(file_problems(place, file))
        problems += found
        if not found:
            good.append(file)
    problems += damages(place, good, progress)
    if against is not None:
        problems += differences(place, good, against, progress)
    return Report(
        manifest=manifest,
        tensors=sum(len(file.tensors) for file in manifest.files),
        nbytes=sum(file.nbytes for file in manifest.files),
        compared_with_source=against is not None,
        problems=tuple(problems),
    )


def require_manifest(source: Source) -> None:
    """Say what a directory is that has no manifest, as far as its files tell.

    Raises:
        CheckpointError: it is a plain checkpoint.
        VerificationError: it has rank files, and nothing vouches for them.
    """
    if source.exists(MANIFEST):
        return
    if error := not_whole(source):
        raise error
    weights = find_weights(source)
    if weights.files:
        raise CheckpointError(
            f"{source.label} is a plain checkpoint ({weights.files[0]}), and not an output of "
            "`tightfit shard`",
            hint="it has no checksums of its own; --against MODEL compares it with another",
        )
    if weights.is_sharded:
        stages, size = sizes_by_names(source.label, source.files())
        raise VerificationError(
            f"{source.label} has rank files for tensor parallel size {size}"
            + (f" and {stages} pipeline stages" if stages > 1 else "")
            + f", but no {MANIFEST} that vouches for them",
            hint="if vLLM's own script made it, `tightfit shard DIR OUT` checks its names, shapes "
            "and copies and writes one with a manifest",
        )


def check_tensor_parallel_size(manifest: Manifest, asked: int | None, where: str) -> int:
    """The size that the files were cut for.

    Raises:
        VerificationError: another one was asked for: engines would load it and talk nonsense.
    """
    size = manifest.tensor_parallel_size
    if asked is not None and asked != size:
        raise VerificationError(
            f"{where} was sharded for tensor parallel size {size}, not {asked}",
            hint=f"use --tensor-parallel-size {size}, or shard the model again for {asked}",
        )
    return size


def _structure(source: Source, config: dict[str, object], manifest: Manifest) -> Iterator[str]:
    """Does the manifest describe what this layout demands of this config?"""
    yield from stray_files(source, manifest)
    try:
        spec = model_spec(with_modelopt(config, source))
        layout = stored_layout(manifest.layout)
        parallel = manifest.parallel(uneven=layout.uneven)
        shapes = {
            piece.source: piece.source_shape
            for file in manifest.files
            for tensor in file.tensors
            for piece in tensor.pieces
        }
        for rank in parallel.ranks():
            yield from _misnamed(rank, manifest)
            expected = {t.name: _settled(t, shapes) for t in rank_tensors(spec, rank, layout)}
            files = manifest.rank_files(rank.rank)
            stored = {t.name: t for file in files for t in file.tensors}
            for name in sorted(expected.keys() - stored.keys()):
                yield f"rank {rank.rank} lacks {name!r}"
            for name in sorted(stored.keys() - expected.keys()):
                yield f"rank {rank.rank} has {name!r}, which layout {layout.name} does not want"
            for name in sorted(expected.keys() & stored.keys()):
                wanted, found = expected[name], stored[name]
                if wanted.shape != found.shape:
                    yield (
                        f"rank {rank.rank}: {name!r} has the shape {list(found.shape)}, and "
                        f"config.json says {list(wanted.shape)}"
                    )
                elif (wanted.pieces, wanted.fill) != (found.pieces, found.fill):
                    yield f"rank {rank.rank}: {name!r} holds the slices of another rank or model"
    except TightfitError as error:
        yield f"config.json does not fit the manifest: {error.message}"


def _settled(tensor: RankTensor, shapes: Mapping[str, tuple[int, ...]]) -> RankTensor:
    """As the config wants it where the sources have other sizes: then that is the difference."""
    try:
        return tensor.settled(shapes)
    except CheckpointError:
        return tensor


def _misnamed(rank: Rank, manifest: Manifest) -> Iterator[str]:
    """Engines go by the names of files, whatever rank a manifest has them belong to."""
    found = [file.name for file in manifest.rank_files(rank.rank)]
    wanted = [file_name(rank, number) for number in range(len(found))]
    for name in sorted(set(found).difference(wanted), key=natural):
        yield f"{name} is listed as a file of rank {rank.rank}, which has {_names(wanted)}"
    if len(set(found)) < len(found):
        yield f"rank {rank.rank} has a file that is listed twice"


def _names(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"


def _unlike(manifest: Manifest) -> Iterator[str]:
    """Ranks that hold the same boxes, and other bytes: norms, routers, copied heads."""
    first: dict[tuple[object, ...], tuple[StoredFile, StoredTensor]] = {}
    unlike: dict[tuple[int, int], list[str]] = {}
    for file in manifest.files:
        for tensor in file.tensors:
            if not tensor.pieces or file.name == ORIGINALS:
                continue
            what = (tensor.dtype, tensor.shape, tensor.fill, tensor.pieces)
            owner, same = first.setdefault(what, (file, tensor))
            if same.xxh3 != tensor.xxh3:
                unlike.setdefault((owner.rank, file.rank), []).append(tensor.name)
    for (one, other), names in unlike.items():
        more = f" and {len(names) - 1:,} more" if len(names) > 1 else ""
        yield (
            f"rank {one} and rank {other} hold different {names[0]!r}{more}: they were cut from "
            "different checkpoints"
        )
