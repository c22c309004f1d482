import base64
import hashlib
import itertools
import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from support.pages import Outline
from support.reports import EVIL, H100, Planned, planned, sweep_plans, with_advice, written
from tightfit.cli.report import palette, write_report
from tightfit.errors import ExitCode, OutputError, UsageError
from tightfit.planner.devices import Device
from tightfit.planner.fit_map import map_lengths
from tightfit.units import GiB

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def llama() -> Planned:
    document, fit = planned("Llama-3.1-8B", max_model_len=32_768)
    return with_advice(document), fit


@pytest.fixture(scope="module")
def sweep() -> list[Planned]:
    return sweep_plans()


def test_page_is_self_contained(tmp_path: Path, llama: Planned) -> None:
    page = written(tmp_path / "plan.html", [llama])
    outline = Outline(page)
    assert set(outline.references) <= {"data:,", "#main"}
    assert set(re.findall(r"url\(([^)]*)\)", page)) == {"#hatch"}
    assert "@import" not in page
    digest = base64.b64encode(hashlib.sha256(outline.script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in outline.policy
    assert "default-src 'none'" in outline.policy
    assert outline.tags.count("script") == 1


def test_page_says_what_the_plan_says(tmp_path: Path, llama: Planned) -> None:
    document, _ = llama
    text = Outline(written(tmp_path / "plan.html", [llama])).text
    for component in document["ranks"][0]["components"]:
        assert component["name"] in text
        assert component["formula"] in text
    for name, option in document["options"].items():
        assert name in text
        assert option["origin"] in text
    for one in document["advice"]:
        assert one["change"] in text
        assert one["costs"] in text
    for words in (
        *("fits", "h100-80gb", "vllm 0.32.0", "8.03B parameters", "loading_peak"),
        *("Headroom", "Outside the budget", "The driver will show", "decides", "32,768 tokens"),
        *document["not_modelled"],
    ):
        assert words in text


def test_refusal_is_shown(tmp_path: Path) -> None:
    document, fit = planned("Llama-3.1-8B", Device(name="l4", total_bytes=22 * GiB))
    text = Outline(written(tmp_path / "plan.html", [(document, fit)])).text
    assert "does not fit" in text
    assert "Missing for one sequence" in text
    assert document["verdict"]["engine_message"] in text


def test_names_are_escaped(tmp_path: Path, llama: Planned) -> None:
    document, fit = json.loads(json.dumps(llama[0])), llama[1]
    document["model"]["name"] = document["device"]["name"] = EVIL
    document["ranks"][0]["components"][0]["formula"] = EVIL
    other = json.loads(json.dumps(document))
    other["model"]["name"] = EVIL * 2
    for plans in ([(document, fit)], [(document, fit), (other, fit)]):
        outline = Outline(written(tmp_path / "plan.html", plans))
        assert outline.tags.count("script") == 1
        assert "img" not in outline.tags
        assert "<script>document.title" in outline.text
        root = ET.fromstring(written(tmp_path / "plan.svg", plans))
        known = {"svg", "title", "style", "defs", "pattern", "rect", "g", "line", "text"}
        assert {element.tag.removeprefix(SVG) for element in root.iter()} <= known


def test_weight_of_the_page(tmp_path: Path, llama: Planned) -> None:
    assert len(written(tmp_path / "plan.html", [llama])) < 60_000
    ranks = planned("Llama-3.1-405B", pipeline_parallel_size=16)
    assert len(written(tmp_path / "plan.html", [ranks])) < 150_000


def test_alike_ranks_are_drawn_once(tmp_path: Path) -> None:
    plans = [planned("Llama-3.1-70B", tensor_parallel_size=4, pipeline_parallel_size=2)]
    texts = [e.text for e in ET.fromstring(written(tmp_path / "a.svg", plans)).iter(f"{SVG}text")]
    assert [t for t in texts if t and t.startswith("rank")] == ["ranks 0–3", "ranks 4–7"]


def test_svg_is_to_scale(tmp_path: Path, llama: Planned) -> None:
    root = ET.fromstring(written(tmp_path / "plan.svg", [llama]))
    assert root.tag == f"{SVG}svg"
    group = next(root.iter(f"{SVG}g"))
    widths = {
        rect.get("data-part"): float(rect.get("width", 0))
        for rect in group.iter(f"{SVG}rect")
        if (rect.get("class") or "").startswith("seg")
    }
    sizes = {c["name"]: c["planned_bytes"] for c in llama[0]["ranks"][0]["components"]}
    room = next(r for r in group.iter(f"{SVG}rect") if r.get("class") == "room")
    scale = float(room.get("width", 0)) / H100.total_bytes
    for name, width in widths.items():
        assert width == pytest.approx(max(sizes[name] * scale, 0.4), abs=0.01), name
    assert set(widths) == {name for name, size in sizes.items() if size}


def test_sweep_shows_every_point(tmp_path: Path, sweep: list[Planned]) -> None:
    text = Outline(written(tmp_path / "plan.html", sweep)).text
    fitting = sum(document["verdict"]["fits"] for document, _ in sweep)
    assert f"{fitting} of 6 fit" in text
    for tp, length in itertools.product((1, 2, 4), ("8K", "128K")):
        assert f"TP {tp}, context {length}" in text
    for document, _ in sweep:
        assert f"{document['kv_cache']['tokens']:,}" in text


@pytest.mark.parametrize("model", ["Llama-3.1-8B", "gemma-2-9b", "gemma-3-1b-it", "Olmo-3-7B"])
def test_map_agrees_with_plans(model: str) -> None:
    document, fit = planned(model)
    assert fit is not None
    for length, blocks, most in zip(
        fit.lengths, fit.blocks_per_sequence, fit.sequences, strict=True
    ):
        assert most == min(fit.pool_blocks // blocks, fit.max_num_seqs)
        other, _ = planned(model, max_model_len=length)
        reserved = other["kv_cache"]["one_sequence"]["reserved_bytes"]
        assert blocks * other["kv_cache"]["bytes_per_block"] == reserved
    asked = document["options"]["max_model_len"]["value"]
    at_once = fit.pool_blocks / fit.blocks_per_sequence[fit.lengths.index(asked)]
    assert at_once == pytest.approx(document["kv_cache"]["max_concurrency"], rel=1e-3)


def test_windows_bend_the_map() -> None:
    _, fit = planned("Olmo-3-7B", max_num_batched_tokens=512)
    assert fit is not None
    blocks = fit.blocks_per_sequence
    assert blocks[-1] / blocks[0] < 0.75 * fit.lengths[-1] / fit.lengths[0]


@pytest.mark.parametrize(
    ("asked", "limit", "expected"),
    [
        (131_072, 131_072, (1024, 2048, 4096, 8192, 16384, 32768, 65536, 131_072)),
        (40_000, 40_960, (1024, 2048, 4096, 8192, 16384, 32768, 40_000, 40_960)),
        (512, 512, (512,)),
        (2**20, 2**20, (8192, 16384, 32768, 65536, 131_072, 262_144, 524_288, 2**20)),
        (3000, 2048, (1024, 2048, 3000)),
    ],
)
def test_lengths_of_the_map(asked: int, limit: int, expected: tuple[int, ...]) -> None:
    assert map_lengths(asked, limit) == expected


def test_no_map_without_a_device_or_a_layout(tmp_path: Path) -> None:
    document, fit = planned("Qwen2.5-0.5B", None)
    assert fit is None
    page = written(tmp_path / "plan.html", [(document, None)])
    assert "It needs a device" in page
    assert 'class="fit"' not in page
    page = written(tmp_path / "plan.html", [(planned("Qwen2.5-0.5B")[0], None)])
    assert "which this document does not have" in page
    assert 'class="fit"' not in page


def test_what_cannot_be_written(tmp_path: Path, llama: Planned) -> None:
    with pytest.raises(UsageError, match=r"cannot write \.pdf") as usage:
        write_report([llama[0]], tmp_path / "plan.pdf")
    assert usage.value.hint == "use .html, .svg or .png"
    with pytest.raises(OutputError, match="cannot write"):
        write_report([llama[0]], tmp_path / "nowhere" / "plan.html")
    (tmp_path / "plan.html").mkdir()
    with pytest.raises(OutputError):
        write_report([llama[0]], tmp_path / "plan.html")
    assert [path.name for path in tmp_path.iterdir()] == ["plan.html"]


def test_png_without_a_browser(
    tmp_path: Path, llama: Planned, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(OutputError, match="no Chromium or Chrome was found") as error:
        write_report([llama[0]], tmp_path / "plan.png")
    assert error.value.exit_code == ExitCode.INPUT
    assert "apt install chromium" in (error.value.hint or "")
    assert not list(tmp_path.iterdir())


def test_png_with_a_broken_browser(
    tmp_path: Path, llama: Planned, monkeypatch: pytest.MonkeyPatch
) -> None:
    browser = tmp_path / "chromium"
    browser.write_text("#!/bin/sh\nexit 1\n")
    browser.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    with pytest.raises(OutputError, match="did not start"):
        write_report([llama[0]], tmp_path / "plan.png")


SIMULATED = {
    # Machado, Oliveira and Fernandes 2009, severity 1, over linear RGB.
    "normal": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "protanopia": (
        (0.152286, 1.052583, -0.204868),
        (0.114503, 0.786281, 0.099216),
        (-0.003882, -0.048116, 1.051998),
    ),
    "deuteranopia": (
        (0.367322, 0.860646, -0.227968),
        (0.280085, 0.672501, 0.047413),
        (-0.011820, 0.042940, 0.968881),
    ),
    "tritanopia": (
        (1.255528, -0.076749, -0.178779),
        (-0.078411, 0.930809, 0.147602),
        (0.004733, 0.691367, 0.303900),
    ),
}


def lab(color: str, seen: str) -> tuple[float, float, float]:
    """CIE L*a*b* of a colour as somebody sees it."""

    def linear(value: float) -> float:
        return value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4

    def root(t: float) -> float:
        return t ** (1 / 3) if t > 0.008856 else 7.787 * t + 16 / 116

    rgb = [linear(int(color[i : i + 2], 16) / 255) for i in (1, 3, 5)]
    r, g, b = (
        min(max(sum(m * c for m, c in zip(row, rgb, strict=True)), 0), 1) for row in SIMULATED[seen]
    )
    x = root((0.4124 * r + 0.3576 * g + 0.1805 * b) / 0.95047)
    y = root(0.2126 * r + 0.7152 * g + 0.0722 * b)
    z = root((0.0193 * r + 0.1192 * g + 0.9505 * b) / 1.08883)
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_colors_have_contrast(theme: int) -> None:
    paper = palette.PAPER[theme]
    for name, shade in palette.FILLS.items():
        assert palette.contrast(shade[theme], paper) >= 3, name
        assert palette.contrast(shade[theme], palette.ink_on(shade[theme])) >= 4.5, name
    for ink in (palette.INK, palette.MUTED, palette.GOOD, palette.BAD):
        assert palette.contrast(ink[theme], paper) >= 4.5


@pytest.mark.parametrize("seen", SIMULATED)
@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_kinds_are_told_apart(theme: int, seen: str) -> None:
    kinds = {n: lab(s[theme], seen) for n, s in palette.FILLS.items() if not n.endswith("-2")}
    for (a, first), (b, second) in itertools.combinations(kinds.items(), 2):
        assert sum((p - q) ** 2 for p, q in zip(first, second, strict=True)) ** 0.5 >= 10, (a, b)
