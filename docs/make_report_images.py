"""Makes the images of docs/images, which docs/report.md and the README show.

Needs a Chromium on the PATH: python docs/make_report_images.py
"""

from dataclasses import replace
from pathlib import Path

from tightfit.cli.report import write_report
from tightfit.cli.report.browser import Chromium
from tightfit.planner.advice import advise
from tightfit.planner.api import open_model
from tightfit.planner.devices import device
from tightfit.planner.fit_map import map_plan
from tightfit.planner.options import PlanOptions

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "tests" / "data" / "configs"
IMAGES = ROOT / "docs" / "images"


def plans(model: str, gpu: str, points: list[dict[str, int]]) -> tuple[list, list]:
    """The documents of some plans, with advice, and their maps."""
    opened = open_model(str(CONFIGS / f"{model}.json"))
    documents, grids = [], []
    for point in points:
        options = PlanOptions(device=device(gpu, None), **point)
        plan = opened.plan(options)
        if len(points) == 1:
            plan = replace(plan, advice=advise(plan, options, opened.plan))
        fit = map_plan(opened.spec, options, plan)
        documents.append(plan.to_json())
        grids.append(None if fit is None else fit.to_json())
    return documents, grids


def main() -> None:
    """Write the pictures of one plan and of one sweep."""
    one = plans("Llama-3.1-8B", "h100-80gb", [{"max_model_len": 32_768}])
    sizes = [
        {"tensor_parallel_size": size, "max_model_len": length}
        for size in (1, 2, 4)
        for length in (8192, 131_072)
    ]
    sweep = plans("Llama-3.1-70B", "h100-80gb", sizes)
    write_report(one[0], IMAGES / "plan.svg")
    pages = {"plan": one, "sweep": sweep}
    shots = (
        ("plan", "report", 1040, 2200, False),
        ("plan", "report-dark", 1040, 1040, True),
        ("plan", "report-phone", 360, 1400, False),
        ("sweep", "report-sweep", 1040, 1460, False),
    )
    with Chromium() as browser:
        for page, name, width, height, dark in shots:
            file = IMAGES / f"{page}.html"
            documents, grids = pages[page]
            write_report(documents, file, grid=grids)
            browser.view(width=width, height=height, dark=dark)
            browser.open(file.as_uri())
            (IMAGES / f"{name}.png").write_bytes(browser.picture(whole=False))
            file.unlink()


if __name__ == "__main__":
    main()
