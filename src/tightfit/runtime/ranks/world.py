"""The ranks of a run and what they say to each other: a thin layer over `torch.distributed`.

A world of one rank needs no process group, and its collectives do nothing. All messages are plain
tensors; nothing is pickled. Tensors go by NCCL between GPUs; what ranks have to tell each other
beside them goes by gloo, so that no GPU waits for it.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from time import monotonic, sleep

import torch
import torch.distributed as dist
from torch import Tensor

from tightfit.errors import DeviceError, RankFailedError
from tightfit.runtime.device_errors import usable
from tightfit.runtime.memory.ledger import MemoryLedger
from tightfit.runtime.ranks.heartbeat import Neighbours, introduction, seconds_from
from tightfit.runtime.ranks.launch import follow_launcher

STEP_TIMEOUT = "TIGHTFIT_STEP_TIMEOUT"
"""The variable with the seconds after which a step is given up that other ranks take part in."""
_STEP_SECONDS = {"cuda": 60.0, "cpu": 600.0}
_IDLE_SECONDS = 60.0
"""Longer than an idle rank 0 is silent (`lockstep.HEARTBEAT_SECONDS`)."""
_CONNECTING = timedelta(minutes=10)
_LOADING = timedelta(hours=4)
"""A rank may have its files in memory, and another wait for a network."""
_POLL_SECONDS = 2e-5
_SHORT = 504
"""Bytes of a message that needs no second one."""
_WARM_ELEMENTS = (1, 2**12, 2**17, 2**22)
"""NCCL has other ways for other sizes, and connects each when it is first taken."""
_NCCL_DEFAULTS = {
    # A rank that NCCL's watchdog ends shall not write a report first, which takes a minute.
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
    # Stages talk one after the other as it is.
    "TORCH_NCCL_SHOW_EAGER_INIT_P2P_SERIALIZATION_WARNING": "false",
    # Connections that are made in the background have hung (pytorch#153960).
    "TORCH_NCCL_USE_COMM_NONBLOCKING": "0",
    # Registering memory of graphs fails where segments of it can grow.
    "NCCL_GRAPH_REGISTER": "0",
}
_LOOK_SECONDS = 1.0
"""Between two looks whether the other ranks of this machine still live."""

_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
"""torch 2.13 warns of the old name."""


class World:
    """This rank, and the others.

    Ranks that share layers, the tensor parallel ones, are neighbours, and those of a pipeline stage
    are such. Collectives are among these; messages of bytes go to all.

    Raises:
        RankFailedError: (any method) another rank died or did not answer in time.
        DeviceError: (any method) NCCL failed.
    """

    def __init__(
        self, *, rank: int = 0, size: int = 1, stages: int = 1, device: str = "cpu"
    ) -> None:
        self.rank = rank
        self.size = size
        self.stages = stages
        self.tp_size = size // stages
        self.tp_rank = rank % self.tp_size
        self._stage: dist.ProcessGroup | None = None
        self.device = torch.device(device)
        self._step_seconds = _STEP_SECONDS[self.device.type]
        self.ledger: MemoryLedger | None = None
        """Of a GPU: it has to know what was there before."""
        self._neighbours = Neighbours((), rank)
        self._releases: list[Callable[[], None]] = []

    @classmethod
    def from_environment(cls, device: str = "cpu", *, stages: int = 1) -> "World":
        """Join the process group that torchrun's environment variables describe, if any.

        Args:
            device: `cpu`, or `cuda` for the GPU of this rank on its node.
            stages: of the pipeline; their number divides that of the ranks.

        Raises:
            UsageError: there is no GPU for this rank, or TIGHTFIT_STEP_TIMEOUT is not a number.
        """
        rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        world = cls(rank=rank, size=size, stages=stages, device=device)
        if device == "cuda":
            from tightfit.runtime.memory.cuda import CudaLedger

            gpu = int(os.environ.get("LOCAL_RANK", 0))
            world.device = torch.device("cuda", gpu)
            # CUDA shall count GPUs as the driver does, for one of which everything was planned.
            os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
            world.ledger = CudaLedger(gpu)
            with world.ledger.phase("cuda_context"), usable(world.device):
                torch.cuda.set_device(world.device)
                torch.zeros(1, device=world.device)
        if size > 1:
            follow_launcher()
            world._step_seconds = seconds_from(STEP_TIMEOUT, _STEP_SECONDS[world.device.type])
            with world._watched():
                if world.device.type == "cpu":
                    dist.init_process_group("gloo", rank=rank, world_size=size, timeout=_CONNECTING)
                    world._talk(torch.zeros(1))
                else:
                    assert world.ledger is not None
                    with world.ledger.phase("nccl"):
                        world._connect_gpus()
                told = world.gather_bytes(introduction())
                world._neighbours = Neighbours(told, world.rank)
            world._allow(_LOADING)
        return world

    def _connect_gpus(self) -> None:
        for name, value in _NCCL_DEFAULTS.items():
            os.environ.setdefault(name, value)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl",
            rank=self.rank,
            world_size=self.size,
            timeout=_CONNECTING,
            device_id=self.device,
        )
        # NCCL allocates its buffers when they are first used.
        self._talk(torch.zeros(_WARM_ELEMENTS[-1], device=self.device))
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()

    def _talk(self, tensor: Tensor) -> None:
        """Make the groups of the stages, and one use of each connection."""
        if 1 < self.stages < self.size:
            for first in range(0, self.size, self.tp_size):
                ranks = list(range(first, first + self.tp_size))
                group = dist.new_group(ranks, timeout=_CONNECTING)
                if self.rank in ranks:
                    self._stage = group
        for count in _WARM_ELEMENTS:
            if count <= len(tensor):
                self.all_reduce(tensor[:count])
                self.all_gather(tensor[:count])
        if self.rank >= self.tp_size:
            self.receive(tensor)
        if self.rank < self.size - self.tp_size:
            self.send(tensor)
        self.from_last_stage(tensor)

    def loaded(self) -> None:
        """Wait until all ranks are; then nobody waits for another longer than a step may take."""
        if self.size > 1:
            self.gather_bytes(b"")
            limit = timedelta(seconds=self._step_seconds + _IDLE_SECONDS)
            self._allow(limit)
            if self.device.type == "cuda":
                # What waits for a GPU elsewhere than in `wait` is ended by NCCL's watchdog.
                self._allow(limit, "cuda")

    def _allow(self, limit: timedelta, kind: str = "cpu") -> None:
        """Let messages between CPUs, or GPUs, take so long from now on."""
        for group in (dist.group.WORLD, self._stage):
            if group is not None:
                group._get_backend(torch.device(kind))._set_default_timeout(limit)

    def wait(self, event: torch.cuda.Event) -> None:
        """Wait until this rank's GPU has come to an event.

        Raises:
            RankFailedError: it has not in time, since another rank does not take part.
        """
        if self.size == 1:
            event.synchronize()
            return
        started = monotonic()
        deadline, look = started + self._step_seconds, started + _LOOK_SECONDS
        while not event.query():
            now = monotonic()
            if now > look:
                self._neighbours.require_alive()
                look = now + _LOOK_SECONDS
            if now > deadline:
                raise RankFailedError(
                    f"the GPUs did not finish the step in {self._step_seconds:g} seconds, "
                    f"as rank {self.rank} sees it",
                    hint="a rank may have died or hung on another node: look at its messages; "
                    f"{STEP_TIMEOUT} sets the seconds",
                )
            sleep(_POLL_SECONDS)

    def __enter__(self) -> "World":
        """Leave the process group at the end."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Only in good order: NCCL would wait for ranks that are lost, or know of no error."""
        if kind is None:
            self.close()

    def before_closing(self, release: Callable[[], None]) -> None:
        """Call something before the process group is left."""
        self._releases.append(release)

    def close(self) -> None:
        """Leave the process group."""
        for release in self._releases:
            release()
        self._releases.clear()
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks of the stage, in place."""
        if self.tp_size > 1:
            with self._watched():
                dist.all_reduce(tensor, group=self._stage)
        return tensor

    def all_max(self, tensor: Tensor) -> Tensor:
        """The largest over the ranks of the stage, element by element, in place."""
        if self.tp_size > 1:
            with self._watched():
                dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self._stage)
        return tensor

    def all_gather(self, tensor: Tensor) -> Tensor:
        """The tensors of the ranks of the stage, of one shape: [ranks, ...]."""
        if self.tp_size == 1:
            return tensor[None]
        everywhere = tensor.new_empty(self.tp_size * len(tensor), *tensor.shape[1:])
        with self._watched():
            _all_gather(everywhere, tensor.contiguous(), group=self._stage)
        return everywhere.view(self.tp_size, *tensor.shape)

    def send(self, tensor: Tensor) -> None:
        """Give the next stage what this one has made of its tokens."""
        with self._watched():
            dist.send(tensor, dst=self.rank + self.tp_size)

    def receive(self, tensor: Tensor) -> Tensor:
        """Take what the stage before gives, in place."""
        with self._watched():
            dist.recv(tensor, src=self.rank - self.tp_size)
        return tensor

    def from_last_stage(self, tensor: Tensor) -> Tensor:
        """Give every rank the tensor of the last stage, in place."""
        return self._broadcast(tensor, src=self.size - self.tp_size) if self.stages > 1 else tensor

    def _broadcast(self, tensor: Tensor, src: int = 0) -> Tensor:
        with self._watched():
            dist.broadcast(tensor, src=src)
        return tensor

    def all_gather_columns(self, tensor: Tensor, widths: Sequence[int]) -> Tensor:
        """Give the ranks of the stage all columns, of which they may have different numbers.

        Args:
            tensor: [rows, widths[rank]].
            widths: columns of each.

        Returns:
            [rows, sum(widths)].
        """
        if self.tp_size == 1:
            return tensor
        widest = max(widths)
        if tensor.shape[1] < widest:
            tensor = torch.nn.functional.pad(tensor, (0, widest - tensor.shape[1]))
        shares = self.all_gather(tensor)
        return torch.cat(
            [share[:, :width] for share, width in zip(shares, widths, strict=True)], dim=1
        )

    def broadcast_bytes(self, payload: bytes) -> bytes:
        """Give every rank the payload of rank 0; a short one goes in a single message."""
        if self.size == 1:
            return payload
        payload = payload if self.rank == 0 else b""
        head = self._bytes(len(payload).to_bytes(8, "little") + payload[:_SHORT], 8 + _SHORT)
        told = bytes(self._broadcast(head).numpy())
        length = int.from_bytes(told[:8], "little")
        if length <= _SHORT:
            return told[8 : 8 + length]
        rest = self._broadcast(self._bytes(payload[_SHORT:], length - _SHORT))
        return told[8:] + bytes(rest.numpy())

    def gather_bytes(self, payload: bytes) -> list[bytes]:
        """Give every rank the payloads of all ranks."""
        if self.size == 1:
            return [payload]
        sizes = [int(length) for length in self._gather(torch.tensor([len(payload)]))]
        buffers = self._gather(self._bytes(payload, max(sizes)))
        return [bytes(b[:n].numpy()) for b, n in zip(buffers, sizes, strict=True)]

    def _gather(self, tensor: Tensor) -> list[Tensor]:
        everywhere = [torch.empty_like(tensor) for _ in range(self.size)]
        with self._watched():
            dist.all_gather(everywhere, tensor)
        return everywhere

    @staticmethod
    def _bytes(payload: bytes, length: int) -> Tensor:
        padded = bytearray(payload.ljust(length, b"\0"))
        return torch.frombuffer(padded, dtype=torch.uint8) if padded else torch.empty(0).byte()

    @contextmanager
    def _watched(self) -> Iterator[None]:
        # Gloo and NCCL say RuntimeError (or a subclass) for everything that can go wrong.
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except dist.DistBackendError as error:
            raise DeviceError(
                f"NCCL failed on rank {self.rank}: {_cause(error)}",
                hint="NCCL_DEBUG=WARN shows more; in a container it needs shared memory "
                "(--shm-size) or --ipc=host",
            ) from error
        except RuntimeError as error:
            raise RankFailedError(
                f"rank {self.rank} lost the connection to another rank",
                hint="the message of the rank that failed first says why: "
                + (str(error).strip().splitlines() or ["no details"])[0],
            ) from error


def _cause(error: Exception) -> str:
    """What NCCL says last, which torch puts below a line of its own."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    for i, line in enumerate(lines):
        if line.startswith("Last error:"):
            return " ".join(lines[i + 1 : i + 2]) or lines[0]
    return lines[0] if lines else type(error).__name__
