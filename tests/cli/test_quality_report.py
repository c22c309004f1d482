"""What `quantize` shows of errors: the page, and the terminal."""

import base64
import hashlib
import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from support.pages import Outline
from support.qualities import quality, recipe
from support.reports import EVIL
from tightfit.cli.quality_view import render_budget, render_quality, render_sensitivity
from tightfit.cli.report.quality import check_suffix, write_quality_report
from tightfit.errors import OutputError, UsageError
from tightfit.quantize.quality import Quality
from tightfit.quantize.sensitivity import weight_sensitivity


def written(path: Path, this: Quality, **others: Any) -> str:
    write_quality_report(path, json.loads(json.dumps(this.to_json())), **others)
    return path.read_text("utf-8")


def test_page_is_self_contained(tmp_path: Path) -> None:
    page = written(tmp_path / "q.html", quality())
    outline = Outline(page)
    assert set(outline.references) <= {"data:,", "#main"}
    assert "@import" not in page
    assert "@@" not in page
    digest = base64.b64encode(hashlib.sha256(outline.script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in outline.policy
    assert outline.tags.count("script") == 1
    assert "tightfit quantize" in outline.text


def test_page_says_what_was_measured(tmp_path: Path) -> None:
    this, fitted = quality(), recipe()
    page = written(
        tmp_path / "q.html",
        this,
        sensitivity=weight_sensitivity(this).to_json(),
        budget=fitted.to_json(),
    )
    text = Outline(page).text
    for one in this.matrices:
        assert one.module in text
        assert f"{one.figures.relative_error:.4f}" in text
        assert "17 (0.250)" in text
    for words in (
        *("w4a16 g64", "method rtn", "6,000 weights", "attention", "layer 2", "0.500%"),
        *("By kind of module", "Relative error by layer", "What suffers most", "The recipe"),
        *("200 MiB of a budget of 250 MiB", "150 MiB", "fp8-channel", "as it is"),
    ):
        assert words in text


def columns(page: str, fill: str) -> list[float]:
    wide = re.findall(r'<svg class="chart wide".*?</svg>', page, re.DOTALL)
    (drawing,) = (one for one in wide if f"f-{fill}" in one)
    return [
        float(height) for height in re.findall(r'<rect class="seg [^>]*height="([\d.]+)"', drawing)
    ]


def test_columns_are_to_scale(tmp_path: Path) -> None:
    this = quality(layers=5)
    page = written(tmp_path / "q.html", this)
    found = columns(page, "weights")
    expected = [one.relative_error for one in this.layers.values()]
    assert [height / found[-1] for height in found] == pytest.approx(
        [one / expected[-1] for one in expected], abs=0.01
    )
    # Sizes of which there are no scales have a place of their own.
    assert len(columns(page, "kv")) == 3
    assert columns(page, "kv")[1] < 1


def test_names_are_escaped(tmp_path: Path) -> None:
    this = quality(name=EVIL)
    fitted = recipe(EVIL)
    page = written(
        tmp_path / "q.html",
        this,
        sensitivity=weight_sensitivity(this).to_json(),
        budget=fitted.to_json(),
    )
    outline = Outline(page)
    assert outline.tags.count("script") == 1
    assert "img" not in outline.tags
    assert "<script>document.title" in outline.text


def test_a_checkpoint_without_errors_or_layers(tmp_path: Path) -> None:
    alone = quality(layers=1, error=0.0)
    assert "exact" in Outline(written(tmp_path / "q.html", alone)).text
    head = Quality(model="m", scheme="int8", method="rtn", matrices=())
    assert "Relative error by layer" not in Outline(written(tmp_path / "q.html", head)).text


def test_methods_that_change_weights_on_purpose(tmp_path: Path) -> None:
    awq = replace(quality(), method="awq")
    console = Console(file=io.StringIO(), width=300)
    render_quality(awq, console)
    for text in (
        Outline(written(tmp_path / "q.html", awq)).text,
        console.file.getvalue(),  # type: ignore[attr-defined]
    ):
        assert "differences from the original weights, and no errors" in text


def test_weight_of_the_page(tmp_path: Path) -> None:
    assert len(written(tmp_path / "q.html", quality(layers=32))) < 100_000
    assert len(written(tmp_path / "q.html", quality(layers=5000))) < 4_000_000


def test_what_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot write \.svg"):
        check_suffix(tmp_path / "q.svg")
    with pytest.raises(OutputError, match="cannot write"):
        write_quality_report(tmp_path / "nowhere" / "q.html", quality().to_json())
    assert not list(tmp_path.iterdir())


def test_terminal_shows_the_same() -> None:
    this = quality(layers=40)
    console = Console(file=io.StringIO(), width=100)
    render_quality(this, console)
    render_sensitivity(weight_sensitivity(this), console)
    render_budget(recipe(), console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for words in (
        *("attention", "mlp", "0.4528", "m.layers.39.self_attn.q_proj", "17 (0.250)"),
        *("layer 39", "30 more", "200 MiB of a budget of 250 MiB", "fp8-channel", "as it is"),
    ):
        assert words in text, words
    assert max(map(len, text.splitlines())) <= 100


def test_terminal_gets_no_control_characters() -> None:
    console = Console(file=io.StringIO(), width=300)
    render_quality(quality(name="a\x1b[31mb[bold]"), console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "\x1b" not in text
    assert "a\\x1b[31mb[bold].layers" in text
