"""Who owns which block of the KV cache. Pure Python; the tensors are in `kv_cache`."""

from collections import deque

from tightfit.units import cdiv


class BlockPool:
    """A free list of `num_blocks` blocks of `block_size` tokens.

    Blocks are handed out first freed first, so that every rank, which runs the same schedule, gives
    the same blocks to the same sequences.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = deque(range(num_blocks))

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    def grow(self, table: list[int], num_tokens: int) -> bool:
        """Extend a sequence's block table to hold `num_tokens`; False, and no change, if it cannot.

        The table lists a sequence's blocks in the order of its tokens.
        """
        missing = cdiv(num_tokens, self.block_size) - len(table)
        if missing > len(self._free):
            return False
        table.extend(self._free.popleft() for _ in range(missing))
        return True

    def release(self, table: list[int]) -> None:
        """Take all blocks of a sequence back, and empty its table."""
        self._free.extend(table)
        table.clear()
        assert len(self._free) <= self.num_blocks, "a block was released twice"
