"""The load, what is measured of it, and the page."""

import json
import threading
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest

from support.cli import assert_error, tightfit
from support.serving import session_of
from tightfit.demo import tiny_checkpoint
from tightfit.errors import UsageError
from tightfit.runtime.bench import Load, measure
from tightfit.runtime.options import EngineOptions
from tightfit.runtime.ranks.lockstep import Lockstep
from tightfit.runtime.session import Session

SMALL = Load(num_prompts=12, input_len=(5, 40), output_len=(3, 20), seed=7)


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    return session_of(tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny"))


def test_a_load_is_the_same_for_the_same_seed() -> None:
    requests = Load(num_prompts=2000, input_len=(5, 8), output_len=(3, 4), seed=1).requests(50)
    again = Load(num_prompts=2000, input_len=(5, 8), output_len=(3, 4), seed=1).requests(50)
    assert requests == again
    assert {len(one.prompt_ids) for one in requests} == {5, 6, 7, 8}
    assert {one.output_len for one in requests} == {3, 4}
    assert {token for one in requests for token in one.prompt_ids} == set(range(50))
    assert all(one.arrival_seconds == 0 for one in requests)


def test_arrivals_have_the_rate_that_was_asked_for() -> None:
    requests = Load(num_prompts=4000, input_len=(1, 1), request_rate=20.0).requests(50)
    assert requests[-1].arrival_seconds == pytest.approx(200, rel=0.1)


def test_every_token_is_timed(session: Session) -> None:
    measured = measure(Lockstep(session.engine, session.world), SMALL, 259)
    requests = SMALL.requests(259)
    assert [len(times) for times in measured.tokens] == [one.output_len for one in requests]
    assert all(list(times) == sorted(times) for times in measured.tokens)
    found = measured.to_json(SMALL)
    tokens = sum(one.output_len for one in requests)
    assert found["output_tokens"] == tokens
    assert found["input_tokens"] == sum(len(one.prompt_ids) for one in requests)
    seconds = found["duration_seconds"]
    assert found["output_tokens_per_second"] == pytest.approx(tokens / seconds)
    assert found["inter_token_latency"]["count"] == tokens - 12
    assert found["step"]["count"] == len(measured.steps)
    width = seconds / len(found["timeline"])
    told = sum(one["output_tokens_per_second"] * width for one in found["timeline"])
    assert told == pytest.approx(tokens)
    first = found["time_to_first_token"]
    assert 0 < first["median_ms"] <= first["p90_ms"] <= first["p99_ms"] <= first["max_ms"]
    assert sum(first["histogram"]["counts"]) >= 11
    assert session.engine.pool_is_whole()


def test_concurrency_and_rate_hold_requests_back(session: Session) -> None:
    lockstep = Lockstep(session.engine, session.world)
    most = [0]
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            engine = session.engine
            most[0] = max(most[0], engine.num_running + engine.num_waiting)
            time.sleep(0.001)

    thread = threading.Thread(target=watch)
    load = Load(num_prompts=6, input_len=(5, 9), output_len=(4, 6), concurrency=2)
    measure(lockstep, load, 259)
    thread.start()
    from tightfit.runtime.bench import _work

    _work(lockstep, load.requests(259), 2)
    done.set()
    thread.join()
    assert 1 <= most[0] <= 2
    slow = Load(num_prompts=4, input_len=(5, 5), output_len=(2, 2), request_rate=20.0)
    measured = measure(lockstep, slow, 259)
    assert measured.sent == [one.arrival_seconds for one in slow.requests(259)]
    assert all(t[0] > sent for t, sent in zip(measured.tokens, measured.sent, strict=True))


def test_loads_that_are_too_long_are_refused() -> None:
    options = EngineOptions(
        dtype="F32", max_model_len=100, max_num_seqs=2, max_num_batched_tokens=64, num_blocks=8
    )
    with pytest.raises(UsageError, match="40 \\+ 61 tokens are longer"):
        Load(input_len=(1, 40), output_len=(1, 61)).check(options)
    Load(input_len=(1, 40), output_len=(1, 60)).check(options)


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    model, page = tiny_checkpoint(tmp_path / "tiny"), tmp_path / "bench.html"
    load = ("--num-prompts", "5", "--input-len", "8-20", "--output-len", "6")
    done = tightfit("run", model, "--bench", *load, "--json", "--report", page)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert (document["schema"], document["bench"]["output_tokens"]) == (1, 30)
    text = page.read_text("utf-8")
    HTMLParser().feed(text)
    assert "Time to first token" in text
    assert "tokens/s" in text
    done = tightfit("run", model, "--bench", *load)
    assert "output tokens per second" in done.stdout
    assert "time to first token" in done.stdout
    two = json.loads(tightfit("run", model, "-tp", "2", "--bench", *load, "--json").stdout)
    assert two["bench"]["output_tokens"] == 30
    for wrong, message in (
        (("--bench", "--check"), "--bench and --check exclude each other"),
        (("--num-prompts", "5"), "--num-prompts is an option of --bench"),
        (("--bench", "--input-len", "0"), "--input-len '0' is no length"),
        (("--bench", "--request-rate", "0"), "--request-rate 0.0 is out of range"),
    ):
        assert_error(tightfit("run", model, *wrong), 2, message)
