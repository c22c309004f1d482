"""The ranks of a run and what they say to each other: a thin layer over `torch.distributed`.

A world of one rank needs no process group, and its collectives do nothing. All messages are plain
tensors; nothing is pickled.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from tightfit.errors import RankFailedError
from tightfit.runtime.launch import follow_launcher


class World:
    """This rank, and the others.

    Raises:
        RankFailedError: (any method) another rank died or did not answer in time.
    """

    def __init__(self, *, rank: int = 0, size: int = 1, device: str = "cpu") -> None:
        self.rank = rank
        self.size = size
        self.device = torch.device(device)

    @classmethod
    def from_environment(
        cls, device: str = "cpu", *, timeout: timedelta = timedelta(minutes=10)
    ) -> "World":
        """Join the process group that torchrun's environment variables describe, if any."""
        rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if device == "cuda":
            device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        world = cls(rank=rank, size=size, device=device)
        if size > 1:
            follow_launcher()
            with world._watched():
                backend = "nccl" if world.device.type == "cuda" else "gloo"
                dist.init_process_group(backend, rank=rank, world_size=size, timeout=timeout)
                world.all_reduce(torch.zeros(1, device=world.device))
        return world

    def close(self) -> None:
        """Leave the process group."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum over all ranks, in place."""
        if self.size > 1:
            with self._watched():
                dist.all_reduce(tensor)
        return tensor

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Give every rank the tensor of rank 0, in place."""
        if self.size > 1:
            with self._watched():
                dist.broadcast(tensor, src=0)
        return tensor

    def gather_columns(self, tensor: Tensor, widths: list[int]) -> list[Tensor] | None:
        """Bring shares of columns, which may be of different widths, to rank 0.

        Args:
            tensor: [rows, widths[rank]].
            widths: columns of every rank.

        Returns:
            On rank 0 a tensor [rows, widths[r]] of every rank r, elsewhere None.
        """
        if self.size == 1:
            return [tensor]
        widest = max(widths)
        if tensor.shape[1] < widest:
            tensor = torch.nn.functional.pad(tensor, (0, widest - tensor.shape[1]))
        shares = [torch.empty_like(tensor) for _ in widths] if self.rank == 0 else None
        with self._watched():
            dist.gather(tensor.contiguous(), shares, dst=0)
        if shares is None:
            return None
        return [share[:, :width] for share, width in zip(shares, widths, strict=True)]

    def broadcast_bytes(self, payload: bytes) -> bytes:
        """Give every rank the payload of rank 0."""
        if self.size == 1:
            return payload
        length = self.broadcast(torch.tensor([len(payload)], device=self.device))
        buffer = self._bytes(payload if self.rank == 0 else b"", int(length.item()))
        return bytes(self.broadcast(buffer).cpu().numpy())

    def gather_bytes(self, payload: bytes) -> list[bytes]:
        """Give every rank the payloads of all ranks."""
        if self.size == 1:
            return [payload]
        lengths = torch.zeros(self.size, dtype=torch.int64, device=self.device)
        lengths[self.rank] = len(payload)
        sizes: list[int] = self.all_reduce(lengths).tolist()
        mine = self._bytes(payload, max(sizes))
        buffers = [torch.empty_like(mine) for _ in sizes]
        with self._watched():
            dist.all_gather(buffers, mine)
        return [bytes(b[:n].cpu().numpy()) for b, n in zip(buffers, sizes, strict=True)]

    def _bytes(self, payload: bytes, length: int) -> Tensor:
        padded = bytearray(payload.ljust(length, b"\0"))
        if not padded:
            return torch.empty(0, dtype=torch.uint8, device=self.device)
        return torch.frombuffer(padded, dtype=torch.uint8).to(self.device)

    @contextmanager
    def _watched(self) -> Iterator[None]:
        # Gloo and NCCL say RuntimeError (or a subclass) for everything that can go wrong.
        try:
            yield
        except RuntimeError as error:
            raise RankFailedError(
                f"rank {self.rank} lost the connection to another rank",
                hint="the message of the rank that failed first says why: "
                + (str(error).strip().splitlines() or ["no details"])[0],
            ) from error
