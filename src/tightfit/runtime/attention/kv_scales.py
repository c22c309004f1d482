"""The scales that a checkpoint has for an fp8 KV cache: what stored keys and values stand for.

What counts is vLLM's rule (`layers/quantization/kv_cache.py: process_weights_after_loading`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import inf, prod
from pathlib import Path
from typing import TypedDict

import torch

from tightfit.checkpoint.checkpoint import Checkpoint
from tightfit.errors import CheckpointError, UnsupportedModelError
from tightfit.model.blocks.latent_attention import LatentAttention
from tightfit.model.layout import Rank, RankTensor
from tightfit.model.spec import ModelSpec
from tightfit.model.stored import rank_tensors, stored_layout
from tightfit.runtime.attention.base import AttentionLayer
from tightfit.runtime.attention.kv_cache import attending_layers
from tightfit.runtime.loading.files import TORCH_DTYPES
from tightfit.runtime.loading.loader import load_checkpoint, load_rank_files

_KINDS = (".k_scale", ".v_scale")

Scales = Sequence[tuple[float, float]]
"""Of keys and of values, for every layer of a rank that attends; empty if all are 1."""


def load_scales(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    rank: Rank,
    *,
    rank_files: Sequence[Path] | None = None,
    layout: str = "builtin",
) -> Scales:
    """Those of a rank's layers, as a plain checkpoint or the rank's files have them.

    Raises:
        CheckpointError: one is not a positive number, or cannot be read.
        UnsupportedModelError: each head has its own.
    """
    expected = {
        tensor.parameter: tensor
        for tensor in rank_tensors(spec, rank, stored_layout(layout))
        if tensor.parameter is not None and tensor.parameter.endswith(_KINDS)
    }
    place: _Place = {
        "dtype": torch.float32,
        "device": torch.device("cpu"),
        # Engines round some scales to the model's dtype.
        "dtypes": {name: TORCH_DTYPES[tensor.dtype] for name, tensor in expected.items()},
    }
    if rank_files is not None:
        found = load_rank_files(rank_files, [*expected.values()], **place)
    else:
        shapes = {name: info.shape for name, info in checkpoint.tensors().items()}
        settled = [_one_number(tensor, shapes).settled(shapes) for tensor in expected.values()]
        found = load_checkpoint(checkpoint, settled, **place)
    numbers = {name: float(scale) for name, scale in found.items()}
    return tuple(_of_layer(spec, index, numbers) for index in attending_layers(spec, rank))


def scaled(layers: tuple[AttentionLayer, ...], scales: Scales) -> tuple[AttentionLayer, ...]:
    """The layers with their scales."""
    if not scales:
        return layers
    return tuple(
        replace(layer, k_scale=k_scale, v_scale=v_scale)
        for layer, (k_scale, v_scale) in zip(layers, scales, strict=True)
    )


class _Place(TypedDict):
    dtype: torch.dtype
    device: torch.device
    dtypes: Mapping[str, torch.dtype]


def _one_number(tensor: RankTensor, shapes: Mapping[str, tuple[int, ...]]) -> RankTensor:
    for piece in tensor.pieces:
        shape = shapes.get(piece.source, ())
        if prod(shape) > 1:
            raise UnsupportedModelError(
                f"{piece.source!r} has the shape {list(shape)}: the built-in runtime has one scale "
                "for the keys of a layer, and one for its values, not one for each head",
                hint="leave keys and values as they are with --kv-cache-dtype bfloat16 (or what "
                "--dtype is), or serve this checkpoint with vLLM",
            )
    return tensor


def _of_layer(spec: ModelSpec, index: int, numbers: Mapping[str, float]) -> tuple[float, float]:
    """Negative ones stand for those that a checkpoint has not, and one alone is for both."""
    prefix = f"{spec.names.layers}.{index}."
    given = {name: number for name, number in numbers.items() if name.startswith(prefix)}
    k_scale, v_scale = (
        next((number for name, number in given.items() if name.endswith(kind)), -1.0)
        for kind in _KINDS
    )
    if k_scale < 0 and v_scale < 0:
        return 1.0, 1.0
    if k_scale < 0 or v_scale < 0:
        k_scale = v_scale = max(k_scale, v_scale)
    for scale in (k_scale, v_scale):
        if not 0 < scale < inf:
            raise CheckpointError(
                f"layer {index} has {scale} for a scale of its KV cache, not a positive number",
                hint="the checkpoint is damaged, or was calibrated with too little text",
            )
    # Latents serve as both.
    latent = isinstance(spec.layers[index].mixers[0], LatentAttention)
    return k_scale, k_scale if latent else v_scale
