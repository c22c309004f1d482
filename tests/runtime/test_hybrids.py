"""Hybrids of attention and Mamba 2 against transformers: states, chunks, ranks, plans."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from runtime.ranks import PROMPTS, all_logits, greedy, open_session, options, run
from runtime.test_ranks import on_ranks
from tightfit.checkpoint.checkpoint import open_checkpoint
from tightfit.errors import UnsupportedModelError
from tightfit.model.families import model_spec
from tightfit.model.layout import Parallel, Rank
from tightfit.planner.api import plan_model
from tightfit.planner.devices import Device
from tightfit.planner.engines.builtin_models import unexecuted
from tightfit.planner.engines.builtin_states import CHUNK_TOKENS, state_bytes
from tightfit.planner.options import PlanOptions
from tightfit.runtime.batch import Span, make_batch
from tightfit.runtime.models.mamba import chunk_scan
from tightfit.units import GiB

Tokens = Callable[[Path], list[list[int]]]

_COMMON: dict[str, Any] = {
    "vocab_size": 259,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
_MAMBA: dict[str, Any] = {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "mamba_n_groups": 1,
}
_RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "granite": (
        "GraniteMoeHybridConfig",
        {
            **_MAMBA,
            "num_hidden_layers": 4,
            "layer_types": ["mamba", "mamba", "attention", "mamba"],
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "intermediate_size": 32,
            "shared_intermediate_size": 64,
            "position_embedding_type": None,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.2,
            "logits_scaling": 2.0,
        },
    ),
    "granite_dense": (
        "GraniteMoeHybridConfig",
        {
            **_MAMBA,
            "num_hidden_layers": 3,
            "layer_types": ["mamba", "attention", "mamba"],
            "num_local_experts": 0,
            "shared_intermediate_size": 96,
            "position_embedding_type": "rope",
            "mamba_n_groups": 2,
            "mamba_proj_bias": True,
            "tie_word_embeddings": True,
        },
    ),
    "bamba": (
        "BambaConfig",
        {
            **_MAMBA,
            "num_hidden_layers": 3,
            "attn_layer_indices": [1],
            "intermediate_size": 96,
            "mamba_n_groups": 4,
        },
    ),
}
NAMES = tuple(_RECIPES)


@pytest.fixture(scope="session")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Makes the checkpoint of a name the first time it is asked for."""
    root = tmp_path_factory.mktemp("hybrids")

    def make(name: str) -> Path:
        import transformers

        path = root / name
        if not path.exists():
            torch.manual_seed(11)
            kind, changes = _RECIPES[name]
            config = getattr(transformers, kind)(**(_COMMON | changes))
            model = transformers.AutoModelForCausalLM.from_config(config)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn(parameter.shape) * 0.05)
            model.save_pretrained(path)
        return path

    return make


@pytest.mark.parametrize("name", NAMES)
def test_float32_logits_of_every_position(
    name: str, hybrid: Callable[[str], Path], reference: Callable[[Path], Any]
) -> None:
    path = hybrid(name)
    ids = [i * 7 % 250 + 3 for i in range(2 * CHUNK_TOKENS + 40)]
    session = open_session(path, max_model_len=512, max_num_batched_tokens=512, num_blocks=128)
    ours = all_logits(session, ids)
    with torch.no_grad():
        theirs = reference(path)(torch.tensor([ids])).logits[0]
    assert ours is not None
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_chunked_prefill_mixed_with_decode(
    name: str, hybrid: Callable[[str], Path], reference_tokens: Tokens
) -> None:
    path = hybrid(name)
    assert greedy(path) == reference_tokens(path)
    assert greedy(path, max_num_batched_tokens=5) == reference_tokens(path)


def test_preemption_changes_no_token(
    hybrid: Callable[[str], Path], reference_tokens: Tokens
) -> None:
    path = hybrid("granite")
    report = run(path, num_blocks=14, max_num_batched_tokens=16)
    assert report is not None
    assert report.num_preemptions > 0
    assert [c.token_ids for c in report.completions] == reference_tokens(path)


def test_rows_are_used_again_and_prefixes_are_not_shared(
    hybrid: Callable[[str], Path], reference_tokens: Tokens
) -> None:
    path = hybrid("bamba")
    assert greedy(path, max_num_seqs=2, enable_prefix_caching=True) == reference_tokens(path)
    session = open_session(path, enable_prefix_caching=True)
    assert not session.engine.worker.options.enable_prefix_caching


@pytest.mark.parametrize("name", NAMES)
def test_sixteen_bits_stay_close(
    name: str, hybrid: Callable[[str], Path], reference: Callable[[Path], Any]
) -> None:
    from transformers import AutoModelForCausalLM

    path, ids = hybrid(name), torch.tensor([PROMPTS[0]])
    ours = all_logits(open_session(path, dtype="BF16"), PROMPTS[0])
    with torch.no_grad():
        exact = reference(path)(ids).logits[0]
        rounded = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)(ids).logits[0]
    assert ours is not None
    assert (ours - exact).norm() < 1.3 * (rounded.float() - exact).norm() + 0.02 * exact.norm()


