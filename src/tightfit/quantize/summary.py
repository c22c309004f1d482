"""What a job does to a checkpoint, in figures: bytes before and after, by kind of module."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from tightfit.model.quantization.leaving import short_names
from tightfit.model.quantization.recipe import split_experts
from tightfit.model.quantization.written import matrices, module_name
from tightfit.quantize.job import QuantizeJob
from tightfit.quantize.places import ATTENTION, EXPERTS, HEAD, MLP, SHARED, places

EMBEDDINGS, OTHER = "embeddings", "other"
_CALLED = {ATTENTION: ATTENTION, MLP: MLP, SHARED: MLP, EXPERTS: EXPERTS, HEAD: HEAD}
KINDS = (ATTENTION, MLP, EXPERTS, EMBEDDINGS, HEAD, OTHER)


@dataclass(slots=True, kw_only=True)
class Sizes:
    """Bytes of the tensors of one kind of modules; `quantized` and `kept` count matrices."""

    before_bytes: int = 0
    after_bytes: int = 0
    quantized: int = 0
    kept: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """A job in figures; `kept` names the matrices that stay as they are."""

    kinds: dict[str, Sizes] = field(default_factory=dict)
    kept: tuple[str, ...]

    @property
    def total(self) -> Sizes:
        """Of all kinds."""
        found = self.kinds.values()
        return Sizes(
            before_bytes=sum(one.before_bytes for one in found),
            after_bytes=sum(one.after_bytes for one in found),
            quantized=sum(one.quantized for one in found),
            kept=sum(one.kept for one in found),
        )


def summarize(job: QuantizeJob) -> Summary:
    """Sum up the tensors of both checkpoints."""
    found = {kind: Sizes() for kind in KINDS}
    kinds = dict(_kinds(job))

    def sizes(name: str) -> Sizes:
        return found[kinds.get(name.rpartition(".")[0]) or kinds.get(name) or OTHER]

    before = job.checkpoint.tensors()
    for info in before.values():
        sizes(info.name).before_bytes += info.nbytes
    for info in job.virtual.tensors().values():
        sizes(info.name).after_bytes += info.nbytes
    for matrix in job.matrices:
        sizes(matrix.source.name).quantized += 1
    consumed = {matrix.source.name for matrix in job.matrices}
    kept = [i.name for i in before.values() if len(i.shape) > 1 and i.name not in consumed]
    for name in kept:
        sizes(name).kept += 1
    return Summary(
        kinds={kind: one for kind, one in found.items() if one.before_bytes or one.after_bytes},
        kept=short_names(name.removesuffix(".weight") for name in kept),
    )


def _kinds(job: QuantizeJob) -> Iterator[tuple[str, str]]:
    """By module, and by tensor where a checkpoint stacks several matrices."""
    spec = job.spec
    where = places(spec)
    for weight in matrices(spec):
        for part, apart in zip(weight.parts, split_experts(weight).parts, strict=True):
            for expert in range(max(weight.experts, 1)):
                module = module_name(apart.source.format(expert=expert))
                kind = _CALLED.get(where[module].kind, OTHER)
                yield module, kind
                yield part.source.format(expert=expert), kind
    yield spec.names.embedding, EMBEDDINGS
    yield spec.names.head, HEAD
