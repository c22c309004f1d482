"""The `quantization_config` of what `quantize` writes: what the readers of this package read again.

Names of modules become patterns without layer numbers wherever all layers agree, because engines
compare every module with every name. They match the end of a name: engines call models that are
inside others in several ways.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from tightfit.errors import UnsupportedModelError
from tightfit.model.config import Config
from tightfit.model.parameters import plain_parameters
from tightfit.model.quantization.readers import READERS
from tightfit.model.quantization.recipe import split_experts
from tightfit.model.quantization.written import (
    COMPRESSED_TENSORS,
    Choice,
    Decisions,
    Wish,
    matrices,
    module_name,
    written,
)
from tightfit.model.spec import ModelSpec

VERSION = "0.17.0"
"""Of compressed-tensors, whose description of a config this is."""

_TOKENS = {"num_bits": 8, "strategy": "token", "symmetric": True, "dynamic": True}
_FP4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
_WEIGHTS: Mapping[str, dict[str, Any]] = {
    "fp8-tensor": {"num_bits": 8, "type": "float", "strategy": "tensor"},
    "fp8-channel": {"num_bits": 8, "type": "float", "strategy": "channel"},
    "fp8-block": {
        "num_bits": 8,
        "type": "float",
        "strategy": "block",
        "block_structure": [128, 128],
    },
    "int8": {"num_bits": 8, "type": "int", "strategy": "channel"},
    "w8a16": {"num_bits": 8, "type": "int"},
    "w4a16": {"num_bits": 4, "type": "int"},
    "w4a16-asym": {"num_bits": 4, "type": "int", "symmetric": False},
    "nvfp4": {**_FP4, "scale_dtype": "torch.float8_e4m3fn"},
    "nvfp4a16": {**_FP4, "scale_dtype": "torch.float8_e4m3fn"},
    "mxfp4": {
        "num_bits": 4,
        "type": "float",
        "strategy": "group",
        "group_size": 32,
        "scale_dtype": "torch.uint8",
    },
    "mxfp8": {
        "num_bits": 8,
        "type": "float",
        "strategy": "group",
        "group_size": 32,
        "scale_dtype": "torch.uint8",
    },
}
_INPUTS: Mapping[str, dict[str, Any]] = {
    "fp8-tensor": {**_TOKENS, "type": "float"},
    "fp8-channel": {**_TOKENS, "type": "float"},
    "fp8-block": {**_TOKENS, "type": "float", "strategy": "group", "group_size": 128},
    "int8": {**_TOKENS, "type": "int"},
    "nvfp4": {**_FP4, "symmetric": True, "dynamic": "local", "scale_dtype": "torch.float8_e4m3fn"},
    "mxfp8": {
        **_TOKENS,
        "type": "float",
        "strategy": "group",
        "group_size": 32,
        "scale_dtype": "torch.uint8",
    },
}
_FORMATS: Mapping[str, str] = {
    "fp8-tensor": "float-quantized",
    "fp8-channel": "float-quantized",
    "fp8-block": "float-quantized",
    "int8": "int-quantized",
    "w8a16": "pack-quantized",
    "w4a16": "pack-quantized",
    "w4a16-asym": "pack-quantized",
    "nvfp4": "nvfp4-pack-quantized",
    "nvfp4a16": "nvfp4-pack-quantized",
    "mxfp4": "mxfp4-pack-quantized",
    "mxfp8": "mxfp8-quantized",
}


def section(
    spec: ModelSpec, wish: Wish, decisions: Decisions, others: Iterable[str] = ()
) -> dict[str, Any]:
    """The `quantization_config`.

    Args:
        spec: the model, unquantized.
        wish: what the user wanted.
        decisions: what became of each matrix.
        others: modules of matrices that the checkpoint holds and that are no part of the spec, such
            as those of layers that predict further tokens.

    Raises:
        UnsupportedModelError: the format has no words for the decisions.
    """
    found = _section(spec, wish, decisions, others)
    _check(spec, wish, found)
    return found


def _check(spec: ModelSpec, wish: Wish, section: Mapping[str, Any]) -> None:
    """Readers of the section know of every matrix what is written."""
    name = section["quant_method"]
    said = READERS[name](Config(section, name="quantization_config"), f"{spec.names.head}.weight")
    assert said is not None
    recipe = written(spec, wish)
    for weight in matrices(spec):
        if (forms := recipe.forms(weight)) != said.forms(weight):
            raise UnsupportedModelError(
                f"the format {wish.format} has no words to say that {weight.name} is "
                + ("left as it is" if forms is None else "quantized"),
                hint="--format compressed-tensors has",
            )


def _section(
    spec: ModelSpec, wish: Wish, decisions: Decisions, others: Iterable[str]
) -> dict[str, Any]:
    quantized = [name for name, choice in decisions.items() if choice is not None]
    kept = [name for name, choice in decisions.items() if choice is None]
    kept += [name for name in (*_never(spec), *others) if name not in decisions]
    if spec.names.head not in quantized:
        # A tied head is no tensor, and transformers has a module nevertheless.
        kept.append("lm_head")
    # Of experts the first stands for all.
    kept = list(dict.fromkeys(_FIRST_EXPERT.sub("0", name) for name in _called(kept)))
    match wish.format:
        case "fp8":
            # vLLM compares whole names, and knows no patterns here.
            return {
                "quant_method": "fp8",
                "activation_scheme": "dynamic",
                "fmt": "e4m3",
                "weight_block_size": [128, 128],
                "modules_to_not_convert": sorted({*kept, *_containers(kept)}),
            }
        case "gptq":
            return _gptq(spec, wish, kept, quantized)
        case "awq":
            return {
                "quant_method": "awq",
                "version": "gemm",
                "bits": 4,
                "group_size": wish.choices[0].group or -1,
                "zero_point": True,
                "lm_head": spec.names.head in quantized,
                # They match anywhere in a name, so that a router called `gate` stays off the list:
                # engines never quantize it.
                "modules_to_not_convert": [
                    name
                    for name in sorted({_EXPERT.sub("", name) for name in kept})
                    if not any(name in one for one in quantized)
                ],
            }
    towers = {module_name(p.source) for t in spec.towers for w in t.weights for p in w.parts}
    whole = {_top(name) for name in towers} - {_top(name) for name in quantized}
    kept = [name for name in kept if _top(name) not in whole]
    found = _compressed_tensors(spec, wish, decisions, kept)
    found["ignore"] += [rf"re:(.*\.)?{re.escape(top)}(\..*)?$" for top in sorted(whole)]
    return found


def _compressed_tensors(
    spec: ModelSpec, wish: Wish, decisions: Decisions, kept: list[str]
) -> dict[str, Any]:
    quantized = {name: choice for name, choice in decisions.items() if choice is not None}
    used = [choice for choice in wish.choices if choice in quantized.values()]
    groups = {}
    for number, choice in enumerate(used):
        mine = list(_called(name for name, one in quantized.items() if one == choice))
        # What is ignored may match as well.
        rest = [name for name, one in quantized.items() if one != choice]
        targets = ["Linear"] if len(used) == 1 else patterns(mine, rest)
        if spec.names.head in mine:
            # For vLLM it is no linear layer, and inside other models it has other names.
            targets = [one for one in targets if one != spec.names.head]
            targets.append(f"re:.*{re.escape(_last(spec.names.head))}$")
        groups[f"group_{number}"] = {
            "targets": targets,
            "weights": _arguments(choice),
            "input_activations": _INPUTS.get(choice.scheme),
            "output_activations": None,
            "format": _FORMATS[choice.scheme],
        }
    formats = {_FORMATS[choice.scheme] for choice in used}
    found: dict[str, Any] = {
        "quant_method": COMPRESSED_TENSORS,
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": patterns(kept, quantized),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "version": VERSION,
    }
    if wish.kv_cache:
        found["kv_cache_scheme"] = {
            "num_bits": 8,
            "type": "float",
            "strategy": "tensor",
            "symmetric": True,
            "dynamic": False,
        }
    return found


def _arguments(choice: Choice) -> dict[str, Any]:
    found = {"symmetric": True, "dynamic": False, **_WEIGHTS[choice.scheme]}
    if "strategy" not in found:
        found["strategy"] = "group" if choice.group else "channel"
        found["group_size"] = choice.group
    return found


def _gptq(spec: ModelSpec, wish: Wish, kept: list[str], quantized: list[str]) -> dict[str, Any]:
    choice = wish.choices[0]
    found: dict[str, Any] = {
        "quant_method": "gptq",
        "bits": int(choice.scheme[1]),
        "group_size": choice.group or -1,
        "sym": True,
        "desc_act": False,
        "checkpoint_format": "gptq",
        "lm_head": spec.names.head in quantized,
    }
    exceptions = [one for one in patterns(kept, quantized) if one != "lm_head"]
    exceptions += patterns(_containers(kept), _containers(quantized))
    if exceptions:
        found["dynamic"] = {f"-:{one.removeprefix('re:')}": {} for one in exceptions}
    return found


def _called(names: Iterable[str]) -> Iterator[str]:
    """The names, and those by which vLLM asks for modules that it calls otherwise."""
    for name in names:
        yield name
        for ours, theirs in _VLLM_NAMES:
            if ours.search(name):
                yield ours.sub(theirs, name)


def _containers(names: Iterable[str]) -> Iterator[str]:
    """Modules that hold experts: engines ask for them, and not for each expert."""
    return (_EXPERT.sub("", name) for name in names if _EXPERT.search(name))


def _never(spec: ModelSpec) -> Iterator[str]:
    """Matrices that no recipe can touch, and that engines hold in linear layers: routers."""
    able = {weight.name for weight in matrices(spec)}
    for weight in plain_parameters(spec):
        if weight.name not in able and weight.columns is not None and not weight.stacked:
            for part in split_experts(weight).parts:
                if part.source.endswith(".weight") and spec.names.embedding not in part.source:
                    yield module_name(part.source)


def _top(name: str) -> str:
    return _PREFIX.sub("", name).partition(".")[0]


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def patterns(names: Iterable[str], others: Iterable[str]) -> list[str]:
    """Patterns for names that match none of the others; names without numbers stay as they are."""
    others = tuple(others)
    found: dict[str, None] = {}
    for name in dict.fromkeys(names):
        tail = _PREFIX.sub("", name)
        if not re.search(r"\d", tail):
            found[name] = None
            continue
        exact = re.sub(r"(?<=experts\\\.)0(?=\\\.)", r"\\d+", re.escape(tail))
        wide = re.sub(r"\b\d+\b", r"\\d+", re.escape(tail))
        pattern = re.compile(f".*{wide}$")
        found[f"re:.*{exact if any(map(pattern.match, others)) else wide}$"] = None
    return list(found)


_PREFIX = re.compile(r"^(model\.)?(language_model\.)?(model\.)?")
_VLLM_NAMES = (
    (re.compile(r"\.mamba\."), ".mixer."),
    # `models/falcon_h1.py` counts them after the layers, and leaves out what they are in.
    (re.compile(r"layers\.(\d+)\.mamba\."), r"\1.mixer."),
    (re.compile(r"\.conv\."), ".short_conv."),
)
_FIRST_EXPERT = re.compile(r"(?<=\.experts\.)\d+(?=\.)")
_EXPERT = re.compile(r"(?<=\.experts)\.\d+\..*")
