from collections.abc import Iterator

import pytest

from support.serving import Live, serving, session_of
from tightfit.demo import tiny_checkpoint
from tightfit.runtime.session import Session


@pytest.fixture(scope="session")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    return session_of(tiny_checkpoint(tmp_path_factory.mktemp("served") / "tiny"))


@pytest.fixture
def live(session: Session) -> Iterator[Live]:
    """A server; after each test its pool must be whole."""
    with serving(session) as one:
        yield one
