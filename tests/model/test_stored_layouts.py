"""The tables of older vLLM and of SGLang: which versions they serve, and where names differ."""

from collections.abc import Callable
from pathlib import Path

import pytest

from support.slicing import read_rank
from support.work import merge_shards, write_shards
from tightfit.checkpoint.checkpoint import open_checkpoint
from tightfit.cli.output import NoProgress
from tightfit.errors import UnsupportedModelError, UsageError
from tightfit.model.stored import LAYOUTS, stored_layout
from tightfit.sharding.proof.verify import verify
from tightfit.sharding.rank_files import open_rank_files

TinyModel = Callable[[str], Path]
SCALES = ("_k_scale", "_q_scale", "_v_scale", "_prob_scale")
WITHOUT_SCALES = ("vllm-0.8", "sglang-0.5")


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ("vllm-0.8.5", "vllm-0.8"),
        ("vllm-0.11.0", "vllm-0.8"),
        ("vllm-0.13", "vllm-0.8"),
        ("vllm-0.14.1", "vllm-0.14"),
        ("vllm-0.24.0", "vllm-0.14"),
        ("vllm-0.25.1", "vllm-0.25"),
        ("vllm-0.31.0", "vllm-0.25"),
        ("vllm-0.33.0", "vllm-0.32"),
        ("vllm-0.8.5.post1", "vllm-0.8"),
        ("sglang-0.5.23", "sglang-0.5"),
    ],
)
def test_versions(asked: str, found: str) -> None:
    assert stored_layout(asked).name == found


@pytest.mark.parametrize("name", ["vllm-0.7.3", "vllm-0.34.0", "vllm-1.0", "sglang-0.4", "tgi", ""])
def test_unknown(name: str) -> None:
    with pytest.raises(UsageError) as e:
        stored_layout(name)
    assert "0.8 to 0.33" in (e.value.hint or "") or "vllm-0.32" in (e.value.hint or "")


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "builtin"])
@pytest.mark.parametrize("name", ["llama_tied", "qwen3", "mixtral"])
def test_there_and_back(layout: str, name: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    if (layout, name) == ("vllm-0.14", "mixtral"):
        with pytest.raises(UnsupportedModelError, match="are not known"):
            write_shards(tiny_model(name), tmp_path / "out", 2, layout=layout)
        return
    out = tmp_path / "out"
    write_shards(tiny_model(name), out, 2, layout=layout)
    source = open_checkpoint(str(tiny_model(name)))
    assert verify(out, source.config, NoProgress(), source).problems == ()
    names = read_rank(out, 1).keys()
    scales = [one for one in names if one.endswith(SCALES)]
    assert len(scales) == (0 if layout in WITHOUT_SCALES else 8)
    experts = [one for one in names if one.endswith("w13_weight")]
    inside = "" if layout in WITHOUT_SCALES else "routed_experts."
    wanted = [f"model.layers.{i}.block_sparse_moe.experts.{inside}w13_weight" for i in (0, 1)]
    assert sorted(experts) == (wanted if name == "mixtral" else [])
    # Across to the layout of today, and the same files as if cut from the model.
    write_shards(out, tmp_path / "today", 2)
    write_shards(tiny_model(name), tmp_path / "direct", 2)
    for path in (tmp_path / "direct").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "today" / path.name).read_bytes()
    # Engines of that version write no manifest.
    (out / "tightfit-manifest.json").unlink()
    assert not open_rank_files(open_checkpoint(str(out))).parallel.expert_parallel
    assert merge_shards(out, tmp_path / "back")


def test_routers_of_old(tiny_model: TinyModel, tmp_path: Path) -> None:
    write_shards(tiny_model("qwen3_moe"), tmp_path / "out", 1, layout="vllm-0.12.0")
    names = read_rank(tmp_path / "out", 0)
    assert "model.layers.0.mlp.gate.weight" in names
    assert "model.layers.0.mlp.experts.gate.weight" not in names


def test_refusals(tiny_model: TinyModel, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UsageError, match="files of all pipeline stages alike"):
        write_shards(tiny_model("llama"), out, 1, pipeline_parallel_size=2, layout="vllm-0.25")
    with pytest.raises(UsageError, match="deal out experts is not known"):
        write_shards(tiny_model("mixtral"), out, 2, expert_parallel=True, layout="vllm-0.8")
    with pytest.raises(UnsupportedModelError, match=r"FalconForCausalLM in vLLM 0\.8 to 0\.13"):
        write_shards(tiny_model("falcon"), out, 1, layout="vllm-0.8")
    with pytest.raises(UnsupportedModelError, match="SGLang's names of Gemma2ForCausalLM"):
        write_shards(tiny_model("gemma2"), out, 1, layout="sglang-0.5")
    with pytest.raises(UnsupportedModelError, match="no biases in its MLPs"):
        write_shards(tiny_model("llama_bias"), out, 1, layout="sglang-0.5")
    with pytest.raises(UnsupportedModelError, match="experts in every layer"):
        write_shards(tiny_model("qwen3_moe"), out, 1, layout="sglang-0.5")
    assert not out.exists()
    (note,) = stored_layout("vllm-0.9.2").notes
    assert "vLLM 0.8 to 0.13" in note
    assert stored_layout("vllm-0.32").notes == ()
