"""What a user says about calibration."""

from dataclasses import dataclass
from pathlib import Path

from tightfit.errors import UsageError
from tightfit.quantize.recipe_file import SHORTEST_SAMPLE


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationOptions:
    """The text, and how much of it.

    `texts` are .txt files, or .jsonl files whose lines have a `text`. Of them `samples` windows of
    `length` tokens are drawn by `seed`.

    Raises:
        UsageError: there is no text, or a number is out of range.
    """

    texts: tuple[Path, ...]
    samples: int = 128
    length: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.texts:
            raise UsageError(
                "calibration needs text, and none was given",
                hint="give a .txt or .jsonl file that is like what the model will read",
            )
        if self.samples < 1 or self.length < SHORTEST_SAMPLE:
            raise UsageError(
                f"{self.samples} calibration samples of {self.length} tokens",
                hint=f"at least 1 sample of {SHORTEST_SAMPLE} tokens",
            )
