"""Checkpoints of which nobody knows the architecture: their weights are known all the same."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from support.configs import read_config
from tightfit.checkpoint.describe import describe
from tightfit.checkpoint.meta_device import is_installed, meta_module
from tightfit.errors import UnknownArchitectureError, UnsupportedModelError
from tightfit.model.parameters import parameters
from tightfit.planner.api import open_model
from tightfit.planner.options import PlanOptions
from tightfit.planner.plan import Plan
from tightfit.units import dtype_bytes

CONFIG = {
    "architectures": ["NobodyKnowsThisForCausalLM"],
    "model_type": "nobody_knows_this",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 512,
    "torch_dtype": "bfloat16",
}
TENSORS: dict[str, tuple[str, tuple[int, ...]]] = {
    "embed.weight": ("BF16", (256, 64)),
    "layers.0.mix.weight": ("BF16", (101, 64)),
    "layers.0.experts": ("BF16", (4, 32, 64)),
    "layers.0.norm.weight": ("BF16", (64,)),
    "layers.1.conv.weight": ("BF16", (64, 1, 4, 2)),
    "layers.1.scale": ("F32", ()),
    "layers.1.packed.weight": ("I32", (64, 8)),
}
BYTES = 2 * (256 * 64 + 101 * 64 + 4 * 32 * 64 + 64 + 64 * 8) + 4 + 4 * 64 * 8


def checkpoint(path: Path, config: Mapping[str, Any], *, weights: bool = True) -> str:
    path.joinpath("config.json").write_text(json.dumps(config))
    if weights:
        header: dict[str, Any] = {}
        end = 0
        for name, (dtype, shape) in TENSORS.items():
            elements = 1
            for extent in shape:
                elements *= extent
            start, end = end, end + dtype_bytes(dtype, elements)
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        file = path.joinpath("model.safetensors")
        file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(end))
    return str(path)


def plan(model: str, **options: Any) -> Plan:
    return open_model(model).plan(PlanOptions(assume_full_attention=True, **options))


def test_weights_come_from_the_headers(tmp_path: Path) -> None:
    found = plan(checkpoint(tmp_path, CONFIG))
    assert found.model.weights_origin == "headers"
    assert found.model.checkpoint_bytes == BYTES
    assert found.ranks[0].component("weights").planned_bytes == BYTES
    # Two KV heads of 8 features in both layers.
    assert found.kv_cache.bytes_per_token == 2 * 2 * 2 * 8 * 2
    assert found.warnings == (
        "NobodyKnowsThisForCausalLM is not modelled: its weights are from the headers of its "
        "files, and the activations are a rough estimate",
        "full attention is assumed in each of 2 layers, with 2 KV heads of 8 features",
    )


def test_without_the_assumption_the_size_is_told(tmp_path: Path) -> None:
    opened = open_model(checkpoint(tmp_path, CONFIG))
    with pytest.raises(UnsupportedModelError) as e:
        opened.plan(PlanOptions())
    assert e.value.exit_code == 3
    assert e.value.message == (
        "architecture NobodyKnowsThisForCausalLM is not modelled: its weights take 63.8 KiB (from "
        "headers), but what its layers keep of a sequence is unknown"
    )
    assert e.value.hint == (
        "--assume-full-attention plans keys and values of every head in every layer"
    )


def test_nothing_is_assumed_that_the_config_does_not_say(tmp_path: Path) -> None:
    config = {key: value for key, value in CONFIG.items() if key != "num_attention_heads"}
    opened = open_model(checkpoint(tmp_path, config))
    with pytest.raises(UnsupportedModelError) as e:
        opened.plan(PlanOptions(assume_full_attention=True))
    assert e.value.message.endswith("and config.json does not say how many heads it has")


def test_matrices_are_split_and_the_rest_is_whole(tmp_path: Path) -> None:
    found = plan(checkpoint(tmp_path, CONFIG), tensor_parallel_size=2)
    # Of 101 rows either rank has room for 51; packed integers are a matrix like any other.
    matrices = 2 * (128 * 64 + 51 * 64 + 4 * 16 * 64) + 4 * 32 * 8
    whole = 2 * (64 + 64 * 8) + 4
    sizes = [rank.component("weights").planned_bytes for rank in found.ranks]
    assert sizes == [matrices + whole] * 2
    assert any("split evenly over the ranks" in text for text in found.warnings)


def test_a_plan_is_made_of_the_same_spec_each_time(tmp_path: Path) -> None:
    opened = open_model(checkpoint(tmp_path, CONFIG))
    first, second = (
        opened.plan(PlanOptions(assume_full_attention=True, max_num_seqs=n)) for n in (1, 2)
    )
    assert first.ranks[0].component("weights") == second.ranks[0].component("weights")


def test_shapes_alone_are_refused_if_quantized(tmp_path: Path) -> None:
    config = {**CONFIG, "quantization_config": {"quant_method": "awq"}}
    with pytest.raises(UnknownArchitectureError) as e:
        open_model(checkpoint(tmp_path, config, weights=False))
    assert e.value.hint == "its weights are quantized, and only their headers would tell how"


def test_without_transformers_its_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tightfit.checkpoint.unknown.is_installed", lambda: False)
    with pytest.raises(UnknownArchitectureError) as e:
        open_model(checkpoint(tmp_path, CONFIG, weights=False))
    assert e.value.hint is not None
    assert "pip install 'tightfit[hf]'" in e.value.hint


@pytest.mark.skipif(not is_installed(), reason="the extra hf is not installed")
def test_shapes_come_from_transformers(tmp_path: Path) -> None:
    """XGLM, whose sizes have names of their own, which transformers translates."""
    config = {
        "architectures": ["XGLMForCausalLM"],
        "model_type": "xglm",
        "vocab_size": 1000,
        "d_model": 64,
        "ffn_dim": 128,
        "num_layers": 2,
        "attention_heads": 4,
        "torch_dtype": "bfloat16",
        "auto_map": {"AutoModel": "modeling_evil.Evil"},
    }
    tmp_path.joinpath("modeling_evil.py").write_text("raise SystemExit(7)")
    found = plan(checkpoint(tmp_path, config, weights=False))
    layer = 4 * (64 * 64 + 64) + 2 * 64 * 128 + 128 + 64 + 2 * 2 * 64
    assert found.model.weights_origin == "transformers"
    assert found.model.params == 1000 * 64 + 2 * layer + 2 * 64
    assert found.kv_cache.bytes_per_token == 2 * 2 * 64 * 2


@pytest.mark.skipif(not is_installed(), reason="the extra hf is not installed")
def test_what_transformers_does_not_know_is_said() -> None:
    found = meta_module({"architectures": ["NobodyForCausalLM"], "model_type": "nobody"})
    assert isinstance(found, str)
    assert found.endswith("does not know NobodyForCausalLM either")


def test_a_base_model_saved_alone(tmp_path: Path) -> None:
    """As GPT-2 is published: names without their first component, and a mask beside."""
    config = {**read_config("gpt2"), "n_layer": 1, "n_embd": 12, "n_head": 2, "vocab_size": 64}
    from tightfit.model.families import model_spec
    from tightfit.model.sources import as_base_model, check_sources, source_shapes

    spec = model_spec(config)
    tensors = {
        name.removeprefix("transformer."): Seen(dtype="F32", shape=shape)
        for name, shape in source_shapes(spec).items()
    }
    tensors["h.0.attn.bias"] = Seen(dtype="F32", shape=(1, 1, 1024, 1024))
    base = as_base_model(spec, tensors)
    check_sources(base, tensors, "it")
    assert len(parameters(base)) == len(parameters(spec))


class Seen:
    """A tensor of a header."""

    def __init__(self, *, dtype: str, shape: tuple[int, ...]) -> None:
        self.dtype, self.shape, self.nbytes = dtype, shape, 4


def test_a_head_beside_a_tied_embedding_may_have_any_name(tmp_path: Path) -> None:
    """A tied NeoX with an `embed_out` of its own: it counts, as vLLM loads it."""
    import torch
    from safetensors.torch import save_file

    from tightfit.model.families import model_spec
    from tightfit.model.sources import source_shapes

    small = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    config = read_config("pythia-160m") | small | {"num_hidden_layers": 1, "vocab_size": 64}
    shapes = source_shapes(model_spec(config))
    tensors = {name: torch.randn(shape).half() for name, shape in shapes.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    tmp_path.joinpath("config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    spec = open_model(str(tmp_path)).spec
    assert not spec.tie_word_embeddings
    assert source_shapes(spec) == shapes


def test_sentence_transformers_serve_embeddings(tmp_path: Path) -> None:
    from tightfit.checkpoint.checkpoint import open_checkpoint

    tmp_path.joinpath("config.json").write_text(json.dumps(read_config("Qwen3-Embedding-8B")))
    assert not describe(open_checkpoint(str(tmp_path))).spec.pooling
    tmp_path.joinpath("modules.json").write_text("[]")
    assert describe(open_checkpoint(str(tmp_path))).spec.pooling
