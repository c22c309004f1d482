"""Who holds which block of the KV cache, and what full blocks hold. The tensors are in `kv_cache`.

A full block can be found by its key: a hash of its tokens and of the key of the block before, so
that equal keys mean equal sequences up to there. Sequences that begin alike share such blocks.
Blocks that nobody holds stay findable until they are handed out again (the idea of vLLM's V1 block
pool). The keys have 128 bits of blake2b, so nobody can make two sequences collide.
"""

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b

from tightfit.units import cdiv


class BlockPool:
    """`num_blocks` blocks of `block_size` tokens.

    Blocks that hold nothing findable are handed out first, then those freed longest ago. Ranks that
    run the same schedule give the same blocks to the same sequences.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._holders = [0] * num_blocks
        self._keys: list[bytes | None] = [None] * num_blocks
        self._findable: dict[bytes, int] = {}
        # In the order in which they are handed out; unlike a deque, it gives up any of them in
        # constant time, and unlike a dict also the first.
        self._free = OrderedDict[int, None].fromkeys(range(num_blocks))

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    @property
    def is_whole(self) -> bool:
        """Whether nobody holds a block, and none is lost."""
        return len(self._free) == self.num_blocks and not any(self._holders)

    def grow(self, table: list[int], num_tokens: int) -> bool:
        """Extend a sequence's block table to hold `num_tokens`; False, and no change, if it cannot.

        The table lists a sequence's blocks in the order of its tokens.
        """
        missing = cdiv(num_tokens, self.block_size) - len(table)
        if missing > len(self._free):
            return False
        for _ in range(missing):
            block, _ = self._free.popitem(last=False)
            key = self._keys[block]
            if key is not None:
                del self._findable[key]
                self._keys[block] = None
            self._holders[block] = 1
            table.append(block)
        return True

    def release(self, table: list[int]) -> None:
        """Give back the blocks of a sequence that stops running.

        The last ones of a sequence are handed out before the first ones, without which they could
        not be found.
        """
        for block in reversed(table):
            self._holders[block] -= 1
            assert self._holders[block] >= 0, "a block was released twice"
            if self._holders[block] == 0:
                self._free[block] = None
                if self._keys[block] is None:
                    self._free.move_to_end(block, last=False)

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """The blocks of the first keys, up to the first that cannot be found."""
        found = []
        for key in keys:
            block = self._findable.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def share(self, found: Sequence[int], num_tokens: int) -> list[int] | None:
        """A new table that begins with blocks just found and holds `num_tokens`; None if none can.

        Only tokens after those in `found` may be written to it.
        """
        unheld = [block for block in found if self._holders[block] == 0]
        if cdiv(num_tokens, self.block_size) - len(found) > len(self._free) - len(unheld):
            return None
        for block in unheld:
            del self._free[block]
        for block in found:
            self._holders[block] += 1
        table = list(found)
        self.grow(table, num_tokens)
        return table

    def publish(self, block: int, key: bytes) -> None:
        """Let a full block that somebody holds be found, unless another one already is."""
        if key not in self._findable:
            self._findable[key] = block
            self._keys[block] = key


def extend_keys(
    keys: list[bytes], tokens: Sequence[int], num_blocks: int, block_size: int, salt: bytes
) -> None:
    """Append the keys of a sequence's blocks, until there are `num_blocks`.

    Sequences of different salts share nothing.
    """
    first = len(keys)
    content = array("i", tokens[first * block_size : num_blocks * block_size]).tobytes()
    size = block_size * array("i").itemsize
    for at in range(0, (num_blocks - first) * size, size):
        parent = keys[-1] if keys else blake2b(salt, digest_size=16).digest()
        keys.append(blake2b(parent + content[at : at + size], digest_size=16).digest())
