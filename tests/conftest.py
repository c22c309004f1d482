import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

from support.tiny_models import make_tiny_model

# The suite shares few cores with its own subprocesses, and its matrices are tiny.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A job in the background ignores interrupts, and so would every subprocess that a test interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples every time; HYPOTHESIS_PROFILE=default looks for new ones.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

TinyModel = Callable[[str], Path]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """Makes the tiny checkpoint of a name the first time it is asked for; nobody writes to it."""
    root = tmp_path_factory.mktemp("tiny")
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = make_tiny_model(name, root / name)
        return made[name]

    return make
