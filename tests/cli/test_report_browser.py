"""The page in a real headless Chromium: what it loads, how it behaves, whether it is readable."""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.qualities import quality, recipe
from support.reports import EVIL, Planned, planned, sweep_plans, with_advice, written
from tightfit.cli.report import browser, write_report
from tightfit.cli.report.browser import Chromium
from tightfit.cli.report.quality import write_quality_report
from tightfit.planner.devices import Device
from tightfit.quantize.sensitivity import weight_sensitivity
from tightfit.units import GiB

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(browser.find() is None, reason="no Chromium or Chrome was found"),
]

PLANS = ("one", "refused", "ranks", "sweep", "evil")
PAGES = (*PLANS, "quality", "evil quality")
WIDE = {"width": 1100, "height": 800}
PHONE = {"width": 360, "height": 740}


@pytest.fixture(scope="module")
def chrome() -> Iterator[Chromium]:
    with Chromium() as started:
        yield started


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The addresses of some pages."""
    root: Path = tmp_path_factory.mktemp("pages")
    document, fit = planned("gemma-2-9b", max_model_len=4096)
    one = (with_advice(document), fit)
    evil, _ = planned("Qwen2.5-0.5B", None)
    evil["model"]["name"] = EVIL
    plans: dict[str, list[Planned]] = {
        "one": [one],
        "refused": [planned("Llama-3.1-8B", Device(name="l4", total_bytes=22 * GiB))],
        "ranks": [unequal_ranks()],
        "sweep": sweep_plans(),
        "evil": [(evil, None)],
    }
    for name in PLANS:
        written(root / f"{name}.html", plans[name])
    for name, model in (("quality", "model"), ("evil quality", EVIL)):
        found = quality(layers=80, name=model)
        write_quality_report(
            root / f"{name}.html",
            found.to_json(),
            sensitivity=weight_sensitivity(found).to_json(),
            budget=recipe(model).to_json(),
        )
    return {name: (root / f"{name}.html").as_uri() for name in PAGES}


def unequal_ranks() -> Planned:
    """Sixteen ranks, no two of them alike."""
    document, fit = planned("Llama-3.1-405B", pipeline_parallel_size=16)
    for rank in document["ranks"]:
        rank["components"][0]["planned_bytes"] += rank["rank"] << 27
    return document, fit


def complaints(chrome: Chromium) -> list[dict[str, Any]]:
    """What the console has, exceptions and refused loads included."""
    kinds = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
    return [event for event in chrome.events if event["method"] in kinds]


@pytest.mark.parametrize("name", PAGES)
def test_quiet_and_alone(chrome: Chromium, pages: dict[str, str], name: str) -> None:
    chrome.view(**WIDE)
    chrome.open(pages[name])
    chrome.evaluate("document.querySelectorAll('button').forEach(b => b.click())")
    chrome.evaluate("new Promise(done => setTimeout(done, 50))")
    requests = [e for e in chrome.events if e["method"] == "Network.requestWillBeSent"]
    assert [e["params"]["request"]["url"] for e in requests] == [pages[name]]
    assert complaints(chrome) == []
    assert "pwned" not in (chrome.evaluate("document.title") or "")[:5]


def test_policy_stops_what_should_not_be_there(chrome: Chromium, pages: dict[str, str]) -> None:
    chrome.open(pages["one"])
    chrome.evaluate(
        "(() => { const s = document.createElement('script'); s.textContent = 'window.ran = 1';"
        "document.body.append(s); const i = document.createElement('img');"
        "i.src = 'https://example.org/x.png'; document.body.append(i) })()"
    )
    chrome.evaluate("new Promise(done => setTimeout(done, 50))")
    assert chrome.evaluate("window.ran") is None
    assert len(complaints(chrome)) == 2


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_theme(chrome: Chromium, pages: dict[str, str], dark: bool) -> None:
    chrome.view(**WIDE, dark=dark)
    chrome.open(pages["one"])

    def state() -> tuple[bool, str]:
        return (
            chrome.evaluate("getComputedStyle(document.body).backgroundColor") != WHITE,
            chrome.evaluate("document.getElementById('theme').getAttribute('aria-pressed')"),
        )

    assert state() == (dark, str(dark).lower())
    chrome.evaluate("document.getElementById('theme').click()")
    assert state() == (not dark, str(not dark).lower())
    chrome.evaluate("document.getElementById('theme').click()")
    assert state() == (dark, str(dark).lower())


WHITE = "rgb(255, 255, 255)"


def test_keyboard(chrome: Chromium, pages: dict[str, str]) -> None:
    chrome.view(**WIDE)
    chrome.open(pages["one"])

    def focused() -> str:
        return str(chrome.evaluate("document.activeElement.textContent.trim()"))

    chrome.press("Tab", 9)
    assert focused() == "Skip to the page"
    assert chrome.evaluate("document.activeElement.getBoundingClientRect().top") >= 0
    chrome.press("Enter", 13, "\r")
    assert chrome.evaluate("document.activeElement.id") == "main"
    chrome.press("Tab", 9)
    assert focused().startswith("All ")
    outline = "getComputedStyle(document.activeElement).outlineStyle"
    assert chrome.evaluate(outline) == "solid"
    chrome.press("Enter", 13, "\r")
    assert chrome.evaluate("document.activeElement.parentElement.open")
    chrome.press("Tab", 9)
    assert focused().startswith("weights")
    chrome.press(" ", 32, " ")
    assert chrome.evaluate("document.activeElement.parentElement.open")
    formula = "document.activeElement.nextElementSibling.checkVisibility()"
    assert chrome.evaluate(formula)


def test_unfold_and_copy(chrome: Chromium, pages: dict[str, str]) -> None:
    chrome.open(pages["one"])
    closed = "document.querySelectorAll('details:not([open])').length"
    assert chrome.evaluate(closed) > 5
    chrome.evaluate("document.getElementById('unfold').click()")
    assert chrome.evaluate(closed) == 0
    chrome.evaluate("document.getElementById('unfold').click()")
    assert chrome.evaluate("document.querySelectorAll('details[open]').length") == 0
    chrome.evaluate("document.querySelector('button.copy').click()")
    chrome.evaluate("new Promise(done => setTimeout(done, 50))")
    assert chrome.evaluate("document.getElementById('status').textContent") in (
        "Copied",
        "Selected",
    )


def test_link_opens_a_point(chrome: Chromium, pages: dict[str, str]) -> None:
    chrome.open(pages["sweep"])
    assert not chrome.evaluate("document.getElementById('point-2').open")
    chrome.evaluate("document.querySelector('a[href=\"#point-2\"]').click()")
    chrome.evaluate("new Promise(done => setTimeout(done, 50))")
    assert chrome.evaluate("document.getElementById('point-2').open")


TOO_WIDE = """[...document.querySelectorAll('body *')]
  .filter(e => !e.closest('.unseen, .defs, .skip, thead') && e.getClientRects().length)
  .filter(e => e.getBoundingClientRect().right > innerWidth + 0.5)
  .map(e => e.tagName + ' ' + e.textContent.slice(0, 40))"""


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("width", [320, 360, 620, 800, 1600])
def test_fits_the_screen(chrome: Chromium, pages: dict[str, str], name: str, width: int) -> None:
    chrome.view(width=width, height=740)
    chrome.open(pages[name])
    chrome.evaluate("document.querySelectorAll('details').forEach(d => (d.open = true))")
    assert chrome.evaluate("document.documentElement.scrollWidth") == width
    assert chrome.evaluate(TOO_WIDE) == []
    shown = (
        "[...document.querySelector('.charts').children].filter(c => c.checkVisibility()).length"
    )
    assert chrome.evaluate(shown) == 1


COLLIDING = """[...document.querySelectorAll('svg.chart')].filter(s => s.checkVisibility())
  .flatMap(svg => {
    const texts = [...svg.querySelectorAll('text')].map(t => [t, t.getBBox()]);
    const hit = (a, b) => a.x < b.x + b.width && b.x < a.x + a.width
      && a.y + 3 < b.y + b.height - 3 && b.y + 3 < a.y + a.height - 3;
    return texts.flatMap(([t, a], i) => texts.slice(i + 1).filter(([, b]) => hit(a, b))
      .map(([u]) => t.textContent + ' | ' + u.textContent));
  })"""

SMALL_TEXT = """[...document.querySelectorAll('svg.chart')].filter(s => s.checkVisibility())
  .filter(s => s.getBoundingClientRect().width / s.viewBox.baseVal.width < 0.85).length"""


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("width", [360, 700, 1100])
def test_labels_of_charts(chrome: Chromium, pages: dict[str, str], name: str, width: int) -> None:
    chrome.view(width=width, height=740)
    chrome.open(pages[name])
    assert chrome.evaluate(COLLIDING) == []
    assert chrome.evaluate(SMALL_TEXT) == 0


LOW_CONTRAST = """(() => {
  const rgba = text => {
    const n = text.match(/[\\d.]+/g).map(Number);
    const scale = text.startsWith('color') ? 1 : 255;
    return [n[0] / scale, n[1] / scale, n[2] / scale, n[3] ?? 1];
  };
  const light = ([r, g, b]) => [0.2126, 0.7152, 0.0722].reduce((sum, w, i) => {
    const c = [r, g, b][i];
    return sum + w * (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  }, 0);
  const behind = e => {
    for (; e; e = e.parentElement) {
      const color = rgba(getComputedStyle(e).backgroundColor);
      if (color[3] > 0.99) return color;
    }
    return [1, 1, 1, 1];
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const found = new Set();
  for (let node; (node = walker.nextNode()); ) {
    const e = node.parentElement;
    if (!node.data.trim() || e.closest('svg, script, .skip') || !e.checkVisibility()) continue;
    const [x, y] = [light(rgba(getComputedStyle(e).color)), light(behind(e))].sort((a, b) => a - b);
    if ((y + 0.05) / (x + 0.05) < 4.5) found.add(node.data.trim());
  }
  return [...found];
})()"""


@pytest.mark.parametrize("name", ["one", "refused", "sweep"])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_text_has_contrast(chrome: Chromium, pages: dict[str, str], name: str, dark: bool) -> None:
    chrome.view(**WIDE, dark=dark)
    chrome.open(pages[name])
    chrome.evaluate("document.querySelectorAll('details').forEach(d => (d.open = true))")
    assert chrome.evaluate(LOW_CONTRAST) == []


def test_print_unfolds(chrome: Chromium, pages: dict[str, str]) -> None:
    formula = (
        "[...document.querySelectorAll('.components details p')]"
        ".every(p => p.checkVisibility() && p.offsetHeight > 0)"
    )
    chrome.view(**WIDE, dark=True)
    chrome.open(pages["one"])
    assert not chrome.evaluate(formula)
    chrome.view(**WIDE, dark=True, media="print")
    assert chrome.evaluate(formula)
    assert chrome.evaluate("getComputedStyle(document.body).backgroundColor") == WHITE
    buttons = "[...document.querySelectorAll('button')].some(b => b.checkVisibility())"
    assert not chrome.evaluate(buttons)
    chrome.view(**WIDE)
    chrome.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert chrome.evaluate("document.querySelectorAll('details:not([open])').length") == 0
    chrome.evaluate("dispatchEvent(new Event('afterprint'))")
    assert chrome.evaluate("document.querySelectorAll('details[open]').length") == 0


def test_reduced_motion(chrome: Chromium, pages: dict[str, str]) -> None:
    chrome.open(pages["one"])
    duration = "getComputedStyle(document.querySelector('.seg')).transitionDuration"
    assert chrome.evaluate(duration) != "0s"
    feature = {"name": "prefers-reduced-motion", "value": "reduce"}
    chrome.call("Emulation.setEmulatedMedia", features=[feature])
    assert chrome.evaluate(duration) == "0s"


def test_names_for_those_who_listen(chrome: Chromium, pages: dict[str, str]) -> None:
    chrome.open(pages["one"])
    nodes = chrome.call("Accessibility.getFullAXTree")["nodes"]
    named = {
        (node["role"]["value"], node.get("name", {}).get("value", ""))
        for node in nodes
        if not node.get("ignored")
    }
    roles = {role for role, _ in named}
    assert {"main", "navigation", "heading", "table", "columnheader", "rowheader"} <= roles
    assert not [role for role, name in named if role in ("button", "link", "image") and not name]
    images = [name for role, name in named if role == "image"]
    assert any("weights" in name and "budget" in name for name in images)


def test_png_is_the_page(tmp_path: Path) -> None:
    document, fit = planned("Qwen2.5-0.5B")
    path = tmp_path / "plan.png"
    write_report([document], path, grid=None if fit is None else fit.to_json())
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", content[16:24])
    assert width == 2080
    assert height > 2000
