"""Everything about quantizing a checkpoint before the first weight is read."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from tightfit.checkpoint.checkpoint import Checkpoint
from tightfit.checkpoint.describe import describe, require_weights
from tightfit.checkpoint.header import TensorInfo
from tightfit.errors import UnsupportedModelError
from tightfit.model.aliases import require_own_names
from tightfit.model.quantization.section import section
from tightfit.model.quantization.written import Decisions, Wish, decide, written
from tightfit.model.sources import expected_sources
from tightfit.model.spec import ModelSpec
from tightfit.quantize.admission import admit
from tightfit.quantize.computed_source import FILE, Kept
from tightfit.quantize.encoding import EncodedSource
from tightfit.quantize.matrices import Matrix, quantized_matrices
from tightfit.sharding.side_files import copied_side_files


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeJob:
    """A checkpoint to be quantized, as it is and as it will be.

    `virtual` is the quantized checkpoint, whose tensors are computed when they are read. `spec` and
    `quantized_spec` are the models of the two.
    """

    checkpoint: Checkpoint
    spec: ModelSpec
    wish: Wish
    method: str
    decisions: Decisions
    matrices: tuple[Matrix, ...]
    quantized_spec: ModelSpec
    virtual: Checkpoint


def prepare(
    checkpoint: Checkpoint,
    wish: Wish,
    *,
    method: str = "rtn",
    tensor_parallel_size: int = 1,
    given: Mapping[str, Kept] = MappingProxyType({}),
) -> QuantizeJob:
    """Decide what becomes of every tensor; what is beside them has to be readable.

    Args:
        checkpoint: an unquantized one.
        wish: what the user wants.
        method: one of `recipe_file.METHODS`.
        tensor_parallel_size: ranks that have to be able to load the result.
        given: tensors of the result that are there already, by name, as calibration leaves them:
            they take the place of those that would be computed or copied, and may be further ones.

    Raises:
        CheckpointError: the source lacks weights, or they are not what config.json says.
        LayoutError: groups or blocks do not divide a matrix, or what a rank holds of it
            (`RefusedError`), or the model cannot be cut for so many ranks.
        UnsupportedModelError: the architecture is not known, the checkpoint is quantized already,
            or engines could not load the result.
        UsageError: a scheme is for nothing, or only for a part of what engines hold as one.
    """
    copied_side_files(checkpoint)
    spec = unquantized_spec(checkpoint)
    decisions = decide(spec, wish)
    admit(spec, wish, decisions, tensor_parallel_size=tensor_parallel_size)
    recipe = written(spec, wish)
    tensors = checkpoint.tensors()
    matrices = quantized_matrices(spec, decisions, tensors)
    consumed = {matrix.source.name for matrix in matrices}
    kept = {
        name: Kept(name=name, source=checkpoint.source, info=info)
        for name, info in tensors.items()
        if name not in consumed
    }
    todo = [matrix for matrix in matrices if not _is_given(matrix, given)]
    source = EncodedSource(
        checkpoint.source, {**kept, **given}.values(), todo, search=method == "mse"
    )
    config = dict(checkpoint.config)
    config["quantization_config"] = section(spec, wish, decisions, _others(spec, tensors))
    return QuantizeJob(
        checkpoint=checkpoint,
        spec=spec,
        wish=wish,
        method=method,
        decisions=decisions,
        matrices=matrices,
        quantized_spec=replace(spec, quantization=recipe),
        virtual=Checkpoint(
            name=checkpoint.name,
            source=source,
            config=config,
            files=(FILE,),
            has_weights=True,
            known=source.tensors(),
        ),
    )


def matching_nothing(job: QuantizeJob, ignored: Iterable[str]) -> Iterator[str]:
    """Say which patterns, `ignored` on the command line or kept by a rule, are of no use."""
    names = [*job.decisions, *job.checkpoint.tensors()]
    kept = (pattern for pattern, choice in job.wish.rules if choice is None)
    said = dict.fromkeys(kept, "the rule that keeps") | dict.fromkeys(ignored, "--ignore")
    for pattern, what in said.items():
        if not any(re.search(pattern, name) for name in names):
            yield f"{what} {pattern!r} matches nothing"


def unquantized_spec(checkpoint: Checkpoint) -> ModelSpec:
    """The model of a checkpoint that can be quantized.

    Raises:
        CheckpointError: it lacks weights, or they are not what config.json says.
        UnsupportedModelError: the architecture is not known, or it is quantized already.
    """
    require_weights(checkpoint, "quantize")
    spec = describe(checkpoint).spec
    require_own_names(spec)
    if spec.quantization is not None:
        raise UnsupportedModelError(
            f"{checkpoint.name} is quantized already: {spec.quantization.name}",
            hint="give the unquantized model, or --dequantize to go on from what this one has left",
        )
    if spec.listed is not None:
        raise UnsupportedModelError(
            f"{spec.architecture} is not modelled, so that nobody knows its linear layers",
            hint="`tightfit plan` says what is known of it",
        )
    return spec


def _is_given(matrix: Matrix, given: Mapping[str, Kept]) -> bool:
    """Whether nothing of a matrix is left to compute."""
    outputs = matrix.outputs.values()
    for one in outputs:
        if one.name in given:
            info = given[one.name].info
            assert (info.dtype, info.shape) == (one.dtype, one.shape), (one, info)
    return all(one.name in given for one in outputs)


def _others(spec: ModelSpec, tensors: Mapping[str, TensorInfo]) -> Iterator[str]:
    """Modules of matrices that are no part of the model: of layers that predict further tokens."""
    known = expected_sources(spec)
    for name, info in tensors.items():
        if name in known:
            continue
        container, inside, last = name.rpartition(".experts.")
        if name.endswith(".weight") and len(info.shape) > 1:
            yield name.removesuffix(".weight")
        elif inside and len(info.shape) == 3:
            # Engines ask for stacked ones by the names that they would have one by one.
            parts = ("gate_proj", "up_proj") if last == "gate_up_proj" else (last,)
            yield from (f"{container}.experts.0.{part}" for part in parts)
