from pathlib import Path

import pytest

from tightfit.checkpoint.checkpoint import open_checkpoint
from tightfit.errors import TightfitError

BAD = Path(__file__).parents[1] / "data" / "bad"
CASES = sorted(p.name for p in BAD.iterdir() if p.is_dir())


@pytest.mark.parametrize("case", CASES)
def test_bad_input_gives_its_error(case):
    directory = BAD / case
    with pytest.raises(TightfitError) as e:
        open_checkpoint(str(directory)).tensors()
    message = f"{type(e.value).__name__}: {e.value}".replace(str(directory), "DIR")
    assert message == (directory / "expected.txt").read_text().rstrip("\n")
    assert e.value.hint


def test_there_are_cases():
    assert len(CASES) > 20
