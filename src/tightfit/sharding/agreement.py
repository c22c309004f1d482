"""Whether rank files can be trusted before anything is made of them.

Their bytes have to be those that the manifest vouches for, and what several ranks hold has to be
the same everywhere.
"""

from functools import partial

from tightfit.errors import VerificationError
from tightfit.model.layout import Piece
from tightfit.sharding.boxes import Replica, key, place
from tightfit.sharding.compare import same
from tightfit.sharding.content import checksum_in, in_threads, in_turn
from tightfit.sharding.copies import copies
from tightfit.sharding.manifest import StoredTensor
from tightfit.sharding.progress import Progress
from tightfit.sharding.rank_files import RankFiles
from tightfit.sharding.stream import SourceFiles


def check_rank_files(ranks: RankFiles, files: SourceFiles, progress: Progress) -> None:
    """Compare checksums and copies.

    Raises:
        VerificationError: a tensor is damaged, or ranks hold different copies of it.
    """
    held = ranks.manifest.files if ranks.manifest is not None else ()
    tensors = [(file.name, tensor) for file in held for tensor in file.tensors]
    progress.phase("checksums", sum(tensor.nbytes for _, tensor in tensors))
    # Opened once, before several threads ask for them.
    distant = None in [files.descriptor(file.name) for file in held]
    advance = in_turn(progress.advance)

    def good(one: tuple[str, StoredTensor]) -> bool:
        name, tensor = one
        return checksum_in(files, name, tensor.offset, tensor.nbytes, advance) == tensor.xxh3

    for (name, tensor), whole in zip(
        tensors, in_threads(good, tensors, distant=distant), strict=True
    ):
        if not whole:
            raise VerificationError(
                f"{name}: {tensor.name!r} is damaged (its checksum differs)",
                hint="shard the model again, or fetch the file again from where it was whole",
            )
    for replica in ranks.replicas:
        if not _agree(replica, files):
            one, other = replica.owner.tensor, replica.copy.tensor
            raise VerificationError(
                f"{one.file} and {other.file} hold different copies of "
                f"{replica.owner.piece.source!r}",
                hint="they are of different models; shard the model again",
            )


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
