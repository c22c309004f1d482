"""The page: template, style sheet and script put around the sections of one or several plans."""

import base64
import hashlib
from collections.abc import Sequence
from importlib import resources

from tightfit.cli.report import figures, sections, sweep
from tightfit.cli.report.figures import Document
from tightfit.cli.report.fit_table import Grid, fit_section
from tightfit.cli.report.markup import Markup, element, join
from tightfit.cli.report.palette import page_variables
from tightfit.cli.report.parts import sentence


def page(documents: Sequence[Document], grids: Sequence[Grid | None]) -> str:
    """The whole HTML document."""
    if len(documents) == 1:
        title = figures.subject(documents[0])
        body = plan(documents[0], grids[0])
    else:
        names, found = sweep.points(documents, grids)
        title = ", ".join(sweep.subject(found))
        body = join([sweep.headline(found), sweep.overview(found, names), sweep.capacity(found)])
        body = join([body, *(point(number, one) for number, one in enumerate(found))])
    return assemble("plan", join(title), body, str(documents[0]["tightfit"]))


def assemble(command: str, title: str, body: Markup, version: str) -> str:
    """The whole HTML document of a command of ours; the title is escaped already."""
    script = _file("script.js")
    parts = {
        "title": title,
        "command": command,
        "policy": policy(script),
        "style": _file("style.css") + page_variables(),
        "script": script,
        "body": body,
        "version": join(version),
    }
    text = _file("template.html")
    # One pass: what a name brings along is never looked at again.
    pieces = text.split("@@")
    return "".join(parts[p] if i % 2 else p for i, p in enumerate(pieces))


def plan(document: Document, grid: Grid | None) -> Markup:
    """The sections of the only plan."""
    return join([sections.headline(document), *_details(document, grid)])


def point(number: int, one: sweep.Point) -> Markup:
    """The sections of one plan of a sweep, folded."""
    word, class_ = figures.verdict_word(one.document)
    reason = sentence(one.document["verdict"]["reason"])
    summary = element("summary", one.label, ": ", element("span", word, class_=class_))
    return element(
        "details",
        summary,
        element("p", reason, class_="reason"),
        *_details(one.document, one.grid),
        class_="fold point",
        id=f"point-{number}",
    )


def _details(document: Document, grid: Grid | None) -> list[Markup | None]:
    return [
        sections.facts(document),
        sections.options(document),
        sections.memory(document),
        sections.advice(document),
        fit_section(document, grid),
        sections.kv_cache(document),
        sections.host(document),
        sections.notes(document),
    ]


def policy(script: str) -> str:
    """The Content-Security-Policy: nothing is loaded, and only our own script runs."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        "default-src 'none'; style-src 'unsafe-inline'; img-src data:; "
        f"script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )


def _file(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text("utf-8")
