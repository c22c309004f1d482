"""What can go wrong for a user, as exceptions that carry the remedy and the exit code.

Every error that a user can cause is a `TightfitError`: one sentence that says what happened, with
the offending name and value, and a hint that says what to do next. The command line prints both and
exits with `exit_code`; a traceback always means a bug in tightfit. `assert` is for invariants only.
"""

from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of every command; scripts depend on them."""

    OK = 0
    """Done; or the plan fits."""
    FINDING = 1
    """The plan does not fit, a verification failed, or a rank died."""
    INPUT = 2
    """Wrong usage or wrong input."""
    UNSUPPORTED = 3
    """The model cannot be modelled."""
    MISMATCH = 4
    """Planned and measured memory differ by more than the tolerance."""
    INTERRUPTED = 130
    """Stopped by the user."""


class TightfitError(Exception):
    """Base of all errors that are shown to the user as one line and a hint."""

    exit_code = ExitCode.INPUT

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(TightfitError):
    """Options that contradict each other or have impossible values."""


class ConfigError(TightfitError):
    """A `config.json` that is missing, is not JSON, or lacks or contradicts a needed key."""


class CheckpointError(TightfitError):
    """Weights that are missing, truncated, corrupt, or unlike what the config promises."""


class LayoutError(TightfitError):
    """A parallel layout that this model cannot be cut into."""


class OutputError(TightfitError):
    """An output that cannot be written: exists already, no space, no permission."""


class MissingExtraError(TightfitError):
    """A command needs packages that the base installation does not bring."""

    def __init__(self, command: str, extra: str, package: str) -> None:
        super().__init__(
            f"`tightfit {command}` needs the package {package!r}, which is not installed",
            hint=f"pip install 'tightfit[{extra}]'",
        )


class UnsupportedModelError(TightfitError):
    """An architecture, or a feature of one, that tightfit does not model; it never guesses."""

    exit_code = ExitCode.UNSUPPORTED


class UnknownArchitectureError(UnsupportedModelError):
    """Nothing at all is known of an architecture but its name."""


class VerificationError(TightfitError):
    """Files that are not what their manifest or their source says."""

    exit_code = ExitCode.FINDING


class DoesNotFitError(TightfitError):
    """What was asked for makes sense only of a plan that fits."""

    exit_code = ExitCode.FINDING


class RankFailedError(TightfitError):
    """A rank of a running job died or could not start."""

    exit_code = ExitCode.FINDING


class DeviceError(TightfitError):
    """A device that ran out of memory, is not free, or cannot execute what it is to execute."""

    exit_code = ExitCode.FINDING


class TaskLostError(TightfitError):
    """A task of a cluster whose workers died, again and again."""

    exit_code = ExitCode.FINDING
