"""Plain checkpoints on a distant store: weights, index, what goes with them, and the config last.

Nothing loads a directory without a config. Until it comes, notes beside the weights prove them as
for `shard`; after it they go.
"""

from collections.abc import Callable

from tightfit.checkpoint.files import CONFIG, INDEX
from tightfit.checkpoint.remote_output import RemoteDirectory
from tightfit.sharding.admission import check_job, refuse_occupied
from tightfit.sharding.plain import PlainJob
from tightfit.sharding.progress import Progress
from tightfit.sharding.ranks import job_of, part_note
from tightfit.sharding.remote.upload import Upload, copy_side_files
from tightfit.sharding.side_files import side_files


def write_to(
    job: PlainJob,
    url: str,
    progress: Progress,
    *,
    resume: bool = False,
    notice: Callable[[str], None] = lambda _: None,
) -> bool:
    """Write the checkpoint to an fsspec URL; what it is made of is checked first.

    What is complete stays whatever happens, and `resume` goes on with it. `notice` is told what
    an interruption leaves.

    Returns:
        False if what vouches for such a job was there before: whether everything is there, and
        holds what it should, is yet to be seen.

    Raises:
        OutputError: there is something else, or it cannot be written.
        VerificationError: a tensor of rank files is damaged, or ranks hold different copies of it.
        CheckpointError: a source file is truncated, or changed meanwhile.
    """
    place = RemoteDirectory(url)
    names = place.names()
    notes = {part_note(part.rank.rank, part.name) for part in job.parts}
    if resume and not names & notes and job.manifest_name in names:
        return False
    if names:
        _check_there(place, names, notes, job, resume=resume)
    place.prepare()
    upload = Upload(job=job, place=place)
    upload.run(names, progress, notice)
    if job.index is not None:
        place.write(INDEX, [job.index.encode()])
    copy_side_files(job.checkpoint, place)
    if (manifest := job.manifest(upload.checksums)) is not None:
        place.write(job.manifest_name, [manifest])
    place.write(CONFIG, [job.config_text.encode()])
    place.remove(notes)
    return True


def _parts(job: PlainJob) -> set[str]:
    return {part.name for part in job.parts}


def _check_there(
    place: RemoteDirectory, names: set[str], notes: set[str], job: PlainJob, *, resume: bool
) -> None:
    begun = bool(names & notes)
    ours = {INDEX, CONFIG, job.manifest_name, *side_files(job.checkpoint)}
    foreign = names - _parts(job) - notes - ours
    if foreign or not begun or not resume:
        refuse_occupied(place.label, unfinished=begun and not foreign)
    for name in sorted(names & notes):
        check_job(place.label, job_of(place.read(name)), job)
