"""`tightfit quantize`: write the checkpoint that a job describes, and vouch for it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tightfit import __version__
from tightfit.executors import Executor
from tightfit.model.layout import Parallel, RankTensor
from tightfit.quantize.computed_source import ComputedSource
from tightfit.quantize.job import QuantizeJob
from tightfit.sharding.boxes import whole
from tightfit.sharding.copies import plan_copies
from tightfit.sharding.manifest import cut_fingerprint, source_fingerprint
from tightfit.sharding.parts import natural
from tightfit.sharding.plain import PlainJob, plain_parts
from tightfit.sharding.plain_output import PlainOutput
from tightfit.sharding.progress import Progress
from tightfit.sharding.shard import Checksums, write_parts
from tightfit.sharding.side_files import config_text, copied_side_files
from tightfit.sharding.stream.source_files import SourceFiles

FORMAT = "tightfit-quantize-1"


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteJob(PlainJob):
    """The files that a `QuantizeJob` comes to."""

    verb: str = "quantize"
    method: str
    config: Mapping[str, Any]

    @property
    def identity(self) -> Mapping[str, Any]:
        """What is made of the weights as well."""
        section = self.config["quantization_config"]
        return {
            **super(WriteJob, self).identity,
            "method": self.method,
            "quantization_config": json.loads(json.dumps(section)),
        }

    def manifest(self, checksums: Checksums) -> bytes:
        """What vouches for the files: where they come from, and a checksum of every tensor."""
        document = {
            "format": FORMAT,
            "tightfit": __version__,
            "method": self.method,
            "source": {"name": self.checkpoint.name, "fingerprint": self.source_fingerprint},
            "files": [
                {
                    "name": part.name,
                    "nbytes": part.nbytes,
                    "tensors": {
                        one.tensor.name: {
                            "offset": one.offset,
                            "nbytes": one.tensor.nbytes,
                            "xxh3": checksums[part.name, one.tensor.name],
                        }
                        for one in part.placed
                    },
                }
                for part in self.parts
            ],
        }
        return json.dumps(document, separators=(",", ":")).encode()


def write_job(job: QuantizeJob, *, max_shard_bytes: int) -> WriteJob:
    """Distribute the tensors over files."""
    virtual = job.virtual
    infos = virtual.tensors()
    tensors = [
        RankTensor(
            name=info.name,
            parameter=None,
            dtype=info.dtype,
            shape=info.shape,
            pieces=(whole(info, info.name),),
        )
        for info in sorted(infos.values(), key=lambda info: natural(info.name))
    ]
    parts = plain_parts(tensors, max_shard_bytes)
    source = virtual.source
    assert isinstance(source, ComputedSource)
    return WriteJob(
        checkpoint=virtual,
        parallel=Parallel(),
        ranks=(0,),
        max_shard_bytes=max_shard_bytes,
        parts=parts,
        copies=plan_copies(parts, infos),
        source_fingerprint=source_fingerprint(job.checkpoint.tensors()),
        cut_fingerprint=cut_fingerprint(tensors),
        bundles=source.bundles(),
        method=job.method,
        config=virtual.config,
    )


def write(
    job: WriteJob,
    directory: Path,
    progress: Progress,
    *,
    resume: bool = False,
    executor: Executor | None = None,
) -> None:
    """Write the weights, the side files, the manifest and last the config: all, or nothing.

    With `resume` only what is missing in the directory is written, and what is there stays
    whatever happens. An `executor` gets one task per file.

    Raises:
        OutputError: the directory holds something else, or cannot be written.
        CheckpointError: a source file is truncated, holds what cannot be quantized, or changed
            meanwhile.
        TaskLostError: workers of the executor died, again and again.
    """
    virtual = job.checkpoint
    with (
        PlainOutput(directory, job, resume=resume, beside=copied_side_files(virtual)) as output,
        SourceFiles(virtual.source) as files,
    ):
        if output.finished:
            return
        output.check_side_files()
        checksums = write_parts(job, output, files, progress, executor)
        output.write_side_files()
        output.finish(config_text(job.config), job.index, job.manifest(checksums))