def test_two_ranks_give_what_one_gives(hybrid: Callable[[str], Path], tmp_path: Path) -> None:
    paths = [hybrid(name) for name in NAMES]
    results = on_ranks(2, paths, tmp_path)
    for path in paths:
        logits = load_file(results / f"{path.name}.safetensors")["logits"]
        alone = all_logits(open_session(path), PROMPTS[0])
        assert alone is not None
        torch.testing.assert_close(logits, alone, atol=1e-3, rtol=1e-4)
        assert json.loads((results / f"{path.name}.json").read_text()) == greedy(path)


def test_decodes_of_a_graph_without_sequences_disturb_nobody(
    hybrid: Callable[[str], Path],
) -> None:
    """A CUDA graph has places whose row is one behind the last: nothing else may change."""
    worker = open_session(hybrid("granite")).engine.worker
    assert worker.states is not None
    rows = [1, worker.options.max_num_seqs, worker.options.max_num_seqs]
    spans = [Span(start=5, count=1, blocks=[i, i + 1], row=row) for i, row in enumerate(rows)]
    batch = make_batch(spans, [9, 9, 9], [], block_size=4, device=torch.device("cpu"))
    before = {i: layer.ssm.clone() for i, layer in worker.states.layers.items()}
    worker.forward(batch)
    for i, layer in worker.states.layers.items():
        changed = (layer.ssm != before[i]).flatten(1).any(dim=1).nonzero().flatten().tolist()
        assert changed == [1, worker.options.max_num_seqs]


@pytest.mark.parametrize("name", NAMES)
def test_the_plan_counts_the_states(name: str, hybrid: Callable[[str], Path]) -> None:
    path = hybrid(name)
    device = Device(name="cpu", kind="cpu", total_bytes=8 * GiB)
    asked = PlanOptions(
        engine="builtin", device=device, dtype="float32", max_model_len=64, max_num_seqs=4
    )
    plan = plan_model(str(path), asked).plan
    planned = {component.name: component for component in plan.ranks[0].components}
    worker = open_session(path).engine.worker
    assert worker.states is not None
    states = sum(layer.conv.nbytes + layer.ssm.nbytes for layer in worker.states.layers.values())
    spec = model_spec(open_checkpoint(str(path)).config)
    assert 5 * state_bytes(spec, Rank(), "F32") == states
    assert planned["persistent_buffers"].planned_bytes >= states
    assert str(states // 5) in planned["persistent_buffers"].formula
    blocks = plan.kv_cache.num_blocks
    assert blocks is not None
    assert plan.kv_cache.block_size == 16
    block = worker.cache.nbytes // options().num_blocks // options().block_size * 16
    assert plan.kv_cache.bytes_per_block == block


def test_states_are_cut_by_heads(hybrid: Callable[[str], Path]) -> None:
    spec = model_spec(open_checkpoint(str(hybrid("bamba"))).config)
    two = Parallel(tensor_parallel_size=2).ranks()
    halves = [state_bytes(spec, rank, "F32") for rank in two]
    assert sum(halves) == state_bytes(spec, Rank(), "F32")


def test_what_is_not_executed(tiny_model: Callable[[str], Path]) -> None:
    for name, reason in (("mamba2", "without attention"), ("falcon_h1", "2 kinds")):
        with pytest.raises(UnsupportedModelError, match=reason):
            open_session(tiny_model(name))


def test_clamped_time_steps_are_refused(hybrid: Callable[[str], Path]) -> None:
    config = open_checkpoint(str(hybrid("bamba"))).config
    assert unexecuted(model_spec(config)) is None
    limited = model_spec({**config, "time_step_limit": [0.001, 0.1]})
    assert unexecuted(limited) == "time steps within the limits [0.001, 0.1]"


@pytest.mark.parametrize("tokens", [1, 3, CHUNK_TOKENS, CHUNK_TOKENS + 1, 3 * CHUNK_TOKENS + 5])
def test_a_scan_is_the_recurrence(tokens: int) -> None:
    generator = torch.Generator().manual_seed(tokens)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x, b, c = random(tokens, 2, 3, 4), random(tokens, 2, 5), random(tokens, 2, 5)
    dt, decay = random(tokens, 2, 3).abs(), -random(2, 3).abs()
    state = random(2, 3, 4, 5)
    expected, steps = state.clone(), []
    for i in range(tokens):
        kept = (dt[i] * decay).exp()[..., None, None]
        added = (dt[i, ..., None] * x[i])[..., None] * b[i, :, None, None]
        expected = kept * expected + added
        steps.append((expected * c[i, :, None, None]).sum(dim=-1))
    y = chunk_scan(x, dt, decay, b, c, state)
    torch.testing.assert_close(y, torch.stack(steps))
    torch.testing.assert_close(state, expected)
