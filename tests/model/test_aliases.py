"""Tensors are found under other names, and wrong ones are still named."""

import re
from dataclasses import dataclass, replace
from typing import Any

import pytest

from support.configs import MODELS, read_config, read_spec
from tightfit.errors import CheckpointError, UnsupportedModelError
from tightfit.model.aliases import aligned, require_own_names
from tightfit.model.families import model_spec
from tightfit.model.sources import check_sources, source_shapes, untied
from tightfit.model.spec import ModelSpec


@dataclass(frozen=True)
class Fake:
    name: str
    shape: tuple[int, ...]
    dtype: str = "BF16"
    nbytes: int = 0


def published(spec: ModelSpec) -> dict[str, Fake]:
    return {name: Fake(name, shape) for name, shape in source_shapes(spec).items()}


def renamed(tensors: dict[str, Fake], *rules: tuple[str, str]) -> dict[str, Fake]:
    found = {}
    for name, tensor in tensors.items():
        for pattern, new in rules:
            name = re.sub(pattern, new, name)
        found[name] = replace(tensor, name=name)
    return found


def short(name: str) -> ModelSpec:
    spec = read_spec(name)
    return replace(spec, layers=spec.layers[:2])


MOE = short("Qwen3-30B-A3B")


def stacked(spec: ModelSpec) -> dict[str, Fake]:
    """As transformers 5 holds experts in its modules."""
    found = {n: t for n, t in published(spec).items() if ".experts." not in n}
    mlp = spec.layers[0].mlp
    experts, inner, hidden = mlp.num_experts, mlp.intermediate_size, spec.hidden_size
    for i in range(len(spec.layers)):
        for name, shape in (
            ("gate_up_proj", (experts, 2 * inner, hidden)),
            ("down_proj", (experts, hidden, inner)),
        ):
            name = f"model.layers.{i}.mlp.experts.{name}"
            found[name] = Fake(name, shape, nbytes=2 * experts * hidden * inner)
    return found


def test_published_names_are_left_alone() -> None:
    for name in ("Llama-3.2-1B", "Qwen2.5-VL-7B-Instruct", "gpt-oss-20b"):
        if name in MODELS:
            tensors = published(read_spec(name))
            assert aligned(read_spec(name), tensors, "it") == (tensors, None)


def test_experts_in_one_tensor() -> None:
    tensors = stacked(MOE)
    found, alias = aligned(MOE, tensors, "it")
    assert alias == "model.layers.0.mlp.experts.gate_up_proj"
    assert {name: tensor.shape for name, tensor in found.items()} == source_shapes(MOE)
    check_sources(MOE, found, "it")
    one = found["model.layers.1.mlp.experts.5.up_proj.weight"]
    assert one.nbytes == MOE.hidden_size * MOE.layers[0].mlp.intermediate_size


def test_experts_of_their_own_where_one_tensor_is_published() -> None:
    spec = short("Qwen3-VL-30B-A3B-Instruct")
    mlp = spec.layers[0].mlp
    tensors = {n: t for n, t in published(spec).items() if ".mlp.experts." not in n}
    for i in range(2):
        for expert in range(mlp.num_experts):
            at = f"model.language_model.layers.{i}.mlp.experts.{expert}"
            for name in ("gate_proj", "up_proj"):
                name = f"{at}.{name}.weight"
                tensors[name] = Fake(name, (mlp.intermediate_size, spec.hidden_size))
            name = f"{at}.down_proj.weight"
            tensors[name] = Fake(name, (spec.hidden_size, mlp.intermediate_size))
    found, alias = aligned(spec, tensors, "it")
    assert alias == "model.language_model.layers.0.mlp.experts.0.gate_proj.weight"
    check_sources(spec, found, "it")


def test_experts_the_other_way_round() -> None:
    spec = short("Qwen3-VL-30B-A3B-Instruct")
    tensors = published(spec)
    name = "model.language_model.layers.1.mlp.experts.gate_up_proj"
    experts, rows, columns = tensors[name].shape
    tensors[name] = Fake(name, (experts, columns, rows))
    found, alias = aligned(spec, tensors, "it")
    assert alias == name
    check_sources(spec, found, "it")


def test_experts_of_another_shape() -> None:
    tensors = stacked(MOE)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    tensors[name] = Fake(name, (128, 1536, 2049))
    with pytest.raises(CheckpointError) as e:
        aligned(MOE, tensors, "it")
    assert e.value.message == (
        f"it: tensor {name!r} has the shape [128, 1536, 2049], and config.json says "
        "[128, 1536, 2048]"
    )


MODULES = (
    (r"^visual\.", "model.visual."),
    (r"^model\.(?!visual|language_model)", "model.language_model."),
)


