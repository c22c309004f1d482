"""Planned against measured, on a model that is large enough to be seen among a process's pages."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tightfit.checkpoint.checkpoint import open_checkpoint
from tightfit.model.families import model_spec
from tightfit.model.layout import Parallel
from tightfit.model.parameters import parameters
from tightfit.planner.engines.builtin_memory import step_components
from tightfit.planner.kv_cache import CacheDtypes, kv_layout, layer_kinds
from tightfit.runtime.launch import launch_ranks
from tightfit.runtime.memory import CpuLedger
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
PROGRAM = f"""
import json, sys
from dataclasses import asdict
from tightfit.checkpoint.checkpoint import open_checkpoint
from tightfit.model.families import model_spec
from tightfit.runtime.dist import World
from tightfit.runtime.options import EngineOptions, SamplingParams
from tightfit.runtime.session import run_rank
world = World.from_environment()
checkpoint = open_checkpoint(sys.argv[1])
report = run_rank(
    checkpoint,
    model_spec(checkpoint.config),
    EngineOptions(dtype=sys.argv[2], num_blocks={NUM_BLOCKS}, **{SIZES}),
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
    command = [sys.executable, "-c", PROGRAM, str(tmp_path), dtype, str(out)]
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
            for component in step_components(spec, rank, dtype=dtype, device="cpu", **SIZES)
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
            assert got[name] == pytest.approx(plan[name], abs=8 * MiB), name
        # The baseline is calibrated for one version of torch, so the measured one stands in.
        plan["process_baseline"] = got["process_baseline"]
        assert measured["resident_bytes"] == pytest.approx(sum(plan.values()), rel=0.05)


def test_the_ledger_sees_what_stays_and_what_passes() -> None:
    ledger = CpuLedger()
    with ledger.phase("the first use of torch"):
        torch.zeros(MiB, dtype=torch.uint8).add_(1)
    with ledger.phase("one"):
        kept = torch.zeros(16 * MiB, dtype=torch.uint8)
        torch.zeros(48 * MiB, dtype=torch.uint8).add_(1)
    with ledger.phase("two"):
        del kept
    one, two = ledger.readings["one"], ledger.readings["two"]
    assert one.kept_bytes == pytest.approx(16 * MiB, abs=MiB)
    assert one.transient_bytes == pytest.approx(64 * MiB, abs=MiB)
    assert two.kept_bytes == pytest.approx(-16 * MiB, abs=MiB)


def components(path: Path, **changes: Any) -> dict[str, int]:
    spec = model_spec(open_checkpoint(str(path)).config)
    values = {**SIZES, "dtype": "BF16", "device": "cpu", **changes}
    found = step_components(spec, Parallel().ranks()[0], **values)
    return {component.name: component.planned_bytes for component in found}


def test_more_of_an_option_never_needs_less(tiny_model: Callable[[str], Path]) -> None:
    for name in ("llama", "gemma2", "mixtral", "olmo2"):
        path = tiny_model(name)
        base = components(path)
        for option in ("max_model_len", "max_num_seqs", "max_num_batched_tokens"):
            more = components(path, **{option: 4 * SIZES[option]})
            assert sum(more.values()) >= sum(base.values()), (name, option)


def test_only_a_cpu_counts_the_process_and_only_rank_zero_the_tokenizer(
    tiny_model: Callable[[str], Path],
) -> None:
    path = tiny_model("llama")
    assert "process_baseline" not in components(path, device="cuda")
    plain = components(path)["process_baseline"]
    assert components(path, tokenizer_json_bytes=MiB)["process_baseline"] > plain


def test_formulas_need_no_torch() -> None:
    program = (
        "import sys, tightfit.planner.engines.builtin_memory, tightfit.runtime.options\n"
        "assert not {'torch', 'numpy', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
