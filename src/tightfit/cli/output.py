"""What the commands print: data on stdout, everything else on stderr.

rich is imported only when something is drawn; it honours NO_COLOR, TERM and the width itself.
"""

import errno
import functools
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import typer

from tightfit.errors import ExitCode, OutputError, TightfitError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

_FULL_DISKS = (errno.ENOSPC, errno.EDQUOT)
_FAILING_DISKS = (
    *_FULL_DISKS,
    *(
        errno.EIO,
        errno.EROFS,
        errno.EFBIG,
        errno.ENXIO,
        errno.ENODEV,
        errno.ETIMEDOUT,
        errno.ESTALE,
    ),
)

_PRINTING = ("cli", "rich", "json")

P = ParamSpec("P")
R = TypeVar("R")


def guarded(command: Callable[P, R]) -> Callable[P, R]:
    """Turn errors that a user can cause into one line, a hint and an exit code."""

    @functools.wraps(command)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            try:
                return command(*args, **kwargs)
            finally:
                # What cannot be written must be known while there is somebody to say so.
                sys.stdout.flush()
        except BaseException as error:
            if (code := explained(error)) is None:
                raise
            raise typer.Exit(code) from None

    return wrapper


def explained(error: BaseException) -> ExitCode | None:
    """Say what a user can do about an error; the exit code, or None if it is a bug."""
    match error:
        case TightfitError():
            print_error(error)
            return error.exit_code
        case KeyboardInterrupt():
            if "RANK" not in os.environ:  # whoever started the ranks says it once
                note("interrupted")
            return ExitCode.INTERRUPTED
        case BrokenPipeError():
            # The reader has what it wanted: `tightfit plan ... | head`.
            _discard_stdout()
            return ExitCode.OK
        case OSError() if error.errno in _FAILING_DISKS:
            print_error(_output_error(error))
            return ExitCode.INPUT
    return None


def _output_error(error: OSError) -> OutputError:
    """Which output it is: a file has a name, or other modules write it than those that print."""
    if not error.filename and _raised_by(error).split(".")[0] in _PRINTING:
        _discard_stdout()
        return OutputError(
            f"cannot write to the standard output: {error.strerror}",
            hint="free some space, or send the output elsewhere",
        )
    where = f" {os.fsdecode(error.filename)}" if isinstance(error.filename, str | bytes) else ""
    return OutputError(
        f"cannot read or write{where}: {error.strerror}",
        hint="free some space"
        if error.errno in _FULL_DISKS
        else "check the disk, or the network that leads to it, and start again",
    )


def _raised_by(error: BaseException) -> str:
    """The module in which an error arose; `cli` for those of this package."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    name = str(frame.f_globals.get("__name__"))
    return name.removeprefix("tightfit.") if name.startswith("tightfit.cli.") else name


@contextmanager
def until_closed() -> Iterator[None]:
    """Print as long as somebody reads; what follows, such as an exit code, still counts."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        _discard_stdout()


def _discard_stdout() -> None:
    """Nothing that is left in the buffer may fail again when the interpreter ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _StatusLine:
    """What takes a while, in one line on a terminal's stderr that goes away."""

    def __init__(self) -> None:
        self._shown = ""

    def __call__(self, text: str = "") -> None:
        """Take the place of what was said before; without a text, leave nothing."""
        if text == self._shown or not sys.stderr.isatty():
            return
        end = "" if text else "\r"
        print(f"\r{text:<{len(self._shown)}}", end=end, file=sys.stderr, flush=True)
        self._shown = text


status = _StatusLine()


def print_error(error: TightfitError) -> None:
    """One line that says what happened, one that says what to do."""
    status()
    print(f"error: {one_line(error.message)}", file=sys.stderr)
    if error.hint:
        print(f"hint: {one_line(error.hint)}", file=sys.stderr)


def one_line(text: str) -> str:
    """Names come from files: no control character of theirs reaches the terminal."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def print_json(document: Any) -> None:
    """The one document of a `--json` run."""
    json.dump(document, sys.stdout, indent=1, allow_nan=False)
    print()


def warn(text: str) -> None:
    """Something that the user should know and that stops nothing."""
    status()
    print(f"warning: {one_line(text)}", file=sys.stderr)


def note(text: str) -> None:
    """Something that was done beside the data."""
    status()
    print(one_line(text), file=sys.stderr)


def console(*, stderr: bool = False, record: bool = False) -> "Console":
    """A rich console; piped output is as wide as a page, whatever the terminal is."""
    from rich.console import Console

    class Page(Console):
        """rich would end the process with 1, which is a verdict of ours."""

        def on_broken_pipe(self) -> None:
            raise BrokenPipeError

    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() or "COLUMNS" in os.environ else 100
    return Page(stderr=stderr, record=record, width=width, highlight=False)


class NoProgress:
    """Progress for pipes, logs and `--quiet`: nothing."""

    def phase(self, name: str, total_bytes: int) -> None:
        """Ignore."""

    def advance(self, nbytes: int) -> None:
        """Ignore."""


class BarProgress(NoProgress):
    """A bar per phase, with bytes per second and the time left."""

    def __init__(self, bars: "RichProgress") -> None:
        self._bars = bars
        self._task: TaskID | None = None

    def phase(self, name: str, total_bytes: int) -> None:
        """Begin a new bar."""
        self._task = self._bars.add_task(name, total=total_bytes)

    def advance(self, nbytes: int) -> None:
        """Move the bar."""
        if self._task is not None:
            self._bars.advance(self._task, nbytes)


@contextmanager
def progress(*, quiet: bool) -> Iterator[NoProgress]:
    """Bars on stderr if that is a terminal."""
    if quiet or not sys.stderr.isatty():
        yield NoProgress()
        return
    from rich import progress as bars

    with bars.Progress(
        bars.TextColumn("{task.description:>10}"),
        bars.BarColumn(),
        bars.DownloadColumn(binary_units=True),
        bars.TransferSpeedColumn(),
        bars.TimeRemainingColumn(),
        console=console(stderr=True),
        transient=True,
    ) as shown:
        yield BarProgress(shown)
