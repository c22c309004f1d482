"""Context lengths: what the config allows, what vLLM takes by default, and how to get another."""

import json
from typing import Any

import pytest

from support.configs import DIRECTORY, read_config, read_spec
from tightfit.checkpoint.describe import overridden
from tightfit.errors import ConfigError, UsageError
from tightfit.model.families import model_spec
from tightfit.planner.api import open_model
from tightfit.planner.assemble import make_plan
from tightfit.planner.devices import CATALOGUE
from tightfit.planner.emit import emit
from tightfit.planner.fit import fit
from tightfit.planner.options import PlanOptions
from tightfit.planner.plan import Plan
from tightfit.planner.vllm_command import parse_command

L4 = CATALOGUE["l4-24gb"]
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32_768}


def plan(name: str, **options: Any) -> Plan:
    return make_plan(read_spec(name), PlanOptions(**options), name=name)


def length(result: Plan) -> int:
    return result.options.max_model_len.value


@pytest.mark.parametrize("model", ["Phi-3.5-mini", "Phi-3.5-MoE", "Phi-4-mini-instruct"])
def test_longrope_begins_with_its_original_length(model: str) -> None:
    assert length(plan(model)) == 4096
    assert length(plan(model, engine_version="0.12.0", max_model_len=-1)) == 4096
    assert length(plan(model, engine_version="0.11.0")) == 131_072
    assert length(plan(model, max_model_len=131_072)) == 131_072
    with pytest.raises(UsageError, match=r"more than the model's 131072"):
        plan(model, max_model_len=131_073)


def test_fit_finds_what_longrope_could_have() -> None:
    spec = read_spec("Phi-3.5-mini")

    def replan(options: PlanOptions) -> Plan:
        return make_plan(spec, options, name="x")

    assert replan(PlanOptions(device=L4)).verdict.fits
    fitted = fit(PlanOptions(device=L4), replan)
    assert fitted.value == fitted.plan.verdict.max_model_len_that_fits
    assert 4096 < length(fitted.plan) < 131_072


@pytest.mark.parametrize(("version", "longest"), [("0.11.0", 131_072), ("0.32.0", 40_960)])
def test_yarn_once_multiplied_the_original_length(version: str, longest: int) -> None:
    config = read_config("Qwen3-8B") | {"rope_scaling": YARN}
    options = PlanOptions(engine_version=version)
    assert length(make_plan(model_spec(config), options, name="x")) == longest
    # Configs that state both agree in every version.
    assert length(plan("DeepSeek-V3", engine_version=version)) == 163_840


def test_longer_than_the_config_allows() -> None:
    with pytest.raises(UsageError) as caught:
        plan("Qwen3-8B", max_model_len=65_536)
    assert "VLLM_ALLOW_LONG_MAX_MODEL_LEN=1" in str(caught.value.hint)
    command = "VLLM_ALLOW_LONG_MAX_MODEL_LEN=1 vllm serve x --max-model-len 65536"
    parsed = parse_command(command)
    assert parsed.warnings == ()
    options = PlanOptions(**parsed.options)
    result = make_plan(read_spec("Qwen3-8B"), options, name="x")
    assert length(result) == 65_536
    assert parse_command(emit(result, "x", "vllm", options=options)).options == parsed.options


def test_another_config() -> None:
    opened = open_model(str(DIRECTORY / "Qwen3-8B.json"))
    options = PlanOptions(hf_overrides={"max_position_embeddings": 65_536})
    result = opened.plan(options)
    assert length(result) == 65_536
    assert length(opened.plan(PlanOptions())) == 40_960
    text = emit(result, "x", "vllm", options=options)
    assert parse_command(text).options == {"hf_overrides": {"max_position_embeddings": 65_536}}
    with pytest.raises(ConfigError, match="max_position_embeddings = 'much'"):
        opened.plan(PlanOptions(hf_overrides={"max_position_embeddings": "much"}))


def test_only_configs_within_a_config_are_merged() -> None:
    config = {"text_config": {"a": 1, "b": 2}, "rope_parameters": {"rope_theta": 1.0}, "c": 3}
    changed = overridden(config, {"text_config": {"b": 4}, "rope_scaling": YARN})
    assert changed == {"text_config": {"a": 1, "b": 4}, "c": 3, "rope_scaling": YARN}


@pytest.mark.parametrize(("version", "scaled"), [("0.11.0", True), ("0.12.0", False)])
def test_a_flag_counts_where_the_version_has_it(version: str, scaled: bool) -> None:
    text = json.dumps(YARN)
    parsed = parse_command(f"vllm serve x --rope-scaling '{text}'", version)
    assert parsed.options == ({"hf_overrides": {"rope_scaling": YARN}} if scaled else {})
    gone = ("--rope-scaling is gone since vLLM 0.12: --hf-overrides with rope_parameters",)
    assert parsed.warnings == (() if scaled else gone)
    swap = parse_command(f"docker run vllm/vllm-openai:v{version} --model x --swap-space 4")
    assert swap.warnings == ("--swap-space can change memory, and is not modelled",)
