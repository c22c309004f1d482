"""`--report`: the plan as one page to look at, as a picture, or as a screenshot of the page.

The drawing is our own, some hundred lines of SVG, because a chart library embedded whole weighs
between ten and a hundred times as much as the page and brings nothing that stacked bars need.
"""

import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tightfit.errors import OutputError, UsageError

SUFFIXES = (".html", ".svg", ".png")


def write_report(
    documents: Sequence[Mapping[str, Any]],
    path: Path,
    *,
    grid: Mapping[str, Any] | Sequence[Mapping[str, Any] | None] | None = None,
) -> None:
    """Write `.html`, `.svg` or `.png`, whole or not at all.

    Args:
        documents: of `plan --json`, schema 1; several are the points of a sweep.
        path: of the file; what is there is replaced.
        grid: `FitMap.to_json()` of the plan, or one (or None) for each of several documents.
            Without it the page has no map of what fits.

    Raises:
        UsageError: another suffix.
        OutputError: the file cannot be written, or a `.png` has no browser to draw it.
    """
    check_suffix(path)
    assert documents
    grids = _grids(grid, len(documents))
    if path.suffix.lower() == ".svg":
        from tightfit.cli.report.picture import picture

        write_file(path, picture(documents).encode())
        return
    from tightfit.cli.report.page import page

    text = page(documents, grids).encode()
    if path.suffix.lower() == ".html":
        write_file(path, text)
        return
    from tightfit.cli.report.browser import screenshot

    write_file(path, screenshot(text))


def check_suffix(path: Path) -> None:
    """Refuse a file that cannot be written, before anything is planned.

    Raises:
        UsageError: another suffix than .html, .svg and .png.
        OutputError: there is no such directory.
    """
    if not os.path.isdir(path.parent):
        raise OutputError(
            f"cannot write {path}: there is no directory {path.parent}", hint="create it first"
        )
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(
            f"--report {path}: cannot write {path.suffix or 'a file without suffix'}",
            hint="use .html, .svg or .png",
        )


def _grids(
    grid: Mapping[str, Any] | Sequence[Mapping[str, Any] | None] | None, count: int
) -> list[Mapping[str, Any] | None]:
    if grid is None:
        return [None] * count
    grids: list[Mapping[str, Any] | None]
    grids = [grid] if isinstance(grid, Mapping) else list(grid)
    assert len(grids) == count
    return grids


def write_file(path: Path, content: bytes) -> None:
    """Write a file under another name first, so that no half of a report looks whole.

    Raises:
        OutputError: it cannot be written.
    """
    partial = None
    try:
        handle, partial = tempfile.mkstemp(suffix=".partial", prefix=path.name, dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(partial, 0o666 & ~umask)
        os.replace(partial, path)
    except OSError as error:
        if partial is not None:
            with suppress(OSError):
                os.unlink(partial)
        raise OutputError(
            f"cannot write {path}: {error.strerror}", hint="check the directory, and its space"
        ) from error
