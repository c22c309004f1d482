"""Whatever a config or an option says, there is a plan without nonsense, or one line of error.

`TIGHTFIT_FUZZ_CASES=10000` looks at so many new cases instead of the same few.
"""

import os
import resource
from collections import Counter
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, Verbosity, given, settings

from fuzz.cases import check, configs, option_sets, questions

CASES = int(os.environ.get("TIGHTFIT_FUZZ_CASES", "0"))
MOST_MEMORY = 256 * 2**20
"""Bytes by which all cases together may grow the process."""

seen: Counter[str] = Counter()


@pytest.fixture(scope="module", autouse=True)
def bounded_memory() -> Any:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(f"\n{seen.total()} cases, {grown // 1024} MiB more memory: {dict(seen.most_common())}")
    assert grown * 1024 < MOST_MEMORY


@settings(
    max_examples=CASES or 300,
    derandomize=not CASES,
    database=None,
    deadline=None,
    phases=(Phase.generate, Phase.shrink),
    suppress_health_check=list(HealthCheck),
    verbosity=Verbosity.normal,
    report_multiple_bugs=True,
    print_blob=False,
)
@given(config=configs(), options=option_sets(), question=questions)
def test_any_config_and_options(config: Any, options: dict[str, Any], question: str) -> None:
    seen[check(config, options, question)] += 1
