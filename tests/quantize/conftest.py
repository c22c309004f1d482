import subprocess
from pathlib import Path

import pytest

from support.cli import Call
from tightfit.cli.main import build


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """The command line in this process, which has torch already."""

    def called(*arguments: str | Path) -> "subprocess.CompletedProcess[str]":
        words = [str(one) for one in arguments]
        with pytest.raises(SystemExit) as end:
            build(words)(words)
        code = end.value.code
        out, err = capsys.readouterr()
        assert isinstance(code, int)
        return subprocess.CompletedProcess(words, code, out, err)

    return called