def test_a_missing_tensor_among_other_names() -> None:
    spec = short("Qwen2.5-VL-7B-Instruct")
    tensors = renamed(published(spec), *MODULES)
    assert "model.language_model.norm.weight" in tensors
    assert "model.visual.merger.ln_q.weight" in tensors
    check_sources(spec, aligned(spec, tensors, "it").tensors, "it")
    del tensors["model.language_model.norm.weight"]
    with pytest.raises(CheckpointError, match=r"^it lacks the tensor 'model.norm.weight'$"):
        check_sources(spec, aligned(spec, tensors, "it").tensors, "it")


def test_wrong_tensors_are_called_as_in_the_file() -> None:
    spec = short("Qwen2.5-VL-7B-Instruct")
    tensors = renamed(published(spec), *MODULES)
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    found = aligned(spec, {**tensors, name: Fake(name, (1, 2))}, "it").tensors
    with pytest.raises(CheckpointError, match=re.escape(f"tensor {name!r} has the shape [1, 2]")):
        check_sources(spec, found, "it")
    name = "model.language_model.layers.0.mlp.up_proj.bias"
    found = aligned(spec, {**tensors, name: Fake(name, (1, 2))}, "it").tensors
    with pytest.raises(CheckpointError, match=re.escape(f"holds the tensor {name!r}, which")):
        check_sources(spec, found, "it")


def test_nothing_is_taken_for_something_else() -> None:
    """A name that is expected already is no other one as well."""
    spec = short("Llama-3.2-1B")
    tensors = published(spec)
    del tensors["model.layers.0.mlp.up_proj.weight"]
    found, alias = aligned(spec, tensors, "it")
    assert (found, alias) == (tensors, None)


def test_strange_names() -> None:
    spec = short("Llama-3.2-1B")
    names = ["", "#", "layers.#.x", "{}", "layers.1.layers.2.", "model.layers.0.{0}", "\\1"]
    names += [f"model.mlp.{'router.' * 20}weight{i}" for i in range(50)]
    tensors = {name: Fake(name, (1,)) for name in names}
    assert aligned(spec, tensors, "it") == (tensors, None)


def test_only_plans_read_other_names() -> None:
    require_own_names(MOE)
    spec = replace(MOE, alias="model.layers.0.mlp.experts.gate_up_proj")
    assert not spec.is_plain
    with pytest.raises(UnsupportedModelError, match="gate_up_proj"):
        require_own_names(spec)


ORACLES = (
    "AI21-Jamba-1.5-Mini",
    "ERNIE-4.5-21B-A3B-PT",
    "GLM-4.5V",
    "Llama-3.2-11B-Vision",
    "MiMo-V2-Flash",
    "MiniMax-M2.5",
    "MiniMax-M3",
    "Mixtral-8x7B-v0.1",
    "NVIDIA-Nemotron-3-Nano-30B-A3B-BF16",
    "Phi-3.5-MoE",
    "Qwen2-VL-7B",
    "Qwen2.5-VL-7B-Instruct",
    "Qwen3-VL-30B-A3B-Instruct",
    "gemma-3-4b-it",
    "granite-4.0-h-small",
    "llava-1.5-7b-hf",
)


def modules(config: dict[str, Any]) -> dict[str, Fake]:
    """The tensors of transformers' own module, on the meta device."""
    import torch
    import transformers

    values = {key: value for key, value in config.items() if key != "model_type"}
    hf_config = transformers.CONFIG_MAPPING[_KINDS.get(config["model_type"], config["model_type"])](
        **values
    )
    architecture = config["architectures"][0]
    with torch.device("meta"):
        model = getattr(transformers, _CLASSES.get(architecture, architecture))(hf_config)
    model.tie_weights()
    return {name: Fake(name, tuple(p.shape)) for name, p in model.named_parameters()}


_CLASSES = {
    "MiniMaxM3ForCausalLM": "MiniMaxM3VLForCausalLM",
    "MiniMaxM3SparseForCausalLM": "MiniMaxM3VLForCausalLM",
    "PhiMoEForCausalLM": "PhimoeForCausalLM",
}
_KINDS = {"minimax_m3": "minimax_m3_vl_text"}


@pytest.mark.parametrize("name", [name for name in ORACLES if name in MODELS])
def test_transformers_own_names(name: str) -> None:
    config = read_config(name)
    config = {key: value for key, value in config.items() if key != "quantization_config"}
    spec = model_spec(config)
    found, alias = aligned(spec, modules(config), "it")
    assert alias is not None
    warnings = check_sources(untied(spec, found), found, "it")
    assert not [w for w in warnings if "e_score_correction_bias" not in w]
