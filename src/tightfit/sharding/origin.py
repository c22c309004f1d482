"""What an output was made of: fingerprints of jobs, and the states of the files that were read.

Fingerprints come of headers, and tell nothing of weights. The states of files do, as far as nobody
forges times: equal ones are of the same bytes. Others may be of a copy, so that only its contents
can tell (`proof.same_source`).
"""

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import xxhash

from tightfit.checkpoint.header import TensorInfo
from tightfit.checkpoint.source import Source
from tightfit.model.layout import RankTensor

States = Mapping[str, list[int | str]]
"""By source file, its size, and its time of modification or what a distant store says of it."""

_AT_A_TIME = 8


def source_fingerprint(tensors: Mapping[str, TensorInfo]) -> str:
    """A hash of names, dtypes, shapes and places of all tensors, and not of their bytes."""
    digest = xxhash.xxh3_128()
    for name in sorted(tensors):
        info = tensors[name]
        line = f"{name}\0{info.dtype}\0{info.shape}\0{info.file}\0{info.offset}\n"
        digest.update(line.encode())
    return digest.hexdigest()


def cut_fingerprint(tensors: Iterable[RankTensor]) -> str:
    """A hash of what all ranks hold: another config may cut the same source otherwise."""
    digest = xxhash.xxh3_128()
    for one in tensors:
        digest.update(f"{one.name}\0{one.shape}\0{one.fill}\0{one.pieces}\n".encode())
    return digest.hexdigest()


def source_states(source: Source, files: Iterable[str]) -> dict[str, list[int | str]]:
    """By what changed source files are told from those that were read before.

    Raises:
        CheckpointError: one is not there, or cannot be asked for.
    """
    names = sorted(files)
    with ThreadPoolExecutor(max_workers=_AT_A_TIME) as pool:
        return dict(zip(names, pool.map(source.state, names), strict=True))


def states_of(entries: Mapping[str, Any]) -> States:
    """The states of source files in a document.

    Raises:
        TypeError, AttributeError: they are not as ours.
    """
    return {
        str(name): [one if type(one) is int else str(one) for one in state]
        for name, state in entries.items()
    }


def same_states(noted: States, now: States) -> bool:
    """Whether the files that were noted are still the same; sizes alone prove nothing."""
    return bool(noted) and all(
        len(state) > 1 and now.get(file) == state for file, state in noted.items()
    )
