"""A sharded directory, seen as the tensors of the checkpoint that it was made of.

Its manifest says which boxes of which source tensors each tensor holds. Directories without one, as
vLLM's own script leaves them, are read through the layout that their config and names imply.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import product
from math import prod
from typing import NoReturn

from tightfit.checkpoint.checkpoint import Checkpoint
from tightfit.checkpoint.describe import describe
from tightfit.checkpoint.files import MANIFEST
from tightfit.checkpoint.header import TensorInfo, read_header
from tightfit.checkpoint.source import Source
from tightfit.errors import (
    CheckpointError,
    LayoutError,
    UnsupportedModelError,
    VerificationError,
)
from tightfit.model.layout import Parallel, Piece, RankTensor
from tightfit.model.stored import LAYOUTS, rank_tensors
from tightfit.sharding.boxes import Held, Owned, Replica, compose, key, own
from tightfit.sharding.manifest import ORIGINALS, Manifest, StoredFile, read_manifest
from tightfit.sharding.proof.headers import disagreements
from tightfit.sharding.ranks import not_whole
from tightfit.units import dtype_bytes

_RANK_FILE = re.compile(r"model-(?:pp-(\d{1,6})-tp-|rank-)(\d{1,6})-part-(\d{1,9})\.safetensors")
_AGAIN = "shard the model again, or give the model that it was made from"


@dataclass(frozen=True, kw_only=True)
class RankFiles:
    """Everything about a sharded directory before its weights are read.

    `held` lists, by source tensor, every box that some rank holds, rank by rank; `sources` are the
    source tensors themselves, as far as anybody can know: their files and offsets mean nothing.
    `originals` are source tensors that are kept whole beside the ranks.
    """

    checkpoint: Checkpoint
    manifest: Manifest | None
    layout: str
    parallel: Parallel
    files: Mapping[str, Mapping[str, TensorInfo]]
    held: Mapping[str, tuple[Held, ...]]
    sources: Mapping[str, TensorInfo]
    originals: Mapping[str, TensorInfo]

    @cached_property
    def owned(self) -> Mapping[str, tuple[Owned, ...]]:
        """By source tensor, disjoint boxes and the only place where each is read."""
        return {name: owned for name, (owned, _) in self._ownership.items()}

    @cached_property
    def replicas(self) -> tuple[Replica, ...]:
        """What is in several places, and has to be the same everywhere."""
        return tuple(one for _, replicas in self._ownership.values() for one in replicas)

    @cached_property
    def infos(self) -> Mapping[str, TensorInfo]:
        """All tensors of all files by `boxes.key`."""
        headers = self.files.values()
        return {key(info): info for header in headers for info in header.values()}

    def compose(self, wanted: Piece) -> tuple[Piece, ...]:
        """A box of a source tensor, as boxes of tensors of the files.

        Raises:
            CheckpointError: the files do not hold all of it, or hold it otherwise cut.
        """
        if wanted.view != self.view(wanted.source) and wanted.source in self.held:
            raise CheckpointError(
                f"{self.checkpoint.name} holds {wanted.source!r} in slices that do not fit its "
                "config.json",
                hint="config.json or the manifest was changed; " + _AGAIN,
            )
        pieces, missing = compose(wanted, self.owned.get(wanted.source, ()))
        if missing:
            raise CheckpointError(
                f"{self.checkpoint.name} lacks {missing:,} elements of {wanted.source!r}",
                hint="the files of a rank or a part are missing; run `tightfit verify`",
            )
        return pieces

    def view(self, source: str) -> tuple[int, ...] | None:
        """What the boxes of a source tensor see it as, where that is not its shape."""
        held = self.held.get(source)
        return held[0].piece.view if held else None

    @cached_property
    def _ownership(self) -> Mapping[str, tuple[tuple[Owned, ...], tuple[Replica, ...]]]:
        return {name: own(held) for name, held in self.held.items()}


def open_rank_files(checkpoint: Checkpoint) -> RankFiles:
    """Read the headers and the manifest of a sharded checkpoint.

    Raises:
        CheckpointError: it is not sharded, or ranks or tensors are missing.
        VerificationError: the files are not what the manifest says.
        LayoutError: there is no manifest, and no known layout of this model has these tensors.
    """
    source = checkpoint.source
    names = [name for name in source.files() if _RANK_FILE.fullmatch(name)]
    if source.exists(MANIFEST):
        manifest = read_manifest(source)
        return _by_manifest(checkpoint, source, manifest)
    if error := not_whole(source):
        raise error
    headers = _headers(source, names)
    kept = {ORIGINALS: _header(source, ORIGINALS)} if source.exists(ORIGINALS) else {}
    return _by_layout(checkpoint, headers, kept)


def _header(source: Source, name: str) -> Mapping[str, TensorInfo]:
    return read_header(name, source.size(name), lambda start, stop: source.read(name, start, stop))


def _headers(source: Source, names: Sequence[str]) -> dict[str, Mapping[str, TensorInfo]]:
    """Several at a time, for the round trips to distant ones."""
    with ThreadPoolExecutor(max_workers=8) as pool:
        return dict(zip(names, pool.map(partial(_header, source), names), strict=True))


def _by_manifest(checkpoint: Checkpoint, source: Source, manifest: Manifest) -> RankFiles:
    listed = {file.name for file in manifest.files}
    stray = [n for n in source.files() if _RANK_FILE.fullmatch(n) and n not in listed]
    if stray:
        raise VerificationError(
            f"{source.label} holds {stray[0]!r}, which its manifest does not know",
            hint="remove it, or run `tightfit verify`",
        )
    files = _headers(source, [file.name for file in manifest.files])
    held: defaultdict[str, list[Held]] = defaultdict(list)
    for file in manifest.files:
        header = files[file.name]
        _check_header(file, header)
        if file.name == ORIGINALS:
            continue
        for tensor in file.tensors:
            info = header[tensor.name]
            for piece in tensor.pieces:
                held[piece.source].append(Held(tensor=info, piece=piece))
    layout = LAYOUTS.get(manifest.layout)
    parallel = manifest.parallel(uneven=layout is not None and layout.uneven)
    return _assembled(checkpoint, manifest, manifest.layout, parallel, files, held)


def _by_layout(
    checkpoint: Checkpoint,
    headers: Mapping[str, Mapping[str, TensorInfo]],
    kept: Mapping[str, Mapping[str, TensorInfo]],
) -> RankFiles:
    pp_size, tp_size = sizes_by_names(checkpoint.name, headers)
    spec = describe(checkpoint).spec
    if spec.quantization is not None:
        raise LayoutError(
            f"{checkpoint.name} is quantized and has no {MANIFEST}: kernels may have rearranged "
            "its weights, and nothing says of which tensors they were made",
            hint=_AGAIN,
        )
    why: list[str] = []
    for layout, expert_parallel in product(LAYOUTS.values(), (False, True)):
        parallel = Parallel(
            tensor_parallel_size=tp_size,
            pipeline_parallel_size=pp_size,
            expert_parallel=expert_parallel,
            uneven=layout.uneven,
        )
        held: defaultdict[str, list[Held]] = defaultdict(list)
        try:
            for rank in parallel.ranks():
                of_rank: dict[str, TensorInfo] = {}
                for name in headers:
                    if _rank_of(name) == (rank.pp_rank, rank.tp_rank):
                        _add(of_rank, headers[name])
                expected = rank_tensors(spec, rank, layout)
                _check_expected(f"rank {rank.rank}", expected, of_rank)
                for tensor in expected:
                    info = of_rank[tensor.name]
                    for piece in tensor.pieces:
                        held[piece.source].append(Held(tensor=info, piece=piece))
        except (LayoutError, UnsupportedModelError) as error:
            why.append(error.message)
            continue
        files = {**headers, **kept}
        return _assembled(checkpoint, None, layout.name, parallel, files, held)
    raise LayoutError(
        f"{checkpoint.name} has no {MANIFEST}, and its files are not those of any known layout: "
        + why[0],
        hint="its config.json, its quantization or its version of vLLM may differ; " + _AGAIN,
    )


def _assembled(
    checkpoint: Checkpoint,
    manifest: Manifest | None,
    layout: str,
    parallel: Parallel,
    files: Mapping[str, Mapping[str, TensorInfo]],
    held: Mapping[str, list[Held]],
) -> RankFiles:
    sources: dict[str, TensorInfo] = {}
    originals = dict(files.get(ORIGINALS, {}))
    for name, members in held.items():
        dtype, shape = members[0].tensor.dtype, members[0].piece.source_shape
        for one in members:
            if (one.tensor.dtype, one.piece.source_shape, one.piece.view) != (
                dtype,
                shape,
                members[0].piece.view,
            ):
                _disagree(name, members[0], one)
        sources[name] = TensorInfo(
            name=name,
            dtype=dtype,
            shape=shape,
            file="",
            offset=0,
            nbytes=dtype_bytes(dtype, prod(shape)),
        )
    return RankFiles(
        checkpoint=checkpoint,
        manifest=manifest,
        layout=layout,
        parallel=parallel,
        files=files,
        held={name: tuple(members) for name, members in held.items()},
        sources=sources,
        originals=originals,
    )


def _check_header(file: StoredFile, header: Mapping[str, TensorInfo]) -> None:
    for difference in disagreements(file, header):
        raise VerificationError(difference, hint=_AGAIN)


def _check_expected(
    rank: str, expected: Iterable[RankTensor], found: Mapping[str, TensorInfo]
) -> None:
    wanted = {tensor.name: tensor.shape for tensor in expected}
    for name, shape in wanted.items():
        if name not in found:
            raise LayoutError(f"{rank} lacks {name!r}")
        if found[name].shape != shape:
            raise LayoutError(
                f"{rank}: {name!r} has the shape {list(found[name].shape)}, and config.json says "
                f"{list(shape)}"
            )
    for name in found:
        if name not in wanted:
            raise LayoutError(f"{rank} has {name!r}, which is not known")


def sizes_by_names(where: str, names: Iterable[str]) -> tuple[int, int]:
    """Pipeline and tensor parallel size, as the names of rank files imply.

    Raises:
        CheckpointError: there are none, or not those of all ranks.
    """
    ranks = {_rank_of(name) for name in names if _RANK_FILE.fullmatch(name)}
    if not ranks:
        raise CheckpointError(f"{where} has no rank files", hint="check the path")
    pp_size, tp_size = (max(r[i] for r in ranks) + 1 for i in (0, 1))
    if len(ranks) != pp_size * tp_size:
        missing = next(
            (pp, tp) for pp in range(pp_size) for tp in range(tp_size) if (pp, tp) not in ranks
        )
        raise CheckpointError(
            f"{where} lacks the files of rank {missing[0] * tp_size + missing[1]}",
            hint="copy the files of all ranks into one directory",
        )
    return pp_size, tp_size


def _rank_of(name: str) -> tuple[int, int]:
    match = _RANK_FILE.fullmatch(name)
    assert match is not None
    return int(match[1] or 0), int(match[2])


def _add(tensors: dict[str, TensorInfo], header: Mapping[str, TensorInfo]) -> None:
    for name, info in header.items():
        if name in tensors:
            raise CheckpointError(
                f"{name!r} is both in {tensors[name].file} and in {info.file}",
                hint="one of them is left over from an earlier save; remove it",
            )
        tensors[name] = info


def _disagree(name: str, one: Held, other: Held) -> NoReturn:
    raise VerificationError(
        f"{one.tensor.file} and {other.tensor.file} disagree about the dtype or shape of {name!r}",
        hint=_AGAIN,
    )
