import pytest

from support.configs import read_spec
from tightfit.planner.assemble import make_plan
from tightfit.planner.headroom import shortage_bytes, spare_bytes
from tightfit.planner.plan import Plan
from tightfit.planner.spelling import plan_options
from tightfit.units import GiB


def plan(**given: object) -> Plan:
    return make_plan(read_spec("Llama-3.1-8B"), plan_options(given), name="x")


def test_what_is_left_beyond_one_sequence() -> None:
    done = plan(gpu="h100", max_model_len=8192)
    kv = done.kv_cache
    assert kv.available_bytes is not None
    assert done.device is not None
    assert spare_bytes(done) == kv.available_bytes - kv.reserved_bytes > 0
    assert shortage_bytes(done) == -spare_bytes(done)


def test_a_shortage_is_what_is_missing() -> None:
    short = plan(gpu_memory="22GiB")
    assert short.verdict.fits is False
    lacking = shortage_bytes(short)
    held = short.ranks[0].budget_bytes
    assert held is not None
    share = (held + lacking + GiB // 100) / (22 * GiB * 4)
    enough = plan(gpu_memory="88GiB", gpu_memory_utilization=share, max_num_seqs=256,
                  max_num_batched_tokens=2048)  # fmt: skip
    assert enough.verdict.fits is True
    assert spare_bytes(enough) == pytest.approx(GiB / 100, abs=16 * 2**20)


def test_a_pool_of_a_given_size_is_judged_against_the_device() -> None:
    small = plan(gpu="h100", max_model_len=8192, kv_cache_memory_bytes="5GiB")
    rank = small.ranks[0]
    assert small.verdict.fits is True
    assert small.device is not None
    assert rank.headroom_bytes is not None
    assert rank.budget_bytes is not None
    assert 0.98 * small.device.total_bytes < rank.budget_bytes <= small.device.total_bytes
    assert spare_bytes(small) == 5 * GiB - small.kv_cache.reserved_bytes
    large = plan(gpu="h100", max_model_len=8192, kv_cache_memory_bytes="63GiB")
    assert large.verdict.fits is False
    assert shortage_bytes(large) == -(large.ranks[0].headroom_bytes or 0) > GiB


@pytest.mark.parametrize("pool", [None, "1GiB", "40GiB", "58GiB", "60GiB", "62GiB", "70GiB"])
@pytest.mark.parametrize("length", [8192, 131072])
def test_fitting_and_headroom_agree(pool: str | None, length: int) -> None:
    done = plan(gpu="h100", max_model_len=length, kv_cache_memory_bytes=pool)
    for rank in done.ranks:
        assert rank.headroom_bytes is not None
        assert done.verdict.fits is not True or rank.headroom_bytes >= 0


def test_without_a_device() -> None:
    done = plan(max_model_len=8192)
    assert -spare_bytes(done) == done.ranks[0].total_bytes
