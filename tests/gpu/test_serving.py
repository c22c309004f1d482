"""What clients may do, done to an engine whose decodes are CUDA graphs."""

from collections.abc import Iterator

import pytest

from runtime.ranks import ON_GPU
from serve import test_clients
from support.serving import Live, serving, session_of
from tightfit.demo import tiny_checkpoint
from tightfit.runtime.ranks.world import World
from tightfit.runtime.session import Session

test_chat_whole_and_streamed = test_clients.test_chat_whole_and_streamed_say_the_same
test_64_clients_at_once = test_clients.test_64_clients_at_once
test_clients_that_leave_in_the_middle = test_clients.test_clients_that_leave_in_the_middle
test_clients_that_leave_while_they_wait = test_clients.test_clients_that_leave_while_they_wait
test_clients_that_leave_at_any_moment = test_clients.test_clients_that_leave_at_any_moment
test_clients_that_do_not_read = test_clients.test_clients_that_do_not_read
test_slow_readers_get_everything = test_clients.test_slow_readers_get_everything


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    world = World.from_environment("cuda")
    model = tiny_checkpoint(tmp_path_factory.mktemp("served") / "tiny")
    return session_of(model, world=world, **ON_GPU)


@pytest.fixture
def live(session: Session) -> Iterator[Live]:
    with serving(session) as one:
        yield one
