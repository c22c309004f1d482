"""What all processes of a deployment take of their host."""

from dataclasses import replace
from typing import Any

import pytest

from support.configs import read_spec
from tightfit.model.layout import Parallel, Rank
from tightfit.planner.assemble import engine
from tightfit.planner.devices import CATALOGUE, Device
from tightfit.planner.engines.base import Deployed
from tightfit.planner.engines.vllm_host import PROCESS_BYTES, Processes
from tightfit.planner.host import host_components, needed_bytes
from tightfit.planner.options import PlanOptions
from tightfit.planner.plan import HOST_COMPONENTS, Component
from tightfit.planner.weights import checkpoint_bytes, offloadable, weights_component
from tightfit.units import GiB, MiB

LLAMA, QWEN_VL = "Llama-3.1-8B", "Qwen2.5-VL-7B-Instruct"


def host(name: str = LLAMA, *, strategy: str | None = None, **options: Any) -> dict[str, Component]:
    spec = read_spec(name)
    asked = PlanOptions(**{"device": CATALOGUE["h100-80gb"], "max_model_len": 8192, **options})
    chosen = engine(asked)
    parallel, resolved = chosen.parallel(asked), chosen.resolve(spec, asked)
    dtype = resolved.dtype.value
    ranks = parallel.ranks()
    limit = int(asked.cpu_offload_gb * GiB)
    found = host_components(
        spec,
        parallel,
        asked,
        resolved,
        Deployed(
            weights_by_rank=[weights_component(spec, rank, dtype).planned_bytes for rank in ranks],
            checkpoint_bytes=checkpoint_bytes(spec),
            offloaded_by_rank=[offloadable(spec, rank, dtype, limit) for rank in ranks],
            pool_bytes=3 * GiB,
            kv=chosen.kv_layout(spec, Rank(parallel=parallel), resolved),
        ),
        safetensors_load_strategy=strategy,
    )
    assert [one.name for one in found] == [
        name for name in HOST_COMPONENTS if name in {one.name for one in found}
    ]
    return {one.name: one for one in found}


def size(found: dict[str, Component], name: str) -> int:
    return found[name].planned_bytes if name in found else 0


