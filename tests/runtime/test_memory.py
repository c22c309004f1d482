"""Planned against measured, on a model that is large enough to be seen among a process's pages."""

import json
import mmap
import os
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from runtime.ranks import open_session
from tightfit.checkpoint.checkpoint import open_checkpoint
from tightfit.model.families import model_spec
from tightfit.model.layout import Parallel
from tightfit.model.parameters import parameters
from tightfit.planner.engines.builtin_memory import step_components
from tightfit.planner.kv_cache import kv_layout
from tightfit.planner.kv_kinds import CacheDtypes, layer_kinds
from tightfit.planner.weights import weights_component
from tightfit.runtime.attention import sdpa
from tightfit.runtime.loading.files import TensorFile
from tightfit.runtime.loading.pages import FilePages, advise, forget
from tightfit.runtime.memory.ledger import CpuLedger
from tightfit.runtime.ranks.launch import launch_ranks
from tightfit.units import MiB

TESTS = Path(__file__).parents[1]
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "vocab_size": 8000,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 6,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 96,
    "max_position_embeddings": 1024,
}
SIZES = {
    "max_model_len": 512,
    "max_num_seqs": 16,
    "max_num_batched_tokens": 512,
    "block_size": 16,
}
NUM_BLOCKS = 1200
# The C heap keeps the smaller tensors of a step for later ones, so it may hold more than they need.
HEAP_BYTES = 8 * MiB
PROGRAM = f"""
import json, sys
from dataclasses import asdict
from tightfit.checkpoint.checkpoint import open_checkpoint
from tightfit.model.families import model_spec
from tightfit.runtime.ranks.world import World
from tightfit.runtime.options import EngineOptions, SamplingParams
from tightfit.runtime.session import run_rank
world = World.from_environment()
checkpoint = open_checkpoint(sys.argv[1])
report = run_rank(
    checkpoint,
    model_spec(checkpoint.config),
    EngineOptions(dtype=sys.argv[2], num_blocks={NUM_BLOCKS}, **json.loads(sys.argv[4])),
    world=world,
    prompts=[[1, 2, 3], [4] * 300],
    sampling=SamplingParams(max_tokens=5),
    load_format="dummy",
)
if report:
    open(sys.argv[3], "w").write(json.dumps(asdict(report)))
world.close()
"""


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_two_ranks_use_what_was_planned(dtype: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    out = tmp_path / "report.json"
    command = [sys.executable, "-c", PROGRAM, str(tmp_path), dtype, str(out), json.dumps(SIZES)]
    assert launch_ranks(command, 2, environment={"OMP_NUM_THREADS": "1"}) == 0
    spec = replace(model_spec(CONFIG), dtype=dtype)
    for rank, measured in zip(
        Parallel(tensor_parallel_size=2, uneven=True).ranks(),
        json.loads(out.read_text())["ranks"],
        strict=True,
    ):
        got = measured["components"]
        plan = {
            component.name: component.planned_bytes
            for component in step_components(spec, rank, dtype=dtype, **SIZES)
        }
        plan["weights"] = sum(w.rank_tensor(rank, dtype).nbytes for w in parameters(spec))
        kinds = layer_kinds(spec, rank, CacheDtypes.of(dtype), windows=False)
        layout = kv_layout(kinds, block_size=SIZES["block_size"])
        plan["kv_cache"] = NUM_BLOCKS * layout.bytes_per_block
        assert measured["weights_tensor_bytes"] == plan["weights"]
        assert measured["kv_cache_tensor_bytes"] == plan["kv_cache"]
        assert got["weights"] == pytest.approx(plan["weights"], rel=0.01)
        assert got["kv_cache"] == pytest.approx(plan["kv_cache"], rel=0.01)
        for name in ("activations", "logits_and_sampler", "persistent_buffers"):
            assert got[name] == pytest.approx(plan[name], abs=HEAP_BYTES), name
        # The baseline is calibrated for one version of torch, so the measured one stands in.
        plan["process_baseline"] = got["process_baseline"]
        assert measured["resident_bytes"] == pytest.approx(sum(plan.values()), rel=0.05)


_HEADS = {**CONFIG, "num_hidden_layers": 3, "num_attention_heads": 12, "head_dim": 64}
_EXPERTS = {"num_experts_per_tok": 2, "n_routed_experts": 8, "moe_intermediate_size": 384}
OTHERS: dict[str, dict[str, Any]] = {
    "gpt_oss": {
        **_HEADS,
        "architectures": ["GptOssForCausalLM"],
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "intermediate_size": 768,
        "sliding_window": 128,
    },
    "deepseek_v3": {
        **_HEADS,
        **_EXPERTS,
        "architectures": ["DeepseekV3ForCausalLM"],
        "q_lora_rank": 384,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "first_k_dense_replace": 1,
        "n_group": 2,
        "topk_group": 1,
    },
    "glm4_moe": {**_HEADS, **_EXPERTS, "architectures": ["Glm4MoeForCausalLM"]},
    "gpt_neox": {**_HEADS, "architectures": ["GPTNeoXForCausalLM"]},
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_layers_need_no_more_than_was_planned(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(OTHERS[name]))
    out = tmp_path / "report.json"
    sizes = {**SIZES, "max_num_batched_tokens": 2048}
    command = [sys.executable, "-c", PROGRAM, str(tmp_path), "BF16", str(out), json.dumps(sizes)]
    subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)
    (measured,) = json.loads(out.read_text())["ranks"]
    got = measured["components"]
    plan = components(tmp_path, **sizes)
    spec, rank = model_spec(OTHERS[name]), Parallel(uneven=True).ranks()[0]
    assert measured["weights_tensor_bytes"] == weights_component(spec, rank, "BF16").planned_bytes
    kinds = layer_kinds(spec, rank, CacheDtypes.of("BF16"), windows=False)
    block = kv_layout(kinds, block_size=SIZES["block_size"]).bytes_per_block
    assert measured["kv_cache_tensor_bytes"] == NUM_BLOCKS * block
    assert got["activations"] - HEAP_BYTES < plan["activations"] < 1.6 * got["activations"]
    for component in ("logits_and_sampler", "persistent_buffers"):
        assert got[component] == pytest.approx(plan[component], abs=HEAP_BYTES), component


def test_the_ledger_sees_what_stays_and_what_passes() -> None:
    ledger = CpuLedger()
    with ledger.phase("the first use of torch"):
        torch.zeros(MiB, dtype=torch.uint8).add_(1)
    with ledger.phase("one"):
        kept = torch.zeros(64 * MiB, dtype=torch.uint8)
        torch.zeros(192 * MiB, dtype=torch.uint8).add_(1)
    with ledger.phase("two"):
        del kept
    one, two = ledger.readings["one"], ledger.readings["two"]
    assert one.kept_bytes == pytest.approx(64 * MiB, abs=4 * MiB)
    assert one.transient_bytes == pytest.approx(256 * MiB, abs=4 * MiB)
    assert two.kept_bytes == pytest.approx(-64 * MiB, abs=4 * MiB)


def test_pages_of_libraries_belong_to_no_phase(tmp_path: Path) -> None:
    library, weights = tmp_path / "lib.so", tmp_path / "model.safetensors"
    for path in (library, weights):
        path.write_bytes(os.urandom(32 * MiB))
    ledger = CpuLedger()
    with ledger.phase("reading code"):
        code = np.memmap(library, mode="r")
        int(code.sum())
    with ledger.phase("using weights"):
        used = np.memmap(weights, mode="r")
        int(used.sum())
    with ledger.phase("dropping code"):
        code._mmap.madvise(mmap.MADV_DONTNEED)
    reading, using, dropping = ledger.readings.values()
    assert reading.kept_bytes == pytest.approx(0, abs=4 * MiB)
    assert reading.transient_bytes == pytest.approx(0, abs=4 * MiB)
    assert using.kept_bytes == pytest.approx(32 * MiB, abs=4 * MiB)
    assert dropping.kept_bytes == pytest.approx(0, abs=MiB)


def test_weights_count_although_the_kernel_drops_them(tmp_path: Path) -> None:
    path, ledger = tmp_path / "model.safetensors", CpuLedger()
    save_file({"used": torch.ones(32 * MiB), "other": torch.ones(8 * MiB)}, path)
    file = TensorFile(path)
    used = file.tensors["used"]
    kept = used.offset, used.offset + used.nbytes
    with ledger.phase("weights"):
        file.populate(*kept)
        file.drop_all_but([kept])
        dropped_by_the_kernel(file.view(used))
    dropped_by_the_kernel(file.view(used))
    with ledger.phase("a step"):
        assert file.view(used).sum() == 32 * MiB
    dropped_by_the_kernel(file.view(used))
    with ledger.phase("giving them back"):
        forget(file.view(used)[: 16 * MiB])
    weights, step, giving = ledger.readings.values()
    assert weights.kept_bytes == pytest.approx(128 * MiB, abs=4 * MiB)
    assert step.kept_bytes == pytest.approx(0, abs=4 * MiB)
    assert step.transient_bytes == pytest.approx(0, abs=4 * MiB)
    assert giving.kept_bytes == pytest.approx(-64 * MiB, abs=4 * MiB)


def dropped_by_the_kernel(tensor: Tensor) -> None:
    """As it does with pages that were not used for a while."""
    start = tensor.data_ptr() + -tensor.data_ptr() % mmap.PAGESIZE
    stop = tensor.data_ptr() + tensor.nbytes
    assert advise(start, stop - stop % mmap.PAGESIZE, mmap.MADV_DONTNEED)


def test_ranges_of_pages() -> None:
    rng, pages, marked = random.Random(1), FilePages(), set[int]()
    for _ in range(2000):
        start = rng.randrange(200)
        stop = start + rng.randint(1, 40)
        if rng.random() < 0.5:
            pages.keep(start, stop)
            marked.update(range(start, stop))
        else:
            pages.leave(start, stop)
            marked.difference_update(range(start, stop))
        ranges = pages.ranges
        assert ranges == sorted(ranges)
        assert [at for low, high in ranges for at in range(low, high)] == sorted(marked)


def components(path: Path, **changes: Any) -> dict[str, int]:
    spec = model_spec(open_checkpoint(str(path)).config)
    values = {**SIZES, "dtype": "BF16", **changes}
    found = step_components(spec, Parallel().ranks()[0], **values)
    return {component.name: component.planned_bytes for component in found}


def test_more_of_an_option_never_needs_less(tiny_model: Callable[[str], Path]) -> None:
    for name in ("llama", "gemma2", "mixtral", "olmo2"):
        path = tiny_model(name)
        base = components(path)
        for option in ("max_model_len", "max_num_seqs", "max_num_batched_tokens"):
            more = components(path, **{option: 4 * SIZES[option]})
            assert sum(more.values()) >= sum(base.values()), (name, option)


def test_a_tokenizer_counts(tiny_model: Callable[[str], Path]) -> None:
    path = tiny_model("llama")
    plain = components(path)["process_baseline"]
    assert components(path, tokenizer_json_bytes=MiB)["process_baseline"] > plain


def test_formulas_need_no_torch() -> None:
    program = (
        "import sys, tightfit.planner.engines.builtin_memory, tightfit.runtime.options\n"
        "assert not {'torch', 'numpy', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_groups_of_decodes_are_gathered_in_turn(
    tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    gathered: list[StorageWeakRef] = []
    alive: list[int] = []
    gather = sdpa._gather

    def watched(*arguments: Any) -> Tensor:
        alive.append(sum(not storage.expired() for storage in gathered))
        found = gather(*arguments)
        gathered.append(StorageWeakRef(found.untyped_storage()))
        return found

    monkeypatch.setattr(sdpa, "_gather", watched)
    monkeypatch.setattr(sdpa, "GATHER_TOKENS", 1)
    open_session(tiny_model("llama"))
    # Every sequence is a group, whose keys are there when its values come.
    assert len(alive) > 8
    assert alive == [0, 1] * (len(alive) // 2)
