"""Plans for machines that gate deployments: a threshold, JUnit XML, annotations of GitHub."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tightfit.cli.output import one_line
from tightfit.errors import OutputError, UsageError
from tightfit.planner.headroom import spare_bytes
from tightfit.planner.plan import Plan
from tightfit.units import format_bytes, parse_bytes

FORMATS = ("human", "json", "junit", "github")


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was checked: what, and what is wrong with it if anything."""

    subject: str
    check: str
    detail: str
    failed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Threshold:
    """The least headroom: a share of the device, or bytes."""

    text: str
    share: float | None = None
    nbytes: int = 0

    def least_bytes(self, plan: Plan) -> int:
        """In bytes on the device of this plan.

        Raises:
            UsageError: the plan has no device.
        """
        if plan.device is None:
            raise UsageError("--fail-under-headroom needs a device", hint="add --gpu h100-80gb")
        return self.nbytes if self.share is None else int(self.share * plan.device.total_bytes)


def read_threshold(text: str) -> Threshold:
    """Read `5%` or `2GiB`.

    Raises:
        UsageError: neither of them.
    """
    if not text.strip().endswith("%"):
        return Threshold(text=text, nbytes=parse_bytes(text))
    try:
        percent = float(text.strip()[:-1])
    except ValueError:
        percent = -1.0
    if not 0 <= percent < 100:
        raise UsageError(
            f"--fail-under-headroom {text} is not a share of the device", hint="such as 5%, or 2GiB"
        )
    return Threshold(text=text, share=percent / 100)


def findings(plan: Plan, threshold: Threshold | None, *, subject: str) -> list[Finding]:
    """Whether the plan fits, and with how much to spare.

    Raises:
        UsageError: a threshold, and no device.
    """
    found = [
        Finding(
            subject=subject,
            check="fits",
            detail=plan.verdict.reason,
            failed=plan.verdict.fits is False,
        )
    ]
    if threshold is not None:
        least, spare = threshold.least_bytes(plan), spare_bytes(plan)
        failed = plan.verdict.fits is not True or spare < least
        length = plan.options.max_model_len.value
        words = f"{format_bytes(spare)} of KV cache" if spare >= 0 else "no KV cache"
        found.append(
            Finding(
                subject=subject,
                check=f"headroom of at least {threshold.text}",
                detail=f"{words} beyond one sequence of {length:,} tokens, "
                f"and {format_bytes(least)} are demanded",
                failed=failed,
            )
        )
    return found


def read_output(text: str) -> tuple[str, Path | None]:
    """Read `junit`, or `junit:plan.xml` to write a file.

    Raises:
        UsageError: no such format.
    """
    name, colon, path = text.partition(":")
    if name not in FORMATS or (colon and not path):
        raise UsageError(
            f"unknown --output {text!r}",
            hint=", ".join(FORMATS) + "; junit:plan.xml writes a file",
        )
    return name, Path(path) if path else None


def write_text(text: str, path: Path) -> None:
    """Write a file.

    Raises:
        OutputError: it cannot be written.
    """
    try:
        path.write_text(text, "utf-8")
    except OSError as error:
        raise OutputError(
            f"cannot write {path}: {error.strerror}", hint="check the directory, and its space"
        ) from error


def junit(found: Sequence[Finding]) -> str:
    """One test case per finding, in the XML that Jenkins and GitLab read."""
    from xml.etree import ElementTree

    failures = str(sum(one.failed for one in found))
    attributes = {"name": "tightfit plan", "tests": str(len(found)), "failures": failures}
    suite = ElementTree.Element("testsuite", {**attributes, "errors": "0", "time": "0"})
    for one in found:
        case = ElementTree.SubElement(
            suite,
            "testcase",
            {"classname": one_line(one.subject), "name": one.check, "time": "0"},
        )
        if one.failed:
            failure = ElementTree.SubElement(case, "failure", {"message": one_line(one.detail)})
            failure.text = one_line(one.detail)
        else:
            ElementTree.SubElement(case, "system-out").text = one_line(one.detail)
    suites = ElementTree.Element("testsuites", attributes)
    suites.append(suite)
    ElementTree.indent(suites)
    return ElementTree.tostring(suites, encoding="unicode", xml_declaration=True) + "\n"


def github(found: Sequence[Finding]) -> str:
    """Workflow commands of GitHub Actions, which shows them as annotations."""
    lines: list[str] = []
    for one in found:
        level = "error" if one.failed else "notice"
        title = _escaped(f"tightfit plan: {one_line(one.check)}")
        text = one_line(f"{one.subject}: {one.detail}")
        title = title.replace(",", "%2C").replace(":", "%3A")
        lines.append(f"::{level} title={title}::{_escaped(text)}")
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
