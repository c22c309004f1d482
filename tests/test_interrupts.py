"""Ctrl-C at a bad moment."""

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from tightfit.interrupts import uninterrupted


@pytest.fixture(autouse=True)
def _usual_handler() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_waits_for_the_end() -> None:
    before, done = signal.getsignal(signal.SIGINT), False
    with pytest.raises(KeyboardInterrupt), uninterrupted():  # noqa: PT012
        os.kill(os.getpid(), signal.SIGINT)
        # A signal is seen between two instructions.
        for _ in range(1000):
            pass
        done = True
    assert done
    assert signal.getsignal(signal.SIGINT) is before


def test_other_threads_are_not_concerned() -> None:
    done = threading.Event()

    def work() -> None:
        with uninterrupted():
            done.set()

    threading.Thread(target=work).start()
    assert done.wait(10)
