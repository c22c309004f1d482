import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from support.configs import read_spec
from tightfit.errors import UsageError
from tightfit.model.parallel import Parallel, Rank
from tightfit.planner.engines.builtin_paged import num_splits, workspace_elements, workspace_formula
from tightfit.runtime.attention import probe as attention_probe
from tightfit.runtime.attention.base import AttentionLayer, attention_layers
from tightfit.runtime.attention.other import TorchVarlen
from tightfit.runtime.attention.paged import New, Queries, workspace_of
from tightfit.runtime.attention.probe import CacheLayout, expected, probe
from tightfit.runtime.kernels.tiles import H100_SHARED_BYTES, decode_tile, prefill_tile

LAYER = AttentionLayer(heads=4, kv_heads=2, head_dim=16, value_dim=16, scale=0.25, window=50)
CACHE = CacheLayout(dtype=torch.bfloat16, block_size=16, latent=False, device=torch.device("cpu"))


@pytest.mark.slow
def test_attention_kernels_in_the_interpreter() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    cases = Path(__file__).with_name("interpreted_attention.py")
    # A process of its own: Triton looks at this when it is imported.
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--noconftest", cases],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_sequences_are_split_until_the_gpu_is_full() -> None:
    assert num_splits(1, 32, 8, 128, 32768) == 49
    assert num_splits(1, 8, 1, 128, 65536) == 128
    assert num_splits(256, 32, 8, 128, 32768) == 1
    assert num_splits(1, 32, 8, 128, 300) == 4
    assert num_splits(1, 32, 8, 128, 1) == 1
    assert num_splits(2, 128, 1, 576, 65536) == 66


def test_the_workspace_is_enough_for_any_number_of_sequences() -> None:
    enough = workspace_elements(256, 16, 8, 128, 128, 4096)
    for sequences in range(1, 257):
        for length in (100, 1000, 4096):
            splits = num_splits(sequences, 16, 8, 128, length)
            assert splits == 1 or splits * sequences * 16 * 129 <= enough
    assert workspace_elements(4, 16, 8, 128, 128, 100) == 0


