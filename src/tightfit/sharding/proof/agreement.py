"""Whether rank files can be trusted before anything is made of them.

Their bytes have to be those that the manifest vouches for, and what several ranks hold has to be
the same everywhere.
"""

from bisect import bisect_right
from functools import partial

from tightfit.errors import VerificationError
from tightfit.model.layout import Piece
from tightfit.sharding.boxes import Replica, key, place
from tightfit.sharding.copies import copies
from tightfit.sharding.job import Job
from tightfit.sharding.manifest import StoredTensor
from tightfit.sharding.progress import Progress
from tightfit.sharding.proof.compare import same
from tightfit.sharding.proof.content import InTurn, checksum_in, in_threads
from tightfit.sharding.rank_files import RankFiles
from tightfit.sharding.stream.source_files import SourceFiles


def check_rank_files(job: Job, files: SourceFiles, progress: Progress) -> None:
    """Compare checksums and copies in the sharded source of a job.

    For some ranks of a distant one with a manifest only what they read, which may be little of it.

    Raises:
        VerificationError: a tensor is damaged, or ranks hold different copies of it.
    """
    ranks = job.cut_again
    assert ranks is not None
    held = ranks.manifest.files if ranks.manifest is not None else ()
    # Opened once, before several threads ask for them.
    distant = None in [files.descriptor(file.name) for file in held]
    partly = distant and len(job.ranks) < job.parallel.world_size
    needed = _needed(job, ranks) if partly else ranks.infos.keys()
    tensors = [
        (file.name, tensor)
        for file in held
        for tensor in file.tensors
        if key(ranks.files[file.name][tensor.name]) in needed
    ]
    progress.phase("checksums", sum(tensor.nbytes for _, tensor in tensors))
    advance = InTurn(progress.advance)

    def good(one: tuple[str, StoredTensor]) -> bool:
        name, tensor = one
        return checksum_in(files, name, tensor.offset, tensor.nbytes, advance) == tensor.xxh3

    for (name, tensor), whole in zip(
        tensors, in_threads(good, tensors, distant=distant, advance=advance), strict=True
    ):
        if not whole:
            raise VerificationError(
                f"{name}: {tensor.name!r} is damaged (its checksum differs)",
                hint="shard the model again, or fetch the file again from where it was whole",
            )
    for replica in ranks.replicas:
        if partly and not {key(replica.owner.tensor), key(replica.copy.tensor)} <= needed:
            continue
        if not _agree(replica, files):
            one, other = replica.owner.tensor, replica.copy.tensor
            raise VerificationError(
                f"{one.file} and {other.file} hold different copies of "
                f"{replica.owner.piece.source!r}",
                hint="they are of different models; shard the model again",
            )


def _needed(job: Job, ranks: RankFiles) -> set[str]:
    """The tensors, by `boxes.key`, of which a job reads something."""
    found = {key(group.source) for group in job.copies}
    by_file: dict[str, tuple[list[int], list[str]]] = {}
    for file, header in ranks.files.items():
        infos = sorted((info for info in header.values() if info.nbytes), key=lambda i: i.offset)
        by_file[file] = [info.offset for info in infos], [key(info) for info in infos]
    for gather in job.gathers:
        for one in gather.slices:
            offsets, keys = by_file[one.file]
            found.add(keys[bisect_right(offsets, one.offset) - 1])
    return found


def _agree(replica: Replica, files: SourceFiles) -> bool:
    owner, copy = replica.owner, replica.copy
    start, shape = place(replica.box, copy)
    at, shape_there = place(replica.box, owner)
    turned = copy.piece.transposed != owner.piece.transposed
    target_shape = owner.tensor.shape
    depth = len(shape) - len(target_shape)
    if depth > 0:
        at, target_shape = (0,) * depth + at, (1,) * depth + target_shape
    assert turned or len(shape) != len(shape_there) or shape == shape_there
    piece = Piece(
        source=key(copy.tensor),
        source_shape=copy.tensor.shape,
        start=start,
        shape=shape,
        at=at,
        transposed=turned,
    )
    read = partial(files.read, owner.tensor.file)
    planned = copies(piece, copy.tensor, target_shape, target=0, target_offset=owner.tensor.offset)
    return all(same(read, one, copy.tensor.file, files) for one in planned)
