"""Coverage-guided fuzzing of `config.json`: any bytes are a plan or one line of error.

usage: PYTHONPATH=src:tests python tests/fuzz/harness_config.py CORPUS -dict=... -max_total_time=300

Needs atheris, for which the tests' environment may be too old; the first folder named is the
corpus, to which new inputs are added. Configs of the tests are a good start.
"""

import json
import sys

import atheris

with atheris.instrument_imports(include=["tightfit"]):
    from fuzz.cases import check

from tightfit.checkpoint.files import MAX_CONFIG_BYTES


def one(data: bytes) -> None:
    """The first byte chooses layout and question, the others are the config."""
    if not data or len(data) > MAX_CONFIG_BYTES:
        return
    choice, text = data[0], data[1:]
    try:
        config = json.loads(text)
    except (ValueError, RecursionError):
        return
    if isinstance(config, dict):
        given = {
            "engine": "vllm" if choice & 1 else "builtin",
            "gpu": "h100-80gb" if choice & 2 else None,
            "tensor_parallel_size": 1 + (choice >> 2 & 3),
            "pipeline_parallel_size": 1 + (choice >> 4 & 1),
            "language_model_only": bool(choice & 64),
        }
        check(config, given, "explain" if choice & 128 else "plan")


if __name__ == "__main__":
    atheris.Setup(sys.argv, one)
    atheris.Fuzz()
