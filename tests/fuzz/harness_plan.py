"""Coverage-guided fuzzing of plans, through the strategies that hypothesis uses.

usage: PYTHONPATH=src:tests python tests/fuzz/harness_plan.py CORPUS -max_total_time=300

Needs atheris and hypothesis; see `harness_config.py`.
"""

import sys
from typing import Any

import atheris

with atheris.instrument_imports(include=["tightfit"]):
    from fuzz.cases import check, configs, option_sets, questions

from hypothesis import HealthCheck, given, settings


@settings(database=None, deadline=None, suppress_health_check=list(HealthCheck))
@given(config=configs(), options=option_sets(), question=questions)
def one(config: Any, options: dict[str, Any], question: str) -> None:
    check(config, options, "explain" if question in ("advise", "fit") else question)


if __name__ == "__main__":
    atheris.Setup(sys.argv, one.hypothesis.fuzz_one_input)  # type: ignore[attr-defined]
    atheris.Fuzz()
