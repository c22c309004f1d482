"""Assembly of the commands. Only the module of the command that is called gets imported."""

import gc
import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Annotated

import typer

from tightfit import __version__
from tightfit.cli.arguments import like_vllm
from tightfit.cli.help import Command

COMMANDS = ("plan", "shard", "verify", "merge", "quantize", "run", "demo")

_HELP = "Plan the memory of a language model, prepare its checkpoint, prove that it fits."

_EXIT_CODES = (
    "Exit codes: 0 done, or it fits; 1 it does not fit, or a verification failed; "
    "2 wrong usage or input; 3 the model cannot be modelled; "
    "4 planned and measured memory differ; 130 interrupted."
)


def build(arguments: Sequence[str]) -> typer.Typer:
    """The application, with the command that the arguments name, or with all of them."""
    app = typer.Typer(
        name="tightfit",
        help=_HELP,
        epilog=_EXIT_CODES,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_global_options)
    named = next((a for a in arguments if not a.startswith("-")), None)
    for name in (named,) if named in COMMANDS else COMMANDS:
        command = getattr(import_module(f"tightfit.cli.{name}"), name)
        app.command(name, cls=Command, epilog=_EXIT_CODES)(command)
    return app


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"tightfit {__version__}")
        raise typer.Exit


def _global_options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version)
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line of this process."""
    # Short lives with large headers: collecting cycles costs more than it frees.
    gc.disable()
    signal.signal(signal.SIGTERM, _interrupt)
    arguments = like_vllm(sys.argv[1:])
    build(arguments)(arguments)


def _interrupt(*_: object) -> None:
    """Let SIGTERM clean up as Ctrl-C does."""
    raise KeyboardInterrupt
