"""Coverage-guided fuzzing of what users type: commands of vLLM, values of options, axes of sweeps.

usage: PYTHONPATH=src:tests python tests/fuzz/harness_command.py CORPUS -max_total_time=300

Needs atheris; see `harness_config.py`.
"""

import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["tightfit"]):
    from fuzz.cases import at_most, check_message
    from tightfit.cli.arguments import like_vllm
    from tightfit.cli.ci import read_output, read_threshold
    from tightfit.errors import TightfitError
    from tightfit.planner.options import PlanOptions
    from tightfit.planner.spelling import plan_options
    from tightfit.planner.sweep import read_axes
    from tightfit.planner.vllm_command import parse_command
    from tightfit.planner.vllm_log.read import read_log

_LOG = Path(tempfile.mkdtemp()) / "vllm.log"
_NAMES = [name for name in PlanOptions.__annotations__ if name != "device"]


def one(data: bytes) -> None:
    """The first byte chooses the reader, the others are the text."""
    if not data:
        return
    choice, text = data[0], data[1:].decode("utf-8", "replace")
    with at_most(2.0), suppress(UnicodeError):
        try:
            if choice < 128:
                options = dict(parse_command(text).options)
                plan_options(options)
            elif choice < 150:
                _LOG.write_text(text)
                read_log(_LOG)
            elif choice < 165:
                read_axes([text])
            elif choice < 170:
                like_vllm(text.split("\0"))
            elif choice < 180:
                (read_threshold if choice & 1 else read_output)(text)
            else:
                plan_options({_NAMES[choice % len(_NAMES)]: text})
        except TightfitError as error:
            check_message(error, most=5 * len(text) + 1000)


if __name__ == "__main__":
    atheris.Setup(sys.argv, one)
    atheris.Fuzz()
