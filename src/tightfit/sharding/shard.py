"""`tightfit shard`: prepare the whole job from headers, then stream it, then vouch for it."""

import json
import os
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import xxhash

from tightfit.checkpoint.checkpoint import Checkpoint
from tightfit.checkpoint.describe import describe, require_weights
from tightfit.checkpoint.files import CONFIG, INDEX, MANIFEST
from tightfit.checkpoint.header import TensorInfo
from tightfit.checkpoint.writer import OutputDirectory, PartFile, check_free_space
from tightfit.errors import CheckpointError, LayoutError, UnsupportedModelError
from tightfit.model.aliases import require_own_names
from tightfit.model.layout import Parallel, RankTensor
from tightfit.model.parameters import check_parallel
from tightfit.model.spec import ModelSpec
from tightfit.model.stored import StoredLayout, rank_tensors
from tightfit.sharding.copies import TensorCopies, plan_copies
from tightfit.sharding.manifest import Manifest, make_manifest, source_fingerprint
from tightfit.sharding.parts import Part, make_parts
from tightfit.sharding.stream import BUFFER_BYTES, SourceFiles, run_copies, write_all

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")


class Progress(Protocol):
    """Told how far a job is: `phase` with its total in bytes, then `advance` by bytes."""

    def phase(self, name: str, total_bytes: int) -> None:
        """A new phase begins."""

    def advance(self, nbytes: int) -> None:
        """So many bytes more are done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardJob:
    """Everything about a sharding job before the first byte is read."""

    checkpoint: Checkpoint
    spec: ModelSpec
    layout: StoredLayout
    parallel: Parallel
    parts: tuple[Part, ...]
    copies: tuple[TensorCopies, ...]

    @property
    def output_bytes(self) -> int:
        """Bytes of all rank files."""
        return sum(part.nbytes for part in self.parts)


def prepare(
    checkpoint: Checkpoint,
    layout: StoredLayout,
    *,
    tensor_parallel_size: int,
    pipeline_parallel_size: int = 1,
    max_shard_bytes: int,
) -> ShardJob:
    """Decide what goes where.

    Raises:
        CheckpointError: the source lacks weights, or they are not what config.json says.
        LayoutError: the model cannot be cut that way.
        UnsupportedModelError: the architecture, or its quantization, cannot be sharded yet.
    """
    require_weights(checkpoint, "shard")
    spec = describe(checkpoint).spec
    require_own_names(spec)
    if not spec.verified_for_sharding:
        raise UnsupportedModelError(
            f"sharding {spec.architecture} is not supported: vLLM's names of its parameters have "
            "not been verified",
            hint="plan it with `tightfit plan`",
        )
    if spec.quantization is not None:
        raise UnsupportedModelError(
            f"{checkpoint.name} is quantized, and sharding quantized checkpoints is not supported",
            hint="shard the unquantized model",
        )
    parallel = Parallel(
        tensor_parallel_size=tensor_parallel_size,
        pipeline_parallel_size=pipeline_parallel_size,
        uneven=layout.uneven,
    )
    try:
        check_parallel(spec, parallel)
    except LayoutError as error:
        # This raises by itself if our own runtime cannot do it either.
        check_parallel(spec, replace(parallel, uneven=True))
        hint = f"{error.hint}; or --layout builtin, which `tightfit run` loads"
        raise LayoutError(error.message, hint=hint) from None
    sources = checkpoint.tensors()
    parts = [
        part
        for rank in parallel.ranks()
        for part in make_parts(
            rank,
            [_with_source_dtype(t, sources) for t in rank_tensors(spec, rank, layout)],
            max_shard_bytes,
        )
    ]
    return ShardJob(
        checkpoint=checkpoint,
        spec=spec,
        layout=layout,
        parallel=parallel,
        parts=tuple(parts),
        copies=plan_copies(parts, sources),
    )


def shard(job: ShardJob, directory: Path, progress: Progress) -> Manifest:
    """Write the rank files, the side files and the manifest, all or nothing.

    Raises:
        OutputError: the directory is not empty, or cannot be written.
        CheckpointError: a source file is truncated, or changed meanwhile.
    """
    check_free_space(directory, job.output_bytes)
    with OutputDirectory(directory) as output, SourceFiles(job.checkpoint.source) as files:
        targets = [output.create(part.name, part.nbytes) for part in job.parts]
        for part, target in zip(job.parts, targets, strict=True):
            os.pwrite(target.fd, part.header, 0)
            _write_constants(part, target)
        copied = sum(group.nbytes for group in job.copies)
        progress.phase("copying", copied)
        run_copies(job.copies, files, [target.fd for target in targets], progress.advance)
        files.check_unchanged()
        held = sum(one.tensor.nbytes for part in job.parts for one in part.placed)
        progress.phase("checksums", held)
        manifest = make_manifest(
            layout=job.layout.name,
            architecture=job.spec.architecture,
            parallel=job.parallel,
            source_name=job.checkpoint.name,
            source_fingerprint=source_fingerprint(job.checkpoint.tensors()),
            parts=job.parts,
            checksums=_checksums(job.parts, targets, progress),
        )
        _write_side_files(job, output)
        output.write_text(MANIFEST, json.dumps(manifest.to_json(), separators=(",", ":")))
        output.commit()
    return manifest


def _with_source_dtype(tensor: RankTensor, sources: Mapping[str, TensorInfo]) -> RankTensor:
    """Keep the dtype of the source, whatever config.json says; engines cast on loading."""
    if any(piece.decay for piece in tensor.pieces):
        return tensor
    dtypes = {sources[piece.source].dtype for piece in tensor.pieces}
    if len(dtypes) > 1:
        raise CheckpointError(
            f"the parts of {tensor.name!r} have different dtypes: {', '.join(sorted(dtypes))}",
            hint="save the model in one dtype",
        )
    return replace(tensor, dtype=dtypes.pop()) if dtypes else tensor


def _write_constants(part: Part, target: PartFile) -> None:
    for one in part.placed:
        if one.tensor.fill:
            assert one.tensor.dtype == "F32"
            assert not one.tensor.pieces
            os.pwrite(target.fd, struct.pack("<f", one.tensor.fill), one.offset)


def _checksums(
    parts: Sequence[Part], targets: Sequence[PartFile], progress: Progress
) -> dict[tuple[str, str], str]:
    """Hash what is in the files now, which is what readers will see."""
    found: dict[tuple[str, str], str] = {}
    for part, target in zip(parts, targets, strict=True):
        for one in part.placed:
            found[part.name, one.tensor.name] = checksum(
                target.fd, one.offset, one.tensor.nbytes, progress.advance
            )
    return found


def checksum(fd: int, offset: int, nbytes: int, advance: Callable[[int], None]) -> str:
    """The 128-bit XXH3 of a range of a file; of what is there, if the file is shorter."""
    digest = xxhash.xxh3_128()
    done = 0
    while done < nbytes:
        data = os.pread(fd, min(BUFFER_BYTES, nbytes - done), offset + done)
        if not data:
            break
        digest.update(data)
        done += len(data)
        advance(len(data))
    return digest.hexdigest()


def _write_side_files(job: ShardJob, output: OutputDirectory) -> None:
    """Config, tokenizer, templates: everything but weights and their index."""
    source = job.checkpoint.source
    for name in source.files():
        if name in (CONFIG, INDEX) or name.endswith((*_WEIGHT_SUFFIXES, ".index.json")):
            continue
        path = source.local_path(name)
        if path is not None:
            output.copy(path, name)
        else:
            data = source.read(name)
            part = output.create(name, len(data))
            write_all(part.fd, [memoryview(data)], 0)
            part.close()
    config = dict(job.checkpoint.config)
    if config.get("tie_word_embeddings", True) and not job.spec.tie_word_embeddings:
        # Engines decide by the config alone whether a sharded checkpoint is tied.
        config["tie_word_embeddings"] = False
    output.write_text(CONFIG, json.dumps(config, indent=2, ensure_ascii=False) + "\n")
