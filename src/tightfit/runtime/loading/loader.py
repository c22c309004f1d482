"""Weights from files to a rank's parameters.

Three sources give the same thing, a dictionary of parameters by name: rank files of `tightfit
shard`, whose tensors are used where they lie in the file; a plain checkpoint, of which a rank reads
the boxes that its `RankTensor`s name; or nothing but the shapes (`load_format` dummy). A tensor
that must be cut, fused or converted, or that goes to a GPU, is copied in chunks (`reads`).
"""

from collections.abc import Iterable, Mapping, Sequence
from math import prod
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from tightfit.checkpoint.checkpoint import Checkpoint
from tightfit.checkpoint.header import TensorInfo
from tightfit.errors import CheckpointError
from tightfit.model.layout import Piece, RankTensor
from tightfit.runtime.loading.files import TORCH_DTYPES, FetchedFile, TensorFile, WeightFile
from tightfit.runtime.loading.reads import Read, carry_out, copy, keep

NO_DTYPES: Mapping[str, torch.dtype] = MappingProxyType({})


def load_rank_files(
    files: Sequence[Path],
    expected: Sequence[RankTensor],
    *,
    dtype: torch.dtype,
    device: torch.device,
    dtypes: Mapping[str, torch.dtype] = NO_DTYPES,
) -> dict[str, Tensor]:
    """Load one rank's files.

    Args:
        files: all files of the rank.
        expected: what must be in them, named as in the files (`model.stored.rank_tensors`).
        dtype: what to compute in; tensors of another floating dtype are converted.
        device: where to.
        dtypes: of parameters that have their own: what stands for quantized matrices.

    Raises:
        CheckpointError: a tensor is missing, or has another shape or dtype than expected.
    """
    opened = {path.name: TensorFile(path) for path in files}
    found = {name: info for file in opened.values() for name, info in file.tensors.items()}
    reads: list[Read] = []
    weights: dict[str, Tensor] = {}
    for tensor in expected:
        if tensor.parameter is None:
            continue
        where = ", ".join(path.name for path in files[:2]) + (", ..." if len(files) > 2 else "")
        if tensor.name not in found:
            raise CheckpointError(
                f"{where or 'the checkpoint'} has no tensor {tensor.name!r}",
                hint="these are not the files of this rank and model; run `tightfit verify`, or "
                "shard again",
            )
        info = found[tensor.name]
        if info.shape != tensor.shape:
            raise CheckpointError(
                f"tensor {tensor.name!r} in {info.file} has shape {list(info.shape)}, and this "
                f"rank needs {list(tensor.shape)}",
                hint="the files are of another model or tensor parallel size; shard again",
            )
        own = dtypes.get(tensor.parameter)
        source = _readable(opened[info.file].view(info), info, own)
        weights[tensor.parameter] = _take(
            opened[info.file], info, source, own or dtype, device, reads
        )
    carry_out(reads, device)
    return weights


def load_checkpoint(
    checkpoint: Checkpoint,
    expected: Sequence[RankTensor],
    *,
    dtype: torch.dtype,
    device: torch.device,
    dtypes: Mapping[str, torch.dtype] = NO_DTYPES,
) -> dict[str, Tensor]:
    """Load a rank's share of a plain checkpoint.

    Args:
        checkpoint: with local files, or others, which are then read into memory.
        expected: the rank's tensors; the pieces say where their elements are.
        dtype: what to compute in; tensors of another floating dtype are converted.
        device: where to.
        dtypes: of parameters that have their own: what stands for quantized matrices.

    Raises:
        CheckpointError: a tensor is missing, or has another shape or dtype than the config says.
    """
    tensors = checkpoint.tensors()
    _check_sources(checkpoint, tensors, expected)
    files: dict[str, WeightFile] = {}

    def find(piece: Piece) -> tuple[WeightFile, TensorInfo]:
        info = tensors[piece.source]
        if info.file not in files:
            path = checkpoint.source.local_path(info.file)
            if path is None:
                files[info.file] = FetchedFile(info.file, checkpoint.source)
            else:
                files[info.file] = TensorFile(path)
        return files[info.file], info

    reads: list[Read] = []
    weights: dict[str, Tensor] = {}
    for tensor in expected:
        assert tensor.parameter is not None
        own = dtypes.get(tensor.parameter)

        def view(
            file: WeightFile, info: TensorInfo, piece: Piece, own: torch.dtype | None = own
        ) -> Tensor:
            source = _readable(file.view(info), info, own)
            return source if piece.view is None else source.view(piece.view)

        if whole := _whole_source(tensor):
            file, info = find(whole)
            source = view(file, info, whole).view(tensor.shape)
            weights[tensor.parameter] = _take(file, info, source, own or dtype, device, reads)
            continue
        target = torch.empty(tensor.shape, dtype=own or dtype, device=device)
        if sum(prod(piece.shape) for piece in tensor.pieces) < target.numel():
            target.fill_(tensor.fill)
        for piece in tensor.pieces:
            file, info = find(piece)
            source = _box(view(file, info, piece), piece.start, piece.shape)
            depth = len(tensor.shape) - len(piece.shape)
            corner = target[piece.at[:depth]]
            if piece.transposed:
                into = _box(corner, piece.at[depth:], source.mT.shape).mT
            else:
                into = _box(corner, piece.at[depth:], source.shape)
            reads += copy(file, info, source, into)
        weights[tensor.parameter] = target
    carry_out(reads, device)
    for tensor in expected:
        if any(piece.decay for piece in tensor.pieces):
            assert tensor.parameter is not None
            weights[tensor.parameter] = weights[tensor.parameter].exp().neg_()
    return weights


