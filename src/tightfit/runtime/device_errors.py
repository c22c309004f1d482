"""What goes wrong with a GPU, for which a user can do something: no bugs, so no tracebacks."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from tightfit.errors import DeviceError


def told(error: Exception) -> DeviceError | None:
    """What to say of an error of torch's or Triton's; None if it is something else.

    What Triton raises is told by its module, since a CPU needs none.
    """
    if isinstance(error, torch.OutOfMemoryError):
        return DeviceError(
            # Without what torch says of its allocator.
            str(error).partition("Including")[0].strip(),
            hint="lower --gpu-memory-utilization, --max-num-batched-tokens or --max-num-seqs; "
            "nvidia-smi shows whether other processes are on the GPU",
        )
    if type(error).__module__.split(".")[0] == "triton":
        return DeviceError(
            f"a kernel cannot be built for this GPU: {_first_line(error)}",
            hint="the kernels are made for GPUs like H100; use --engine vllm, or --device cpu",
        )
    return None


@contextmanager
def usable(device: torch.device) -> Iterator[None]:
    """For the first use of a GPU.

    Raises:
        DeviceError: CUDA cannot use it.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, AssertionError) as error:
        raise DeviceError(
            f"CUDA cannot use GPU {device.index}: {_first_line(error)}",
            hint="nvidia-smi shows the driver, which may be too old for this torch "
            f"({torch.__version__}), and who uses the GPU; or use --device cpu",
        ) from error


@contextmanager
def building_kernels() -> Iterator[None]:
    """For the first kernel of Triton's, which needs more than a GPU.

    Raises:
        DeviceError: Triton or its compiler is missing, or what that needs.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of Triton, of its compiler, of the system
        raise DeviceError(
            f"Triton cannot build a kernel here: {_first_line(error)}",
            hint="it comes with torch for Linux, and needs a C compiler and Python's headers "
            "(packages such as gcc and python3-dev)",
        ) from error


def _first_line(error: Exception) -> str:
    kind, lines = type(error).__name__, str(error).strip().splitlines()
    return f"{kind}: {lines[0]}" if lines else kind
