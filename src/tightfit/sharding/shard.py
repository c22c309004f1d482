"""`tightfit shard`: carry out a prepared job, and vouch for what it wrote."""

import json
import os
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

from tightfit.checkpoint.files import MANIFEST
from tightfit.checkpoint.writer import OutputDirectory, PartFile, check_free_space
from tightfit.sharding.agreement import check_rank_files
from tightfit.sharding.gather import run_gather
from tightfit.sharding.job import ShardJob as ShardJob
from tightfit.sharding.job import prepare as prepare
from tightfit.sharding.manifest import Manifest, make_manifest
from tightfit.sharding.parts import Part
from tightfit.sharding.progress import Progress as Progress
from tightfit.sharding.progress import checksum as checksum
from tightfit.sharding.side_files import config_text, copy_side_files
from tightfit.sharding.stream import SourceFiles, run_copies


def shard(job: ShardJob, directory: Path, progress: Progress) -> Manifest:
    """Write the rank files, the side files and the manifest, all or nothing.

    Raises:
        OutputError: the directory is not empty, or cannot be written.
        CheckpointError: a source file is truncated, or changed meanwhile.
        VerificationError: the source is sharded itself, and damaged.
    """
    check_free_space(directory, job.output_bytes)
    with OutputDirectory(directory) as output, SourceFiles(job.checkpoint.source) as files:
        if job.cut_again is not None:
            check_rank_files(job.cut_again, files, progress)
        targets = [output.create(part.name, part.nbytes) for part in job.parts]
        for part, target in zip(job.parts, targets, strict=True):
            os.pwrite(target.fd, part.header, 0)
            _write_constants(part, target)
        progress.phase("copying", job.copied_bytes)
        run_copies(job.copies, files, [target.fd for target in targets], progress.advance)
        for gather in job.gathers:
            run_gather(gather, files, targets[gather.target].fd, progress.advance)
        files.check_unchanged()
        held = sum(one.tensor.nbytes for part in job.parts for one in part.placed)
        progress.phase("checksums", held)
        manifest = make_manifest(
            layout=job.layout.name,
            architecture=job.spec.architecture,
            parallel=job.parallel,
            source_name=job.source_name,
            source_fingerprint=job.source_fingerprint,
            left_out=job.left_out,
            parts=job.parts,
            checksums=_checksums(job.parts, targets, progress),
        )
        copy_side_files(job.checkpoint, output, config_text(_config(job)))
        output.write_text(MANIFEST, json.dumps(manifest.to_json(), separators=(",", ":")))
        output.commit()
    return manifest


def _config(job: ShardJob) -> Mapping[str, object]:
    config = dict(job.checkpoint.config)
    if config.get("tie_word_embeddings", True) and not job.spec.tie_word_embeddings:
        # Engines decide by the config alone whether a sharded checkpoint is tied.
        config["tie_word_embeddings"] = False
    return config


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
