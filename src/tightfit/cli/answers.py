"""The answers of `plan`: on the screen, as data, for a CI job, as a report."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tightfit.cli.ci import Finding, Threshold, findings, github, junit, write_text
from tightfit.cli.output import console, note, print_json, until_closed
from tightfit.errors import ExitCode
from tightfit.planner.api import OpenedModel
from tightfit.planner.options import PlanOptions
from tightfit.planner.plan import SCHEMA, Plan

if TYPE_CHECKING:
    from tightfit.planner.fit import Fitted
    from tightfit.planner.sweep import Point
    from tightfit.planner.vllm_log import VLLMLog


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """Where results go, and what they are held to."""

    opened: OpenedModel
    form: str
    file: Path | None
    threshold: Threshold | None
    report: Path | None
    advised: bool = False
    log: "VLLMLog | None" = None

    def plan(self, plan: Plan, options: PlanOptions, fitted: "Fitted | None") -> ExitCode:
        """Print one plan; 0 or 1."""
        found = findings(plan, self.threshold, subject=plan.model.name)
        document = plan.to_json()
        if fitted is not None:
            document["fit"] = fitted.to_json()
        if self.threshold is not None:
            document["findings"] = [asdict(one) for one in found]
        if self.log is not None:
            from tightfit.cli.log_view import log_json

            document["log"] = log_json(plan, self.log)
        if self.form == "human":
            with until_closed():
                self._page(plan, found, fitted)
        else:
            self._data(document, found)
        if self.report is not None:
            from tightfit.cli.report import write_report
            from tightfit.planner.fit_map import map_plan

            grid = map_plan(self.opened.spec_of(options), options, plan)
            write_report([document], self.report, grid=None if grid is None else grid.to_json())
            note(f"wrote {self.report}")
        return _code(found)

    def _page(self, plan: Plan, found: Sequence[Finding], fitted: "Fitted | None") -> None:
        from tightfit.cli import render, tables

        page = console()
        if fitted is not None:
            tables.render_fitted(fitted, page)
        render.render_plan(plan, page)
        render.render_findings(found[1:], page)
        if self.advised:
            tables.render_advice(plan, page)
        if self.log is not None:
            from tightfit.cli.log_view import render_log

            render_log(plan, self.log, page)

    def sweep(self, texts: Sequence[str], asked: Mapping[str, Any]) -> ExitCode:
        """Print a table of plans; 1 if none of them fits."""
        from tightfit.planner.sweep import read_axes, sweep

        result = sweep(read_axes(texts), asked, self.opened.plan)
        plans = [point.plan for point in result.points if point.plan is not None]
        if not plans:
            assert result.points[0].error is not None
            raise result.points[0].error
        found: list[Finding] = []
        for point in result.points:
            words = " ".join(f"{name}={value}" for name, value in point.options.items())
            subject = f"{self.opened.checkpoint.name} {words}"
            if point.plan is not None:
                found += findings(point.plan, self.threshold, subject=subject)
            elif point.error is not None:
                found.append(
                    Finding(subject=subject, check="fits", detail=point.error.message, failed=True)
                )
        if self.form == "human":
            from tightfit.cli.tables import render_sweep

            with until_closed():
                render_sweep(result, console())
        else:
            self._data(result.to_json(), found)
        if self.report is not None:
            self._report_sweep(result.points, self.report)
        good = any(plan.verdict.fits is not False for plan in plans)
        return ExitCode.OK if good else ExitCode.FINDING

    def _report_sweep(self, points: "Sequence[Point]", path: Path) -> None:
        from tightfit.cli.report import write_report
        from tightfit.planner.fit_map import map_plan

        documents, grids = [], []
        for point in points:
            if point.plan is not None and point.planned is not None:
                documents.append(point.plan.to_json())
                spec = self.opened.spec_of(point.planned)
                grid = map_plan(spec, point.planned, point.plan)
                grids.append(None if grid is None else grid.to_json())
        write_report(documents, path, grid=grids)
        note(f"wrote {path}")

    def _data(self, document: dict[str, Any], found: Sequence[Finding]) -> None:
        """Anything but the human view, to stdout or to a file."""
        if self.form == "json" and self.file is None:
            with until_closed():
                print_json(document)
            return
        if self.form == "json":
            text = json.dumps(document, indent=1, allow_nan=False) + "\n"
        else:
            text = junit(found) if self.form == "junit" else github(found)
        if self.file is not None:
            write_text(text, self.file)
            return
        with until_closed():
            print(text, end="")

    def command(self, plan: Plan, options: PlanOptions, model: str, kind: str) -> None:
        """Print what starts vLLM as planned."""
        from tightfit.planner.emit import emit

        with until_closed():
            print(emit(plan, model, kind, options=options), end="")  # type: ignore[arg-type]

    def explanation(self, plan: Plan, options: PlanOptions, name: str) -> None:
        """Print how components were computed, whatever the verdict is."""
        from tightfit.planner.assemble import engine
        from tightfit.planner.explain import explain, explanation_lines
        from tightfit.planner.quantized import as_written

        chosen = engine(options)
        spec = chosen.adapt(as_written(self.opened.spec_of(options), options), options)
        found = explain(plan, spec, chosen.parallel(options), name)
        if self.form == "json":
            print_json({"schema": SCHEMA, "explain": [one.to_json() for one in found]})
            return
        for line in explanation_lines(found):
            print(line)


def _code(found: Sequence[Finding]) -> ExitCode:
    return ExitCode.FINDING if any(one.failed for one in found) else ExitCode.OK
