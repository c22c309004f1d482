"""GPUs and how much memory their driver reports, which is less than the brochure's figure.

A total is what `torch.cuda.mem_get_info` returns, as start-up logs and out-of-memory messages print
it. Drivers differ by a tenth of a GiB; of several logged values the smaller one is here, because
promising too much ends in an error. A total that nobody logged is derived: the brochure's size less
what the driver keeps on its nearest kin.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tightfit.errors import UsageError
from tightfit.units import GiB, KiB, format_bytes, parse_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One device of a rank; `kind` is `cuda`, `rocm` or `cpu`."""

    name: str
    total_bytes: int
    kind: str = "cuda"
    logged: bool = True
    """Whether the total was seen in a log; otherwise it is derived."""
    capability: tuple[int, int] | None = None
    """CUDA's compute capability, where it is known."""

    @property
    def alone(self) -> bool:
        """Whether a machine has only one, and shares its memory with it: DGX Spark."""
        return self.name.startswith("gb10-")

    @property
    def bfloat16(self) -> bool:
        """Whether it computes in bfloat16."""
        return self.capability is None or self.capability >= (8, 0)


_LOGGED = {
    "rtx3080-10gb": 9.64,
    "t4-16gb": 14.56,
    "rtx5060ti-16gb": 15.45,
    "rtx5080-16gb": 15.47,
    "rtxa4000-16gb": 15.61,
    "v100-16gb": 15.78,
    "l4-24gb": 22.03,
    "a10g-24gb": 22.05,
    "a10-24gb": 22.06,
    "rtx4090-24gb": 23.53,
    "rtx3090-24gb": 23.57,
    "rtx5090-32gb": 31.35,
    "a100-40gb": 39.39,
    "a40-48gb": 44.34,
    "l40s-48gb": 44.39,
    "l40-48gb": 44.40,
    "rtxa6000-48gb": 47.40,
    "h100-pcie-80gb": 79.10,
    "a100-80gb": 79.15,
    "h100-80gb": 79.18,
    "gh200-96gb": 94.50,
    "rtxpro6000-96gb": 94.96,
    "h20-96gb": 95.00,
    "gb10-128gb": 121.69,
    "h200-141gb": 139.80,
    "b200-180gb": 178.35,
}
_DERIVED = {
    "rtx2080ti-11gb": 10.57,
    "rtx3060-12gb": 11.62,
    "rtx4070-12gb": 11.59,
    "rtx4060ti-16gb": 15.57,
    "rtx4080-16gb": 15.57,
    "rtx5070ti-16gb": 15.45,
    "rtx4000ada-20gb": 19.45,
    "a30-24gb": 23.49,
    "rtxa5000-24gb": 23.55,
    "rtx5000ada-32gb": 31.49,
    "v100-32gb": 31.72,
    "rtx6000ada-48gb": 47.40,
    "rtxpro5000-48gb": 47.28,
    "h800-80gb": 79.18,
    "h100-nvl-94gb": 93.00,
    "h200-nvl-141gb": 139.80,
    "gh200-144gb": 139.80,
    "gb200-186gb": 184.30,
    "b300-288gb": 267.60,
}
_ROCM_LOGGED = {
    "rx7900xtx-24gb": 23.98,
    "w7900-48gb": 44.98,
    "mi300x-192gb": 191.98,
    "mi355x-288gb": 287.98,
}
_ROCM_DERIVED = {
    "rx7900xt-20gb": 19.98,
    "r9700-32gb": 31.85,
    "mi210-64gb": 63.98,
    "mi250x-64gb": 63.98,
    "mi325x-256gb": 255.98,
    "mi350x-288gb": 287.98,
}
_CAPABILITIES: Mapping[tuple[int, int], str] = {
    (7, 0): "v100",
    (7, 5): "t4 rtx2080ti",
    (8, 0): "a100 a30",
    (8, 6): "a10 a10g a40 rtx3060 rtx3080 rtx3090 rtxa4000 rtxa5000 rtxa6000",
    (8, 9): "l4 l40 l40s rtx4060ti rtx4070 rtx4080 rtx4090 rtx4000ada rtx5000ada rtx6000ada",
    (9, 0): "h20 h100 h200 h800 gh200",
    (10, 0): "b200 gb200",
    (10, 3): "b300",
    (12, 0): "rtx5060ti rtx5070ti rtx5080 rtx5090 rtxpro5000 rtxpro6000",
    (12, 1): "gb10",
}
"""By the first part of a name (NVIDIA's table of CUDA GPUs)."""