@pytest.mark.parametrize("name", ["Qwen3-0.6B", "DeepSeek-V2-Lite", "gpt-oss-20b", "gpt2"])
def test_the_plan_knows_the_workspace(name: str) -> None:
    spec = read_spec(name)
    for size in (1, 2):
        rank = Rank(parallel=Parallel(tensor_parallel_size=size))
        planned, term = workspace_formula(spec, rank, 64, 8192)
        assert planned > 0
        assert planned == 4 * workspace_of(attention_layers(spec, rank, {}), 64, 8192)
        assert str(planned // 4) in term


@pytest.mark.parametrize("head_dim", [64, 80, 128, 256, 512, 576])
def test_tiles_fit_into_shared_memory(head_dim: int) -> None:
    latent = head_dim == 576
    for group, itemsize in ((1, 2), (8, 2), (128, 2), (8, 4)):
        for tile in (decode_tile(group, head_dim, itemsize), prefill_tile(head_dim, itemsize)):
            # Keys and values of all stages but the one that is computed.
            features = head_dim if latent else 2 * head_dim
            used = (tile.num_stages - 1) * tile.keys * features * itemsize
            assert used + tile.rows * head_dim * itemsize <= H100_SHARED_BYTES


@pytest.mark.parametrize("head_dim", [80, 128, 192, 256, 576])
@pytest.mark.parametrize("shared_bytes", [H100_SHARED_BYTES, 166912, 101376])
def test_tiles_of_prompts_fit_into_other_gpus(head_dim: int, shared_bytes: int) -> None:
    tile = prefill_tile(head_dim, 2, shared_bytes)
    features = head_dim if head_dim == 576 else 2 * head_dim
    # So Triton 3.6 says of what it compiles for capability 8.0 and 8.9.
    keys_and_values = (tile.num_stages - 1) * tile.keys * features
    queries, weights = tile.rows * head_dim, tile.rows * tile.keys
    assert 2 * (keys_and_values + queries + weights) <= shared_bytes


class Explicit:
    """A kernel that is right, unless `error` is added to what it finds."""

    stores = False

    def __init__(self, name: str, error: float = 0.0) -> None:
        self.name = name
        self.error = error

    def __call__(
        self,
        layer: AttentionLayer,
        out: Tensor,
        q: Tensor,
        new: New | None,
        cache: tuple[Tensor, Tensor | None],
        rows: Queries,
    ) -> None:
        if layer.softcap is not None:
            raise NotImplementedError("no softcap\nat all")
        keys, values = cache
        assert values is not None
        for i, length in enumerate(rows.lengths.tolist()):
            table = rows.block_table[i].long()
            k, v = (x[table].flatten(0, 1)[:length] for x in (keys, values))
            here = slice(*rows.query_starts[i : i + 2].tolist())
            if length:
                out[here] = (expected(layer, q[here], k, v) + self.error).to(q.dtype)


def families(monkeypatch: pytest.MonkeyPatch, *kernels: Explicit | TorchVarlen) -> None:
    def flash(device: torch.device) -> Iterator[Explicit | TorchVarlen]:
        yield from kernels

    def none(device: torch.device) -> Iterator[Explicit]:
        raise ImportError("it is not installed")

    monkeypatch.setattr(attention_probe, "FAMILIES", {"flash-attn": flash, "torch": none})


def test_a_kernel_is_taken_if_it_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    triton = Explicit("triton")
    families(monkeypatch, Explicit("flash 3", error=0.1), Explicit("flash 2"))
    found = probe(LAYER, CACHE, torch.bfloat16, triton, "auto")
    assert found.kernels.decode is triton
    assert found.kernels.prefill.name == found.kernels.fresh.name == "flash 2"
    assert list(found.refusals) == ["flash 3"]
    assert "wrong" in found.refusals["flash 3"]
    assert "prompts by flash 2" in found.report[0]


def test_a_refusal_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    families(monkeypatch, Explicit("flash 3"))
    triton = Explicit("triton")
    found = probe(replace(LAYER, softcap=30.0), CACHE, torch.bfloat16, triton, "auto")
    assert found.kernels.fresh is found.kernels.prefill is triton
    assert found.refusals["flash 3"] == "prefill: no softcap"


def test_a_backend_that_is_asked_for_must_do_something(monkeypatch: pytest.MonkeyPatch) -> None:
    triton = Explicit("triton")
    families(monkeypatch, Explicit("flash 3"))
    assert probe(LAYER, CACHE, torch.bfloat16, triton, "flash-attn").kernels.decode is not triton
    assert probe(LAYER, CACHE, torch.bfloat16, triton, "triton").kernels.fresh is triton
    with pytest.raises(UsageError, match="not installed"):
        probe(LAYER, CACHE, torch.bfloat16, triton, "torch")
    with pytest.raises(UsageError, match="float32"):
        probe(LAYER, replace(CACHE, dtype=torch.float32), torch.float32, triton, "flash-attn")
    with pytest.raises(UsageError, match="latent"):
        probe(LAYER, replace(CACHE, latent=True), torch.bfloat16, triton, "flash-attn")
    with pytest.raises(UsageError, match="xformers"):
        probe(LAYER, CACHE, torch.bfloat16, triton, "xformers")


def test_an_old_varlen_attn_takes_only_prompts_without_history(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def varlen_attn(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seq_q: Tensor,
        cu_seq_k: Tensor,
        max_q: int,
        max_k: int,
        is_causal: bool = False,
        *,
        scale: float | None = None,
    ) -> Tensor:
        assert is_causal
        assert scale == LAYER.scale
        bounds = cu_seq_q.tolist()
        layer = replace(LAYER, window=None)
        pieces = [slice(a, b) for a, b in pairwise(bounds)]
        return torch.cat([expected(layer, query[p], key[p], value[p]) for p in pieces])

    triton = Explicit("triton")
    families(monkeypatch, TorchVarlen(varlen_attn, None))
    full = replace(LAYER, window=None)
    found = probe(full, CACHE, torch.bfloat16, triton, "flash-attn")
    assert found.kernels.fresh.name == "torch varlen_attn"
    assert found.kernels.prefill is found.kernels.decode is triton
    with pytest.raises(UsageError, match="no sliding window"):
        probe(LAYER, CACHE, torch.bfloat16, triton, "flash-attn")
