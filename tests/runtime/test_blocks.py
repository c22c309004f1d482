from hypothesis import given
from hypothesis import strategies as st

from tightfit.runtime.blocks import BlockPool, extend_keys
from tightfit.units import cdiv

Steps = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 50), st.integers(0, 2)), max_size=80)


@given(num_blocks=st.integers(1, 20), block_size=st.integers(1, 8), steps=Steps)
def test_blocks_are_held_as_often_as_tables_list_them_and_all_come_back(
    num_blocks: int, block_size: int, steps: list[tuple[int, int, int]]
) -> None:
    """Five owners begin, grow and end sequences of three kinds that begin alike."""
    pool = BlockPool(num_blocks, block_size)
    tables: list[list[int]] = [[] for _ in range(5)]
    written: dict[int, bytes] = {}
    for owner, num_tokens, kind in steps:
        table = tables[owner]
        if num_tokens == 0:
            pool.release(table)
            tables[owner] = []
        elif not table:
            keys = [bytes([kind, i]) for i in range(num_tokens // block_size)]
            found = pool.find(keys)
            assert [written[block] for block in found] == keys[: len(found)]
            free = pool.num_free
            shared = pool.share(found, num_tokens)
            if shared is None:
                assert pool.num_free == free
                continue
            assert shared[: len(found)] == found
            assert len(shared) == cdiv(num_tokens, block_size)
            tables[owner] = shared
            for block, key in list(zip(shared, keys, strict=False))[len(found) :]:
                written[block] = key
                pool.publish(block, key)
        elif num_tokens > len(table) * block_size:
            before = list(table)
            grown = pool.grow(table, num_tokens)
            assert table[: len(before)] == before
            assert (len(table) * block_size >= num_tokens) == grown
            assert grown or table == before
        held = {block for table in tables for block in table}
        assert len(held) + pool.num_free == num_blocks
        assert pool.is_whole == (not held)
    for table in tables:
        pool.release(table)
    assert pool.is_whole


def fill(pool: BlockPool, keys: list[bytes]) -> list[int]:
    table = pool.share([], len(keys) * pool.block_size)
    assert table is not None
    for block, key in zip(table, keys, strict=True):
        pool.publish(block, key)
    return table


def test_blocks_without_content_go_first_and_then_those_freed_longest_ago() -> None:
    pool = BlockPool(5, 4)
    first, second = fill(pool, [b"a", b"b"]), fill(pool, [b"c", b"d"])
    pool.release(second)
    pool.release(first)
    table: list[int] = []
    taken = []
    for blocks in range(1, 6):
        assert pool.grow(table, 4 * blocks)
        taken.append([key for key in (b"a", b"b", b"c", b"d") if not pool.find([key])])
    assert taken == [[], [b"d"], [b"c", b"d"], [b"b", b"c", b"d"], [b"a", b"b", b"c", b"d"]]


def test_what_is_used_again_stays() -> None:
    pool = BlockPool(4, 4)
    pool.release(fill(pool, [b"a", b"b"]))
    pool.release(fill(pool, [b"c", b"d"]))
    shared = pool.share(pool.find([b"a", b"b"]), 8)
    assert shared is not None
    pool.release(shared)
    table: list[int] = []
    assert pool.grow(table, 8)
    assert len(pool.find([b"a", b"b"])) == 2
    assert not pool.find([b"c"])


def test_found_blocks_that_nobody_holds_do_not_count_twice() -> None:
    pool = BlockPool(3, 4)
    pool.release(fill(pool, [b"a", b"b"]))
    found = pool.find([b"a", b"b", b"missing"])
    assert len(found) == 2
    assert pool.share(found, 16) is None
    assert pool.num_free == 3
    table = pool.share(found, 12)
    assert table is not None
    assert pool.num_free == 0


def test_equal_blocks_that_were_computed_twice_are_found_once() -> None:
    pool = BlockPool(4, 4)
    first, second = fill(pool, [b"a"]), fill(pool, [b"a"])
    pool.release(first)
    assert pool.find([b"a"]) == first
    pool.release(second)
    table: list[int] = []
    assert pool.grow(table, 12)
    assert pool.find([b"a"]) == first


def test_a_key_stands_for_all_tokens_up_to_its_block() -> None:
    def keys(tokens: list[int], salt: bytes = b"") -> list[bytes]:
        found: list[bytes] = []
        extend_keys(found, tokens, len(tokens) // 4, 4, salt)
        return found

    tokens = list(range(12))
    assert len(keys(tokens)) == 3
    assert keys(tokens)[:2] == keys(tokens[:8])
    assert not set(keys(tokens)) & set(keys([1, *tokens[1:]]))
    assert not set(keys(tokens)) & set(keys(tokens, b"salt"))
    assert keys(tokens)[0] == keys([*tokens[:4], 99, 98, 97, 96])[0]
    partly = keys(tokens[:4])
    extend_keys(partly, tokens, 3, 4, b"")
    assert partly == keys(tokens)
