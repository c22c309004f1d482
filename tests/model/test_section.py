"""What `quantize` writes into config.json is read back as what it does to the weights."""

import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest

from support.configs import ONE_PER_ARCHITECTURE, read_config
from support.make_quantized_data import EXPERTS, LLAMA
from support.wishes import CHOICES, ONE_OF_EACH_FORMAT, WISHES, mixed, shallow
from tightfit.errors import LayoutError, UnsupportedModelError, UsageError
from tightfit.model.config import Config
from tightfit.model.families import model_spec
from tightfit.model.parameters import loaded_parameters, parameters
from tightfit.model.quantization.readers import READERS
from tightfit.model.quantization.section import patterns, section
from tightfit.model.quantization.written import Wish, decide, written
from tightfit.model.spec import ModelSpec

ALL_KEEP_A_STATE = ("falcon-mamba-7b", "mamba-130m-hf", "mamba2-780m")
STORED_OTHERWISE = {
    "dbrx-base": "its experts are one long matrix",
    "gpt-oss-20b-BF16": "rows of gate and up alternate",
    "gpt2": r"it is stored as \[inputs, outputs\]",
}
"""In ways that quantized checkpoints do not have."""
QUANTIZED = {*ONE_PER_ARCHITECTURE} - {*ALL_KEEP_A_STATE, *STORED_OTHERWISE}


def plain_spec(name: str) -> ModelSpec:
    config = read_config(name)
    config.pop("quantization_config", None)
    for inner in config.values():
        if isinstance(inner, dict):
            inner.pop("quantization_config", None)
    return shallow(model_spec(config))


def sections(spec: ModelSpec, wish: Wish, others: Iterable[str] = ()) -> dict[str, Any]:
    return section(spec, wish, decide(spec, wish), others)


def read_back(spec: ModelSpec, found: dict[str, Any]) -> ModelSpec:
    config = Config(found, name="quantization_config")
    recipe = READERS[found["quant_method"]](config, f"{spec.names.head}.weight")
    return replace(spec, quantization=recipe)


def assert_says_what_is_written(spec: ModelSpec, wish: Wish) -> None:
    ours = replace(spec, quantization=written(spec, wish))
    said = read_back(spec, sections(spec, wish))
    try:
        expected = parameters(ours)
    except LayoutError:
        return
    assert parameters(said) == expected
    try:
        held = loaded_parameters(ours)
    except LayoutError:
        return
    assert loaded_parameters(said) == held


@pytest.mark.parametrize("name", sorted(QUANTIZED))
def test_every_architecture(name: str) -> None:
    spec = plain_spec(name)
    for label in ONE_OF_EACH_FORMAT:
        assert_says_what_is_written(spec, WISHES[label])
    assert_says_what_is_written(spec, mixed(spec))


@pytest.mark.parametrize("name", ALL_KEEP_A_STATE)
def test_nothing_is_left_of_models_whose_layers_keep_a_state(name: str) -> None:
    with pytest.raises(UsageError, match="would be quantized"):
        written(plain_spec(name), WISHES["int8"])


@pytest.mark.parametrize("name", STORED_OTHERWISE)
def test_matrices_that_no_quantized_checkpoint_holds(name: str) -> None:
    with pytest.raises(UnsupportedModelError, match=STORED_OTHERWISE[name]):
        written(plain_spec(name), WISHES["int8"])


MIXTURES = ("Qwen3-30B-A3B", "DeepSeek-V2-Lite", "Qwen3-VL-30B-A3B-Instruct")


@pytest.mark.parametrize("label", WISHES)
@pytest.mark.parametrize("name", ["Llama-3.1-8B", *MIXTURES])
def test_every_scheme(name: str, label: str) -> None:
    if label == "fp8-tensor" and name in MIXTURES:
        with pytest.raises(UnsupportedModelError, match="only with static scales"):
            written(plain_spec(name), WISHES[label])
        return
    assert_says_what_is_written(plain_spec(name), WISHES[label])


def test_all_layers_with_one_pattern() -> None:
    """Engines compare every module with every entry."""
    spec = model_spec(read_config("Qwen3-30B-A3B"))
    found = sections(spec, WISHES["fp8-channel"])
    assert found["config_groups"]["group_0"]["targets"] == ["Linear"]
    assert found["ignore"] == ["lm_head", r"re:.*layers\.\d+\.mlp\.gate$"]


def test_groups_of_a_mixed_recipe() -> None:
    spec = model_spec(read_config("Qwen3-30B-A3B"))
    found = sections(spec, mixed(spec))
    assert found["format"] == "mixed-precision"
    fp8, int4 = found["config_groups"].values()
    numbers = [int(n) for n in re.findall(r"layers\\\.(\d+)\\\.", " ".join(found["ignore"]))]
    assert set(numbers) == {47}
    assert fp8["format"] == "float-quantized"
    assert r"re:.*lm_head$" in fp8["targets"]
    assert r"re:.*layers\.\d+\.self_attn\.q_proj$" in fp8["targets"]
    assert int4["format"] == "pack-quantized"
    assert r"re:.*layers\.\d+\.mlp\.experts\.\d+\.down_proj$" in int4["targets"]


def test_a_head_that_is_quantized_is_a_target() -> None:
    """vLLM's head is no linear layer, so that `Linear` does not mean it."""
    spec = model_spec(LLAMA)
    fp8 = CHOICES["fp8-channel"]
    found = sections(spec, Wish(default=fp8, rules=(("^lm_head$", fp8),)))
    assert found["config_groups"]["group_0"]["targets"] == ["Linear", "re:.*lm_head$"]
    assert found["ignore"] == []
    for form in ("gptq", "awq"):
        (int4,) = [c for c in CHOICES.values() if c.format == form and c.scheme[:2] == "w4"]
        assert sections(spec, Wish(default=int4, rules=(("^lm_head$", int4),)))["lm_head"] is True


