"""One decoder layer: what its linear layers see, and the tensors that it comes to."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from tightfit.codecs import Codec, Scales, codec
from tightfit.errors import CheckpointError
from tightfit.quantize.calibration.folding import Fold, folds
from tightfit.quantize.calibration.gptq import Hessian, gptq, hessian
from tightfit.quantize.calibration.inputs import ROWS, Collector, Inputs
from tightfit.quantize.calibration.scales import least_output_error
from tightfit.quantize.calibration.smoothing import (
    awq_scales,
    rounding_of_inputs,
    smoothquant_scales,
)
from tightfit.quantize.encoding import check_finite
from tightfit.quantize.job import QuantizeJob
from tightfit.quantize.matrices import Matrix
from tightfit.runtime.layerwise import LoadedLayer
from tightfit.runtime.loading.files import TORCH_DTYPES
from tightfit.units import GiB

FEWEST_TOKENS = 32
"""That have to reach an expert for its inputs to say more than its weights."""
_GRAM_BYTES = 4 * GiB
"""Of all Gram matrices at a time; for further ones the samples go through the layer once more."""
_CHUNK_ELEMENTS = 2**24

Choose = Callable[[Codec, Tensor, Tensor | None], tuple[Tensor, Scales]]
"""Codes and scales of some rows, which may be overwritten."""


class LayerCalibration:
    """Chooses the tensors of a layer, and lets the layer compute with them from then on.

    Args:
        job: what the layer is to become.
        index: of the layer.
        layer: loaded, unquantized, and changed in place.
        samples: gives the activations before the layer, some samples at a time.
        tokens: of all samples.
        warn: told of experts that saw too few tokens.
    """

    def __init__(
        self,
        job: QuantizeJob,
        index: int,
        layer: LoadedLayer,
        samples: Callable[[], Iterable[Tensor]],
        *,
        tokens: int,
        warn: Callable[[str], None],
    ) -> None:
        self._job = job
        self._layer = layer
        self._samples = samples
        self._tokens = tokens
        self._warn = warn
        self._folds = tuple(folds(job.spec, index))
        self._tensors: dict[str, Tensor] = {}
        self._changed: set[str] = set()
        self._few: dict[str, None] = {}
        fused: dict[str, list[Matrix]] = {}
        for matrix in job.matrices:
            if matrix.module in layer.linears:
                check_finite(layer.linears[matrix.module], matrix)
                fused.setdefault(matrix.fused, []).append(matrix)
        self.groups = tuple(tuple(group) for group in fused.values())
        """Matrices that engines hold as one: they share their inputs."""

    def run(self) -> dict[str, Tensor]:
        """All tensors by name: quantized ones, and others that have changed."""
        match self._job.method:
            case "gptq":
                for groups in self._rounds():
                    self._gptq(groups)
            case "awq":
                self._awq()
            case "smoothquant":
                self._smoothquant()
            case method:
                self._nearest(self.groups, search=method != "rtn")
        if self._few:
            names = ", ".join(list(self._few)[:4]) + (", ..." if len(self._few) > 4 else "")
            self._warn(
                f"{len(self._few)} experts saw fewer than {FEWEST_TOKENS} calibration tokens, and "
                f"are rounded to nearest: {names}"
            )
        return self._tensors

    def _rounds(self) -> Iterator[list[tuple[Matrix, ...]]]:
        """Groups whose Gram matrices are in memory together, in the order of computation."""
        now: list[tuple[Matrix, ...]] = []
        held = 0
        for group in self.groups:
            nbytes = 4 * group[0].columns ** 2
            if now and held + nbytes > _GRAM_BYTES:
                yield now
                now, held = [], 0
            now.append(group)
            held += nbytes
        if now:
            yield now

    def _gptq(self, groups: Sequence[tuple[Matrix, ...]]) -> None:
        found = {group[0].module: _nothing(group[0], gram=True) for group in groups}
        self._collect(found)
        for group in groups:
            inputs = found.pop(group[0].module)
            if self._saw_enough(group, inputs):
                assert inputs.gram is not None
                known = hessian(inputs.gram)
                del inputs
                self._store(group, partial(_by_gptq, known))
            else:
                self._nearest([group], search=True)

    def _awq(self) -> None:
        found = self._shared_inputs(gram=True)
        for fold, matrices, weights in self._quantized_folds():
            inputs = found[fold.consumers[0]]
            if self._saw_enough(matrices, inputs):
                scales = awq_scales(_codec(matrices[0]), weights, inputs, fold.alike)
                self._apply(fold, scales, inputs)
        for group in self.groups:
            inputs = found[group[0].module]
            if self._saw_enough(group, inputs):
                assert inputs.gram is not None
                self._store(group, partial(_by_clipping, inputs.gram))
            else:
                self._nearest([group], search=True)
        self._store_changed()

    def _smoothquant(self) -> None:
        found = self._shared_inputs(gram=False)
        for fold, matrices, weights in self._quantized_folds():
            inputs = found[fold.consumers[0]]
            if self._saw_enough(matrices, inputs):
                rounded = rounding_of_inputs(matrices[0].choice.scheme)
                scales = smoothquant_scales(
                    _codec(matrices[0]), weights, inputs, rounded, fold.alike
                )
                self._apply(fold, scales, inputs)
        self._nearest(self.groups, search=False)
        self._store_changed()

    def _nearest(self, groups: Iterable[tuple[Matrix, ...]], *, search: bool) -> None:
        for group in groups:
            self._store(group, partial(_by_rounding, search))

    def _shared_inputs(self, *, gram: bool) -> dict[str, Inputs]:
        """By module, the same object for all that a fold changes together."""
        found: dict[str, Inputs] = {}
        for fold, matrices, _ in self._quantized_folds():
            found |= dict.fromkeys(fold.consumers, _nothing(matrices[0], gram=gram, rows=not gram))
        for group in self.groups:
            if group[0].module not in found:
                alone = _nothing(group[0], gram=gram, rows=not gram)
                found |= {matrix.module: alone for matrix in group}
        self._collect(found)
        return found

    def _quantized_folds(self) -> Iterator[tuple[Fold, list[Matrix], list[Tensor]]]:
        """Those whose consumers are quantized, with those and their weights."""
        known = {matrix.module: matrix for group in self.groups for matrix in group}
        for fold in self._folds:
            if all(name in known for name in fold.consumers):
                names = fold.consumers
                yield fold, [known[n] for n in names], [self._layer.linears[n] for n in names]

    def _collect(self, found: Mapping[str, Inputs]) -> None:
        self._layer.watch(Collector(found, share=min(1.0, ROWS / self._tokens)))
        for part in self._samples():
            self._layer(part)
        self._layer.watch(None)
        for module, inputs in found.items():
            if not inputs.is_finite:
                raise CheckpointError(
                    f"the inputs of {module} are not finite on the calibration text",
                    hint="the weights of this layer or an earlier one are damaged",
                )

    def _saw_enough(self, matrices: Sequence[Matrix], inputs: Inputs) -> bool:
        enough = inputs.tokens >= min(FEWEST_TOKENS, self._tokens)
        if not enough:
            self._few |= {matrix.module.rpartition(".")[0]: None for matrix in matrices}
        return enough

    def _apply(self, fold: Fold, scales: Tensor, inputs: Inputs) -> None:
        if (scales != 1).any():
            dtype = self._dtype(fold.norm) if fold.norm else torch.float32
            applied, changed = fold.apply(self._layer.parameters, scales, dtype)
            inputs.divide(applied)
            self._changed |= changed

    def _store(self, group: Sequence[Matrix], choose: Choose) -> None:
        coder = _codec(group[0])
        amax = None
        weights = [self._layer.linears[matrix.module] for matrix in group]
        if coder.needs_amax:
            amax = torch.stack([weight.abs().amax() for weight in weights]).amax()
        for matrix, weight in zip(group, weights, strict=True):
            count = _CHUNK_ELEMENTS // (matrix.columns * coder.row_step) or 1
            pieces = []
            for rows in weight.split(count * coder.row_step):
                codes, scales = choose(coder, rows.clone(), amax)
                rows.copy_(coder.values(codes, scales))
                pieces.append(coder.pack(codes, scales))
            for kind, tensor in coder.joined(pieces).items():
                self._tensors[matrix.outputs[kind].name] = tensor

    def _store_changed(self) -> None:
        """What has changed and is not quantized, as it is stored from then on."""
        done = {f"{matrix.module}.weight" for group in self.groups for matrix in group}
        for name in sorted(self._changed - done):
            parameter = self._layer.parameters[name]
            stored = parameter.to(self._dtype(name))
            parameter.copy_(stored)
            self._tensors[name] = stored

    def _dtype(self, name: str) -> torch.dtype:
        return TORCH_DTYPES[self._job.checkpoint.tensors()[name].dtype]


def _nothing(matrix: Matrix, *, gram: bool, rows: bool = False) -> Inputs:
    return Inputs.nothing(matrix.columns, gram=gram, rows=rows)


def _codec(matrix: Matrix) -> Codec:
    return codec(matrix.choice, TORCH_DTYPES[matrix.source.dtype])


def _by_rounding(
    search: bool, coder: Codec, rows: Tensor, amax: Tensor | None
) -> tuple[Tensor, Scales]:
    scales = coder.scales(rows, amax, search=search)
    return coder.codes(rows, scales), scales


def _by_clipping(
    gram: Tensor, coder: Codec, rows: Tensor, amax: Tensor | None
) -> tuple[Tensor, Scales]:
    scales = least_output_error(coder, rows, gram, amax)
    return coder.codes(rows, scales), scales


def _by_gptq(
    known: Hessian, coder: Codec, rows: Tensor, amax: Tensor | None
) -> tuple[Tensor, Scales]:
    return gptq(coder, rows, known, amax)