def _devices() -> Iterator[Device]:
    capabilities = {name: one for one, names in _CAPABILITIES.items() for name in names.split()}
    for totals, kind, logged in (
        (_LOGGED, "cuda", True),
        (_DERIVED, "cuda", False),
        (_ROCM_LOGGED, "rocm", True),
        (_ROCM_DERIVED, "rocm", False),
    ):
        for name, gib in totals.items():
            yield Device(
                name=name,
                total_bytes=int(gib * GiB),
                kind=kind,
                logged=logged,
                capability=capabilities.get(name.split("-")[0]),
            )


CATALOGUE: Mapping[str, Device] = {
    one.name: one for one in sorted(_devices(), key=lambda one: one.total_bytes)
}
"""By name, the smallest first. A GPU of two dies (mi250x) is what the engine sees: one die."""


def device(gpu: str | None, gpu_memory: str | None) -> Device | None:
    """The device that the options name; None when they name none.

    `cpu` is this machine, or one with as much memory as is said.

    Raises:
        UsageError: an unknown name, or both options.
    """
    is_cpu = gpu is not None and gpu.lower() == "cpu"
    if gpu is not None and gpu_memory is not None and not is_cpu:
        raise UsageError("--gpu and --gpu-memory contradict each other", hint="give one of them")
    if gpu_memory is not None:
        total_bytes = parse_bytes(gpu_memory)
        if total_bytes < GiB // 8:
            raise UsageError(
                f"--gpu-memory {gpu_memory} is less than any GPU has", hint="write it as 24GiB"
            )
        if is_cpu:
            return Device(name="cpu", total_bytes=total_bytes, kind="cpu")
        return Device(name=f"a GPU of {format_bytes(total_bytes)}", total_bytes=total_bytes)
    if is_cpu:
        return this_machine()
    return None if gpu is None else named(gpu)


def named(gpu: str) -> Device:
    """The device of the catalogue that a name means: `H100`, `rtx 4090`, `A100-SXM4-80GB`.

    A model without a size means the one size that it comes in.

    Raises:
        UsageError: no device, or several.
    """
    text = _plain(gpu)
    known = {_plain(name): one for name, one in CATALOGUE.items()}
    for matches in (
        [one for name, one in known.items() if name == text],
        [one for one in known.values() if _plain(one.name.rpartition("-")[0]) == text],
        [one for name, one in known.items() if text and name.startswith(text)],
        [one for name, one in known.items() if len(text) >= 4 and text in name],
    ):
        if len(matches) == 1:
            return matches[0]
        if matches:
            raise UsageError(
                f"--gpu {gpu!r} could be several GPUs",
                hint="one of " + ", ".join(one.name for one in matches),
            )
    from difflib import get_close_matches

    models = {name.rsplit("-", 1)[0]: name for name in CATALOGUE}
    close = get_close_matches(text, list(models), n=3, cutoff=0.5)
    hint = (
        f"did you mean {' or '.join(models[model] for model in close)}?"
        if close
        else ("known: " + ", ".join(CATALOGUE))
    )
    raise UsageError(f"unknown GPU {gpu!r}", hint=f"{hint}; --gpu-memory 24GiB serves any GPU")


def _plain(name: str) -> str:
    """Letters and digits, without maker, brand, socket and kind of memory."""
    words = re.sub(r"nvidia|geforce|amd|instinct|radeon|sxm\d?|hbm\d?e?", " ", name.lower())
    return re.sub(r"[^a-z0-9]", "", words)


def available_bytes() -> int | None:
    """What processes of this machine could still take, if it says so (Linux)."""
    try:
        return _meminfo("MemAvailable")
    except (OSError, StopIteration, ValueError):
        return None


def _meminfo(name: str) -> int:
    with open("/proc/meminfo", encoding="ascii") as lines:
        return next(int(line.split()[1]) * KiB for line in lines if line.startswith(f"{name}:"))


_TILES = {"BF16": "amx_bf16", "F16": "amx_fp16"}


@cache
def multiplies_in_tiles(dtype: str) -> bool:
    """Whether this machine's processors have AMX for a dtype (Linux)."""
    try:
        return dtype in _TILES and _TILES[dtype] in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def this_machine() -> Device:
    """The memory of this machine, or of the container that holds us (Linux).

    Raises:
        UsageError: the machine does not say.
    """
    total_bytes = 0
    try:
        total_bytes = _meminfo("MemTotal")
        with open("/sys/fs/cgroup/memory.max", encoding="ascii") as limit:
            text = limit.read().strip()
            total_bytes = min(total_bytes, int(text)) if text.isdigit() else total_bytes
    except (OSError, StopIteration, ValueError):
        if not total_bytes:
            raise UsageError(
                "cannot tell the memory of this machine", hint="give it with --gpu-memory 16GiB"
            ) from None
    return Device(name="cpu", total_bytes=total_bytes, kind="cpu")
