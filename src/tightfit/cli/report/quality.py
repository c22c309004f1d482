"""The page of `quantize --report`: errors by layer and by matrix, scales, and what suffers most."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_quality_report(
    path: Path,
    quality: Mapping[str, Any],
    *,
    sensitivity: Mapping[str, Any] | None = None,
    budget: Mapping[str, Any] | None = None,
) -> None:
    """Write an `.html` page, whole or not at all.

    Args:
        path: of the file; what is there is replaced.
        quality: of `Quality.to_json()`.
        sensitivity: of `Sensitivity.to_json()`.
        budget: of `FittedRecipe.to_json()` of `fit_budget`.

    Raises:
        UsageError: another suffix.
        OutputError: the file cannot be written.
    """
    raise NotImplementedError
