"""What a checkpoint says of its quantization outside config.json."""

import json
from pathlib import Path
from typing import Any

import pytest

from support.make_quantized_data import LLAMA
from tightfit.checkpoint.checkpoint import open_checkpoint
from tightfit.checkpoint.describe import Description, describe
from tightfit.errors import ConfigError, UnsupportedModelError

FP8 = {
    "producer": {"name": "modelopt", "version": "0.39.0"},
    "quantization": {
        "quant_algo": "FP8",
        "kv_cache_quant_algo": "FP8",
        "exclude_modules": ["lm_head"],
    },
}


def described(directory: Path, config: dict[str, Any], modelopt: object = None) -> Description:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    if modelopt is not None:
        (directory / "hf_quant_config.json").write_text(json.dumps(modelopt))
    return describe(open_checkpoint(str(directory)))


def test_modelopt_writes_a_file_of_its_own(tmp_path: Path) -> None:
    found = described(tmp_path / "Llama-FP8", LLAMA, FP8)
    assert found.spec.quantization is not None
    assert found.spec.quantization.name == "modelopt (FP8)"
    assert found.spec.kv_cache_quantization == "fp8_e4m3"
    assert not found.warnings


def test_the_config_has_the_last_word(tmp_path: Path) -> None:
    section = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    found = described(tmp_path / "model", {**LLAMA, "quantization_config": section}, FP8)
    assert found.spec.quantization is not None
    assert found.spec.quantization.name == "fp8 (block 128x128)"


def test_wrong_files_of_modelopt(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a JSON object"):
        described(tmp_path / "list", LLAMA, [1])
    with pytest.raises(UnsupportedModelError, match="quant_algo 'W4A8_AWQ' is not modelled"):
        described(tmp_path / "awq", LLAMA, {"quantization": {"quant_algo": "W4A8_AWQ"}})


@pytest.mark.parametrize("name", ["Llama-3.1-70B-Instruct-FP8", "model-NVFP4", "x.w4a16", "q-4bit"])
def test_names_that_promise_more(tmp_path: Path, name: str) -> None:
    (warning,) = described(tmp_path / name, LLAMA).warnings
    assert "config.json declares no quantization" in warning


@pytest.mark.parametrize("name", ["Llama-3.1-8B", "fp8000", "a3b-int", "Qwen3-4B"])
def test_names_that_promise_nothing(tmp_path: Path, name: str) -> None:
    assert described(tmp_path / name, LLAMA).warnings == ()
