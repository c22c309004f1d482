"""Which modules the lists of a quantization_config mean."""

import time
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import pytest

from support.make_quantized_data import LLAMA
from support.quantized import DATA, llama, stored
from tightfit.errors import (
    ConfigError,
    UnsupportedModelError,
)
from tightfit.model.blocks.linear import replicated
from tightfit.model.config import Config
from tightfit.model.families import model_spec
from tightfit.model.layout import Stage
from tightfit.model.parameters import parameters
from tightfit.model.quantization.matching import Names, compressed_tensors, modules
from tightfit.model.quantization.read import read_quantization
from tightfit.model.sources import source_shapes
from tightfit.model.spec import Names as Surroundings
from tightfit.model.towers.base import Item, Media, Sizes, Tower


def test_lists_of_modules() -> None:
    both = compressed_tensors(["lm_head", r"re:.*self_attn\.(q|k)_proj$"])
    assert "lm_head" in both
    assert "model.lm_head" not in both
    tower = compressed_tensors(["model.visual.merger.mlp.0", "vision_tower.ln_pre"])
    assert "visual.merger.mlp.0" in tower
    assert "model.vision_tower.ln_pre" in tower
    assert "language_model.lm_head" in both
    assert "model.layers.3.self_attn.k_proj" in both
    assert "model.layers.3.self_attn.o_proj" not in both
    listed = modules(["model.layers.1", "gate", "visual*", "model.language_model.layers.2.mlp*"])
    assert "model.layers.1.mlp.down_proj" in listed
    assert "model.layers.10.mlp.down_proj" not in listed
    assert "model.layers.5.mlp.gate" in listed
    assert "model.layers.5.mlp.gate_proj" not in listed
    assert "visual.blocks.0.attn.qkv" in listed
    assert "language_model.model.layers.2.mlp.up_proj" in listed
    assert "self_attn" in Names(contained=["attn"])
    assert not Names()


def test_long_lists_are_quick() -> None:
    entries = [f"model.layers.{i}.mlp.experts.{e}.up_proj" for i in range(60) for e in range(500)]
    wild = [f"model.layers.{i}.self_attn*" for i in range(60)]
    started = time.process_time()
    names = modules([*entries, *wild])
    for i in range(60):
        for _ in range(30):
            assert f"model.layers.{i}.self_attn.q_proj" in names
            assert f"model.layers.{i}.mlp.experts.7.down_proj" not in names
    assert time.process_time() - started < 1


@pytest.mark.parametrize("pattern", [r"re:(.*)*x", r"re:(\w+\.)+x", "re:" + ".*a" * 20])
def test_patterns_that_never_end(pattern: str) -> None:
    with pytest.raises(UnsupportedModelError, match="could take forever"):
        compressed_tensors([pattern])


def test_wrong_pattern() -> None:
    section = {**DATA["sections"]["W4A16"], "ignore": ["re:*["]}
    with pytest.raises(ConfigError, match=r"is no regular\s+expression"):
        llama(section)


def test_parts_of_a_fused_layer_differ() -> None:
    section = {**DATA["sections"]["W4A16"], "ignore": ["lm_head", r"re:.*\.k_proj$"]}
    with pytest.raises(UnsupportedModelError) as e:
        parameters(llama(section))
    assert "model.layers.0.self_attn.qkv_proj.weight is made of" in e.value.message


def test_ignored_modules_and_several_groups() -> None:
    four = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128}
    eight = {"num_bits": 8, "type": "float", "strategy": "channel"}
    section = {
        "quant_method": "compressed-tensors",
        "format": "mixed-precision",
        "ignore": ["lm_head", r"re:.*self_attn\.o_proj"],
        "config_groups": {
            "all": {"targets": ["Linear"], "weights": four, "format": "pack-quantized"},
            "attention": {
                "targets": [r"re:.*self_attn.*"],
                "weights": eight,
                "format": "float-quantized",
            },
        },
    }
    dtypes = {name: tensor.dtype for name, tensor in stored(llama(section)).items()}
    layer = "model.layers.0"
    assert dtypes[f"{layer}.mlp.up_proj.weight_packed"] == "I32"
    assert dtypes[f"{layer}.self_attn.q_proj.weight"] == "F8_E4M3"
    assert dtypes[f"{layer}.self_attn.o_proj.weight"] == "BF16"
    assert dtypes["lm_head.weight"] == "BF16"


def test_quantized_output_layer() -> None:
    """Linear in transformers, so that a list that does not name it quantizes it."""
    section = {**DATA["sections"]["W4A16"], "ignore": []}
    assert source_shapes(llama(section))["lm_head.weight_packed"] == (320, 32)


def test_the_section_of_a_text_model_leaves_its_towers_alone() -> None:
    """Kimi K2.5: bfloat16 towers that no list names."""
    spec = replace(
        model_spec(LLAMA),
        names=Surroundings(
            embedding="language_model.model.embed_tokens", head="language_model.lm_head"
        ),
        towers=(tower(),),
    )
    section = {**DATA["sections"]["W4A16"], "ignore": ["lm_head"]}
    found = stored(
        read_quantization(Config({"text_config": {"quantization_config": section}}), spec)
    )
    assert found["vision.fc.weight"].dtype == "BF16"
    assert found["language_model.lm_head.weight"].dtype == "BF16"
    assert found["model.layers.0.mlp.up_proj.weight_packed"].dtype == "I32"
    outer = stored(read_quantization(Config({"quantization_config": section}), spec))
    assert outer["vision.fc.weight_packed"].dtype == "I32"


def tower() -> Tower:
    class Nothing(Media):
        def items(
            self,
            processor: Mapping[str, Any],
            max_tokens: int,
            sizes: Sizes,
            active: Collection[str],
        ) -> tuple[Item, ...]:
            return ()

    weights = replicated("vision.fc", rows=64, columns=128, where=Stage.FIRST)
    return Tower(
        modalities=("image",),
        weights=tuple(weights),
        media=Nothing(),
        hidden_size=128,
        intermediate_size=64,
        num_heads=1,
        head_dim=128,
        num_layers=1,
        output_size=256,
    )
