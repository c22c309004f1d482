"""The files in which tasks elsewhere try to write the parts of a rank.

They lie in a directory that only the owner of the rank makes and removes. Who was cut off, and
still tries when the owner is done or dead, finds no directory any more, or writes to a file that
nobody will look at.
"""

import os
import shutil
from contextlib import suppress
from pathlib import Path

from tightfit.errors import OutputError
from tightfit.sharding.parts import Part

_SUFFIX = ".attempts.partial"


class Attempts:
    """The directory of attempts that belongs to a journal."""

    def __init__(self, journal: Path) -> None:
        self.path = journal.with_name(journal.stem + _SUFFIX)

    def make(self) -> None:
        """Make an empty one; what dead owners have left is gone then."""
        self.remove()
        with suppress(FileExistsError):
            os.mkdir(self.path)

    def remove(self) -> None:
        """Remove it, even while somebody still writes there."""
        for _ in range(5):
            shutil.rmtree(self.path, ignore_errors=True)
            if not os.path.lexists(self.path):
                return

    def held_bytes(self) -> int:
        """Bytes on disk that removing it will free."""
        try:
            return sum(entry.stat().st_blocks * 512 for entry in os.scandir(self.path))
        except OSError:
            return 0

    def take(self, part: Part, name: str, final: Path) -> None:
        """Give the file of a successful attempt its name, and remove those of others at it.

        Raises:
            OutputError: it is not here, or not whole.
        """
        path = self.path / name
        try:
            size = os.stat(path).st_size
        except FileNotFoundError:
            raise OutputError(
                f"{path} was written elsewhere, and is not here",
                hint="give a directory that all machines of the cluster share",
            ) from None
        if size != part.nbytes:
            raise OutputError(
                f"{path} was written with {part.nbytes:,} bytes, and has {size:,} here",
                hint="give a directory that all machines of the cluster see alike; --resume goes "
                "on with the rest",
            )
        os.rename(path, final)
        for other in os.scandir(self.path):
            if other.name.startswith(f"{part.name}."):
                with suppress(OSError):
                    os.unlink(other)
