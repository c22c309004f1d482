"""Whatever a config or an option says, there is a plan without nonsense, or one line of error.

`TIGHTFIT_FUZZ_CASES=10000` looks at so many new cases instead of the same few.
"""

import os
import resource
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from fuzz.cases import check, configs, option_sets, questions

CASES = int(os.environ.get("TIGHTFIT_FUZZ_CASES", "0"))
MOST_BYTES = 128 * 2**20
"""By which one case may raise the peak of the process."""

seen: Counter[str] = Counter()


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.fixture(scope="module", autouse=True)
def told() -> Iterator[None]:
    yield
    print(f"\n{seen.total()} cases: {dict(seen.most_common())}")


@settings(
    max_examples=CASES or 300,
    derandomize=not CASES,
    database=None,
    deadline=None,
    phases=(Phase.generate, Phase.shrink),
    suppress_health_check=list(HealthCheck),
)
@given(config=configs(), options=option_sets(), question=questions)
def test_any_config_and_options(config: Any, options: dict[str, Any], question: str) -> None:
    before = peak_bytes()
    seen[check(config, options, question)] += 1
    assert peak_bytes() - before < MOST_BYTES
