from hypothesis import given
from hypothesis import strategies as st

from tightfit.runtime.blocks import BlockPool

Steps = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 50)), max_size=60)


@given(num_blocks=st.integers(1, 20), block_size=st.integers(1, 8), steps=Steps)
def test_blocks_have_one_owner_and_all_come_back(
    num_blocks: int, block_size: int, steps: list[tuple[int, int]]
) -> None:
    pool = BlockPool(num_blocks, block_size)
    tables: list[list[int]] = [[] for _ in range(5)]
    for owner, tokens in steps:
        before = list(tables[owner])
        if tokens == 0:
            pool.release(tables[owner])
        elif tokens > len(before) * block_size:
            grown = pool.grow(tables[owner], tokens)
            assert tables[owner][: len(before)] == before
            assert (len(tables[owner]) * block_size >= tokens) == grown
            assert grown or tables[owner] == before
        held = [block for table in tables for block in table]
        assert len(held) == len(set(held))
        assert len(held) + pool.num_free == num_blocks
    for table in tables:
        pool.release(table)
    assert pool.num_free == num_blocks