def load_dummy(
    expected: Sequence[RankTensor],
    *,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
    dtypes: Mapping[str, torch.dtype] = NO_DTYPES,
) -> dict[str, Tensor]:
    """Small random weights of the right shapes, from no files at all; constants for scales."""
    generator = torch.Generator(device=device).manual_seed(seed)
    weights: dict[str, Tensor] = {}
    for tensor in expected:
        name = tensor.parameter
        assert name is not None
        weight = torch.empty(tensor.shape, dtype=dtypes.get(name, dtype), device=device)
        if any(piece.decay for piece in tensor.pieces):
            weight.fill_(-1)
        elif name not in dtypes or (weight.dtype in _FLOATS and "scale" not in name):
            weight.uniform_(-1e-3, 1e-3, generator=generator)
        elif not weight.is_floating_point():
            weight.fill_(_DUMMY_CODE)
        else:
            # What others are divided by must be large.
            weight.fill_(1 / _DUMMY_SCALE if "global_scale" in name else _DUMMY_SCALE)
        weights[name] = weight
    return weights


_DUMMY_CODE = 117
"""A small power of two as an exponent, and no extreme as codes."""
_DUMMY_SCALE = 2.0**-9


def _whole_source(tensor: RankTensor) -> Piece | None:
    """The piece of a tensor that is nothing but one whole source tensor."""
    if len(tensor.pieces) != 1:
        return None
    piece = tensor.pieces[0]
    if piece.transposed:
        return None
    seen = piece.source_shape if piece.view is None else piece.view
    return piece if piece.shape == seen == tensor.shape else None


def _take(
    file: WeightFile,
    info: TensorInfo,
    source: Tensor,
    dtype: torch.dtype,
    device: torch.device,
    reads: list[Read],
) -> Tensor:
    """A whole tensor: where it lies if it can stay there, otherwise a copy; `reads` fills it."""
    aligned = info.offset % source.element_size() == 0
    if source.dtype == dtype and device.type == "cpu" and aligned:
        reads += keep(file, info)
        return source
    target = torch.empty(source.shape, dtype=dtype, device=device)
    reads += copy(file, info, source, target)
    return target


_FLOATS = tuple(TORCH_DTYPES[name] for name in ("F32", "F16", "BF16"))


def _readable(tensor: Tensor, info: TensorInfo, own: torch.dtype | None) -> Tensor:
    """Refuse what cannot be converted to a dtype, by default to that of computation."""
    if tensor.dtype in _FLOATS if own is None or own in _FLOATS else tensor.dtype == own:
        return tensor
    if own is not None and tensor.dtype == torch.int64:
        # Sizes, which engines hold in whatever dtype.
        return tensor
    wanted = "F32, F16 or BF16"
    if own is not None and own not in _FLOATS:
        wanted = next(name for name, dtype in TORCH_DTYPES.items() if dtype == own)
    raise CheckpointError(
        f"tensor {info.name!r} in {info.file} has dtype {info.dtype}, not {wanted}",
        hint="its config.json says otherwise: config.json and weights are of different models",
    )


def _box(tensor: Tensor, start: Iterable[int], shape: Iterable[int]) -> Tensor:
    for dimension, (first, length) in enumerate(zip(start, shape, strict=True)):
        tensor = tensor.narrow(dimension, first, length)
    return tensor


def _check_sources(
    checkpoint: Checkpoint, tensors: Mapping[str, TensorInfo], expected: Sequence[RankTensor]
) -> None:
    for tensor in expected:
        for piece in tensor.pieces:
            info = tensors.get(piece.source)
            if info is None:
                raise CheckpointError(
                    f"{checkpoint.source.label} has no tensor {piece.source!r}, which its "
                    "config.json implies",
                    hint="config.json and weights are of different models, or files are missing",
                )
            if info.shape != piece.source_shape:
                raise CheckpointError(
                    f"tensor {info.name!r} in {info.file} has shape {list(info.shape)}, and its "
                    f"config.json implies {list(piece.source_shape)}",
                    hint="config.json and weights are of different models",
                )
