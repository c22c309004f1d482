"""How vLLM packs pages of several sizes into blocks, as DeepSeek V4's attention needs it.

Layers that need slots for the same tokens form a bucket, whatever the sizes of their pages. A
bucket becomes one group, whose pages lie side by side in a block; but where there are as many
layers of each of its sizes it may be dealt to several groups, so that blocks of all groups hold
about as many layers. (`v1/core/kv_cache_utils.py: _get_packed_kv_cache_groups`, vLLM 0.32.)

Before, pages of windows were padded to the sizes that the rows of whole contexts have, and a block
had a place for each page of any group. (`_get_kv_cache_groups_uniform_groups`, vLLM 0.25.1.)
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping

from tightfit.errors import UnsupportedModelError
from tightfit.planner.kv_kinds import LayerKind
from tightfit.units import cdiv, round_up


def packed_groups(
    kinds: Counter[LayerKind], here: Counter[LayerKind], pages: Mapping[LayerKind, int]
) -> tuple[tuple[LayerKind, ...], int]:
    """The groups of the whole model, and the bytes of a block in one stage.

    Args:
        kinds: of the whole model's layers, with their number.
        here: of the stage's.
        pages: bytes of a page of each kind.
    """
    buckets = _buckets(kinds)
    sizes = {key: _layers_by_page(kinds, pages, bucket) for key, bucket in buckets.items()}
    even = {key: max(s.values()) for key, s in sizes.items() if len({*s.values()}) == 1}
    whole = [even[key] for key in even if len(sizes[key]) > 1]
    layers = _least_padding(even.values(), max(whole)) if whole else None
    groups: list[LayerKind] = []
    widest = 0
    for key, bucket in buckets.items():
        several = cdiv(even[key], layers) if key in even and layers else 1
        groups += [bucket[0]] * several
        found = _layers_by_page(here, pages, bucket)
        widest = max(widest, sum(page * cdiv(n, several) for page, n in found.items()))
    return tuple(groups), widest


def padded_groups(
    kinds: Counter[LayerKind], here: Counter[LayerKind], pages: Mapping[LayerKind, int]
) -> tuple[tuple[LayerKind, ...], int]:
    """The same before 0.32.

    Raises:
        UnsupportedModelError: a page of a window is larger than all of whole contexts.
    """
    buckets = _buckets(kinds)
    sizes = {pages[kind] for kind in buckets[None, None]}
    if max(pages.values()) > max(sizes):
        raise UnsupportedModelError(
            f"pages of {max(pages.values())} bytes, and those of whole contexts have {max(sizes)}",
            hint="vLLM shares blocks among such pages from 0.32 on: --engine-version 0.32.0",
        )
    padded = {kind: min(size for size in sizes if size >= pages[kind]) for kind in kinds}
    counts = {
        key: max(_layers_by_page(kinds, padded, bucket).values()) for key, bucket in buckets.items()
    }
    layers = _least_padding(counts.values(), counts[None, None])
    groups: list[LayerKind] = []
    places: Counter[int] = Counter()
    for key, bucket in buckets.items():
        several = cdiv(counts[key], layers)
        groups += [bucket[0]] * several
        for page, n in _layers_by_page(here, padded, bucket).items():
            places[page] = max(places[page], cdiv(n, several))
    return tuple(groups), sum(page * n for page, n in places.items())


def _buckets(
    kinds: Iterable[LayerKind],
) -> dict[tuple[int | None, int | None], list[LayerKind]]:
    found: dict[tuple[int | None, int | None], list[LayerKind]] = {}
    for kind in kinds:
        found.setdefault((kind.block_size, kind.window), []).append(kind)
    return found


def _layers_by_page(
    kinds: Counter[LayerKind], pages: Mapping[LayerKind, int], bucket: Collection[LayerKind]
) -> Counter[int]:
    found: Counter[int] = Counter()
    for kind in bucket:
        found[pages[kind]] += kinds[kind]
    return found


def _least_padding(counts: Collection[int], least: int) -> int:
    """The size of chunks, `least` or more, that pads the counts the least; the largest of those."""
    sizes = range(least, max(counts) + 1)
    return min(sizes, key=lambda size: (sum(round_up(n, size) - n for n in counts), -size))
