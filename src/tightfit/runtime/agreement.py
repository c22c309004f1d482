"""What ranks have to know of each other before they go on: errors, and what each has planned."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace

from tightfit.errors import ExitCode, TightfitError, UsageError
from tightfit.runtime.options import EngineOptions
from tightfit.runtime.ranks.world import World


@contextmanager
def together(world: World) -> Iterator[None]:
    """Let all ranks fail if one of them does, before the others wait for it in a collective.

    Raises:
        TightfitError: that of the first rank that has one.
    """
    failure: TightfitError | None = None
    try:
        yield
    except TightfitError as error:
        failure = error
    told = [failure.message, failure.hint, int(failure.exit_code)] if failure else None
    for told_by_rank in map(json.loads, world.gather_bytes(json.dumps(told).encode())):
        if failure is not None and told_by_rank == told:
            raise failure
        if told_by_rank is not None:
            message, hint, code = told_by_rank
            theirs = TightfitError(message, hint=hint)
            theirs.exit_code = ExitCode(code)
            raise theirs


def agreed(options: EngineOptions, world: World) -> EngineOptions:
    """What all ranks work with, each of which planned for its own device.

    Blocks are as many as the smallest device has; all else has to be the same.

    Raises:
        UsageError: it is not, which may be so on nodes that are not alike.
    """
    mine = json.dumps(asdict(options)).encode()
    everybody = [json.loads(payload) for payload in world.gather_bytes(mine)]
    for name, value in everybody[0].items():
        for rank, other in enumerate(everybody):
            if name != "num_blocks" and other[name] != value:
                raise UsageError(
                    f"{name} is {value} on rank 0, and {other[name]} on rank {rank}",
                    hint="the nodes differ, or what was started on them: give that option",
                )
    return replace(options, num_blocks=min(one["num_blocks"] for one in everybody))
