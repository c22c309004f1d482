"""Starting the ranks of a job, and noticing when one of them dies or hangs.

The launcher is torch's own elastic agent, as behind `torchrun`: it runs the same command once per
rank with RANK, WORLD_SIZE and MASTER_* set. So a rank does not know whether tightfit or a user's
own torchrun started it. A rank never outlives its launcher, whatever kills that.
"""

import ctypes
import logging
import os
import signal
import sys
import uuid
from collections.abc import Mapping, Sequence

from tightfit.errors import ExitCode, RankFailedError
from tightfit.interrupts import uninterrupted
from tightfit.runtime.ranks.heartbeat import RANK_TIMEOUT, beat, watched_ranks

_PR_SET_PDEATHSIG = 1
_LAUNCHER_PID = "TIGHTFIT_LAUNCHER_PID"
_HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
_TOLD_EXIT_CODES = frozenset(ExitCode) - {ExitCode.OK, ExitCode.FINDING}
"""Exit codes of a rank that has already told the user what is wrong."""


def is_rank() -> bool:
    """Whether this process was started as a rank, by `launch_ranks` or by torchrun."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def follow_launcher() -> None:
    """Make this rank show that it lives, die with its launcher, and at once when told to stop."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        launcher = os.environ.get(_LAUNCHER_PID)
        if launcher is not None and int(launcher) != os.getppid():
            os._exit(ExitCode.INTERRUPTED)
    # A rank that waits for a dead one inside a collective cannot run Python's signal handlers.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    beat()


def launch_ranks(
    command: Sequence[str],
    world_size: int,
    *,
    environment: Mapping[str, str] | None = None,
    grace_seconds: int = 30,
) -> int:
    """Run `command` as `world_size` ranks of one job on this machine, and wait for them.

    Args:
        command: the program and its arguments, such as `[sys.executable, "-m", "tightfit", ...]`.
        world_size: the number of ranks.
        environment: variables for the ranks.
        grace_seconds: after a signal, until ranks that go on are killed.

    Returns:
        The exit code: 0, or that of a rank that stopped with a message of its own; 130 after
        Ctrl-C.

    Raises:
        RankFailedError: a rank was killed, crashed or hung. The others are stopped by then.
        UsageError: TIGHTFIT_RANK_TIMEOUT is not a number of seconds.
    """
    try:
        with uninterrupted():
            from torch.distributed.elastic.multiprocessing.api import SignalException
            from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
            from torch.distributed.launcher.api import LaunchConfig, launch_agent
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED

    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // world_size)))
    if sys.platform == "linux":
        # Otherwise gloo looks up the host's name, which containers often cannot resolve.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        # And NCCL takes the first interface with an address, whatever a firewall thinks of it.
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(grace_seconds)
    os.environ[_LAUNCHER_PID] = str(os.getpid())
    os.environ.update(environment or {})
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=world_size,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,
        monitor_interval=0.1,
    )
    # The agent leaves its own handlers behind.
    handlers = {number: signal.getsignal(number) for number in _HANDLED}
    with watched_ranks() as watch:
        # This process only waits; what torch logs about ends and signals we say ourselves.
        logging.disable(logging.CRITICAL)
        try:
            launch_agent(config, command[0], list(command[1:]))
        except ChildFailedError as error:
            if watch.hung:
                raise _hung(watch.hung, watch.seconds) from None
            return _explain({rank: failure.exitcode for rank, failure in error.failures.items()})
        except (SignalException, KeyboardInterrupt):
            return ExitCode.INTERRUPTED
        finally:
            logging.disable(logging.NOTSET)
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return ExitCode.OK


def _hung(ranks: Sequence[int], seconds: float) -> RankFailedError:
    which = ", ".join(map(str, sorted(ranks)))
    return RankFailedError(
        f"rank {which} hung: no sign of life for {seconds:g} seconds",
        hint="something stopped it, or it waits for a disk, a driver or memory that is swapped "
        f"(see dmesg); {RANK_TIMEOUT} sets the seconds",
    )


def _explain(exit_codes: Mapping[int, int]) -> int:
    """Find the cause among ranks that ended together.

    A rank that was killed comes first, then one that has told the user why it stopped; the others
    only lost their connection, or were stopped by the launcher (SIGTERM).
    """

    def order(item: tuple[int, int]) -> int:
        code = item[1]
        if code < 0 and code != -signal.SIGTERM:
            return 0
        return 1 if code in _TOLD_EXIT_CODES else 2 if code > 0 else 3

    rank, code = min(exit_codes.items(), key=order)
    if code in _TOLD_EXIT_CODES:
        return code
    hint = "see the messages above"
    if code > 0:
        raise RankFailedError(f"rank {rank} failed (exit code {code})", hint=hint)
    if -code == signal.SIGKILL:
        hint = (
            "the kernel does that when memory runs out (see dmesg): lower "
            "--max-num-batched-tokens or the size of the KV cache"
        )
    raise RankFailedError(f"rank {rank} died ({signal.Signals(-code).name})", hint=hint)