def test_the_page_cache_holds_a_plain_checkpoint_once() -> None:
    """Each of four ranks cuts its share of the embedding, 128256 x 4096 x 2 / 4 bytes."""
    found = host(tensor_parallel_size=4)["loading_peak"]
    checkpoint = 16_060_522_496
    assert found.detail["page_cache_bytes"] == checkpoint
    assert found.detail["read_by_a_rank_bytes"] == checkpoint
    assert found.planned_bytes == checkpoint + 4 * (128256 // 4 * 4096 * 2)


def test_a_rank_reads_only_its_own_shard() -> None:
    found = host(tensor_parallel_size=4, load_format="sharded_state")["loading_peak"]
    assert found.detail["read_by_a_rank_bytes"] == 4_015_529_984
    assert found.planned_bytes == 4 * 4_015_529_984 == found.detail["page_cache_bytes"]


def test_experts_are_read_one_by_one() -> None:
    """The largest is then an embedding of 32000 x 4096 x 2 bytes; 8 experts are 1.75 GiB."""
    found = host("Mixtral-8x7B-v0.1")["loading_peak"]
    copied = found.planned_bytes - found.detail["page_cache_bytes"]
    assert copied == 32000 * 4096 * 2


def test_other_ways_to_load() -> None:
    assert "loading_peak" not in host(load_format="dummy")
    eager = host(strategy="eager")["loading_peak"]
    assert eager.planned_bytes == 3 * 16_060_522_496


def test_the_page_cache_is_not_needed() -> None:
    found = host()
    total = sum(one.planned_bytes for one in found.values())
    assert needed_bytes(tuple(found.values())) == total - 16_060_522_496


@pytest.mark.parametrize(
    ("options", "front", "cores", "workers", "others", "separate"),
    [
        ({}, 1, 1, 1, 0, False),
        ({"entrypoint": "llm"}, 1, 1, 1, 0, False),
        ({"tensor_parallel_size": 2}, 1, 1, 2, 0, True),
        ({"api_server_count": 4}, 4, 1, 1, 1, False),
        ({"data_parallel_size": 2, "tensor_parallel_size": 2}, 2, 2, 4, 2, True),
    ],
)
def test_processes(
    options: dict[str, Any], front: int, cores: int, workers: int, others: int, separate: bool
) -> None:
    asked = PlanOptions(**options)
    parallel = Parallel(
        tensor_parallel_size=asked.tensor_parallel_size,
        data_parallel_size=asked.data_parallel_size,
    )
    assert Processes.of(parallel, asked, cpu=False) == Processes(
        front=front, cores=cores, workers=workers, others=others, separate_workers=separate
    )
    assert Processes.of(parallel, asked, cpu=True).separate_workers


def test_every_process_has_a_baseline() -> None:
    one, four = size(host(), "process_baseline"), size(host(api_server_count=4), "process_baseline")
    assert four - one == 4 * PROCESS_BYTES
    assert 1.2 * GiB < one < 2.5 * GiB
    assert "H200" in host()["process_baseline"].formula
    two = size(host(tensor_parallel_size=2), "process_baseline")
    assert two - one > PROCESS_BYTES + 1.1 * GiB


@pytest.mark.parametrize(
    ("options", "copies"),
    [
        ({}, 1),
        ({"mm_processor_cache_type": "shm"}, 1),
        ({"api_server_count": 3}, 3),
        ({"data_parallel_size": 2}, 2),
        ({"data_parallel_size": 2, "api_server_count": 1}, 1),
        ({"mm_processor_cache_gb": 0.0}, 0),
        ({"language_model_only": True}, 0),
    ],
)
def test_the_cache_of_processed_media(options: dict[str, Any], copies: int) -> None:
    assert size(host(QWEN_VL, **options), "mm_processor_cache") == copies * 4 * GiB


def test_a_text_model_processes_no_media() -> None:
    assert "mm_processor_cache" not in host()
    assert size(host(QWEN_VL, mm_processor_cache_gb=0.5), "mm_processor_cache") == GiB // 2


def test_the_v2_runner_pins_the_tokens_of_all_requests() -> None:
    """4 x N x L bytes, and with images 12 x N x L for positions: 12 MiB take 16."""
    assert size(host(max_num_seqs=100, max_model_len=10000), "pinned_buffers") == 4 * MiB
    assert size(host(max_num_seqs=1024, max_model_len=131072), "pinned_buffers") == 512 * MiB
    twice = host(max_num_seqs=1024, max_model_len=131072, tensor_parallel_size=2)
    assert size(twice, "pinned_buffers") == GiB
    images = host(QWEN_VL, max_num_seqs=128, max_model_len=8192)
    assert size(images, "pinned_buffers") == 4 * MiB + 16 * MiB


def test_the_v1_runner_pins_its_inputs() -> None:
    """5 x 64 x 8192 unpinned, M x H x b, and a table of 64 x 512 blocks."""
    found = host(
        max_num_seqs=64,
        max_model_len=8192,
        max_num_batched_tokens=4096,
        use_v2_model_runner=False,
    )
    expected = 5 * 64 * 8192 + 4096 * 4096 * 2 + 4 * 64 * 512
    assert size(found, "pinned_buffers") == expected


def test_offloaded_weights_and_blocks() -> None:
    assert not {"cpu_offload", "kv_offload", "cpu_kv_cache"} & host().keys()
    found = host(cpu_offload_gb=2.0, kv_offloading_size=8.0, tensor_parallel_size=2)
    moved = size(found, "cpu_offload")
    assert 2 * 2 * GiB <= moved < 2 * 2.2 * GiB
    assert found["cpu_offload"].detail["most_bytes"] == 2 * moved
    assert size(found, "kv_offload") == 8 * GiB
    everything = size(host(cpu_offload_gb=1000.0), "cpu_offload")
    assert 13 * GiB < everything < 15 * GiB


def test_the_host_of_the_cpu_backend_holds_all() -> None:
    cpu = Device(name="cpu", total_bytes=64 * GiB, kind="cpu")
    found = host(device=cpu, tensor_parallel_size=2, cpu_offload_gb=2.0)
    assert size(found, "cpu_kv_cache") == 2 * 3 * GiB
    assert not {"pinned_buffers", "cpu_offload", "kv_offload"} & found.keys()
    loading = found["loading_peak"]
    anonymous = loading.planned_bytes - loading.detail["page_cache_bytes"]
    assert anonymous > 2 * 8_030_000_000


def test_replicas_are_on_the_same_host() -> None:
    one, two = (
        host(load_format="sharded_state"),
        host(load_format="sharded_state", data_parallel_size=2),
    )
    assert size(two, "loading_peak") == size(one, "loading_peak")
    assert size(two, "pinned_buffers") == 2 * size(one, "pinned_buffers")


def test_nothing_depends_on_a_device() -> None:
    spec, asked = read_spec(LLAMA), PlanOptions()
    chosen = engine(asked)
    resolved = replace(chosen.resolve(spec, asked), model_runner=None)
    deployed = Deployed(weights_by_rank=[GiB], checkpoint_bytes=GiB)
    found = host_components(spec, Parallel(), asked, resolved, deployed)
    assert [one.name for one in found] == ["loading_peak", "process_baseline", "pinned_buffers"]