def test_what_a_format_cannot_say() -> None:
    spec = model_spec(LLAMA)
    block = CHOICES["fp8-block (fp8)"]
    with pytest.raises(UnsupportedModelError, match=r"no words to say that lm_head\.weight is q"):
        sections(spec, Wish(default=block, rules=(("^lm_head$", block),)))
    # AWQ is of decoders alone.
    vision = plain_spec("Qwen2.5-VL-7B-Instruct")
    awq = CHOICES["w4a16-asym g32 (awq)"]
    with pytest.raises(UnsupportedModelError, match=r"no words to say that .*visual.* quantized"):
        sections(vision, Wish(default=awq, rules=(("visual.*mlp", awq),)))


def test_towers_stay_as_they_are_by_their_name() -> None:
    spec = plain_spec("Mistral-Small-3.1-24B")
    ignored = sections(spec, WISHES["int8"])["ignore"]
    assert ignored == [
        "language_model.lm_head",
        "lm_head",
        r"re:(.*\.)?multi_modal_projector(\..*)?$",
        r"re:(.*\.)?vision_tower(\..*)?$",
    ]
    whisper = sections(plain_spec("whisper-tiny"), WISHES["int8"])
    pattern = re.compile(whisper["ignore"][-1].removeprefix("re:"))
    assert pattern.match("model.encoder.layers.0.self_attn.q_proj")
    assert not pattern.match("model.decoder.layers.0.encoder_attn.q_proj")


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("AI21-Jamba-1.5-Mini", "model.layers.0.mixer.in_proj"),
        ("Falcon-H1-0.5B-Base", "model.72.mixer.out_proj"),
        ("LFM2-1.2B", "model.layers.0.short_conv.in_proj"),
    ],
)
def test_modules_that_vllm_calls_otherwise(name: str, asked: str) -> None:
    ignored = sections(plain_spec(name), WISHES["int8"])["ignore"]
    assert any(re.match(entry.removeprefix("re:"), asked) for entry in ignored)


def test_a_tower_that_is_quantized_in_part() -> None:
    spec = plain_spec("Qwen2.5-VL-7B-Instruct")
    fp8 = CHOICES["fp8-channel"]
    assert_says_what_is_written(spec, Wish(default=fp8, rules=((r"visual.*\.mlp\.", fp8),)))


def test_layers_that_predict_further_tokens() -> None:
    """They are no part of the model, and stay as they are: vLLM asks for each of their modules."""
    spec = model_spec({**EXPERTS, "num_hidden_layers": 2})
    others = [
        "model.layers.2.eh_proj",
        "model.layers.2.self_attn.q_proj",
        "model.layers.2.mlp.gate",
        *(f"model.layers.2.mlp.experts.{i}.gate_proj" for i in range(3)),
        "mtp.layers.0.self_attn.q_proj",
        "mtp.fc",
    ]
    ignored = sections(spec, WISHES["fp8-channel"], others)["ignore"]
    assert ignored == [
        "lm_head",
        r"re:.*layers\.\d+\.mlp\.gate$",
        r"re:.*layers\.\d+\.eh_proj$",
        r"re:.*layers\.2\.self_attn\.q_proj$",
        r"re:.*layers\.2\.mlp\.experts\.\d+\.gate_proj$",
        r"re:.*mtp\.layers\.\d+\.self_attn\.q_proj$",
        "mtp.fc",
    ]
    names = sections(spec, WISHES["fp8-block (fp8)"], others)["modules_to_not_convert"]
    assert {"model.layers.2.mlp.experts", "model.layers.2.self_attn.q_proj", "mtp.fc"} <= {*names}


@pytest.mark.parametrize("label", ["fp8-block (fp8)", "w4a16 g32 (gptq)", "w4a16-asym g32 (awq)"])
def test_experts_that_stay_are_named_as_one(label: str) -> None:
    """vLLM asks these formats for the module of all experts."""
    spec = model_spec({**EXPERTS, "num_hidden_layers": 2})
    wish = Wish(default=CHOICES[label], rules=((r"layers\.1\..*experts", None),))
    found = sections(spec, wish)
    assert_says_what_is_written(spec, wish)
    if "gptq" in label:
        entries = [entry.removeprefix("-:") for entry in found["dynamic"]]
        assert any(re.match(entry, "model.layers.1.mlp.experts") for entry in entries)
        assert not any(re.match(entry, "model.layers.0.mlp.experts") for entry in entries)
    else:
        assert "model.layers.1.mlp.experts" in found["modules_to_not_convert"]


def test_patterns_match_no_others() -> None:
    names = [f"model.layers.{i}.mlp.up_proj" for i in (0, 2)]
    assert patterns(names, ["model.layers.1.mlp.down_proj"]) == [r"re:.*layers\.\d+\.mlp\.up_proj$"]
    assert patterns(names, ["model.layers.1.mlp.up_proj"]) == [
        r"re:.*layers\.0\.mlp\.up_proj$",
        r"re:.*layers\.2\.mlp\.up_proj$",
    ]
    assert patterns(["lm_head", "mtp.fc"], names) == ["lm_head", "mtp.fc"]


def test_rules_that_match_nothing() -> None:
    wish = Wish(default=None, rules=(("atention", CHOICES["int8"]),))
    with pytest.raises(UsageError, match="'atention' matches nothing of LlamaForCausalLM"):
        decide(model_spec(LLAMA), wish)
