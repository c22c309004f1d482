"""Tiny quantized models, and what other packages make of them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.configs import read_config
from support.make_quantized_data import LLAMA
from tightfit.model.families import model_spec
from tightfit.model.layout import Rank
from tightfit.model.parameters import loaded_parameters, parameters
from tightfit.model.sources import source_shapes
from tightfit.model.spec import ModelSpec
from tightfit.units import dtype_bytes

DATA = json.loads((Path(__file__).parent.parent / "data/quantized.json").read_text())
GATE = "model.layers.0.mlp.gate."
_DTYPES = {
    "bfloat16": "BF16",
    "float32": "F32",
    "int32": "I32",
    "int64": "I64",
    "uint8": "U8",
    "int8": "I8",
    "float8_e4m3fn": "F8_E4M3",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensor:
    dtype: str
    shape: tuple[int, ...]

    @classmethod
    def read(cls, line: str) -> "Tensor":
        dtype, *shape = line.split()
        return cls(dtype=_DTYPES[dtype], shape=tuple(map(int, shape)))

    @property
    def nbytes(self) -> int:
        return dtype_bytes(self.dtype, self.elements)

    @property
    def elements(self) -> int:
        count = 1
        for extent in self.shape:
            count *= extent
        return count


def llama(section: object) -> ModelSpec:
    return model_spec({**LLAMA, "quantization_config": section})


def llama_8b(**section: Any) -> ModelSpec:
    return model_spec({**read_config("Llama-3.1-8B"), "quantization_config": section})


def groups(weights: Mapping[str, Any], inputs: object = None, **more: Any) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
        },
        **more,
    }


def stored(spec: ModelSpec) -> dict[str, Tensor]:
    dtypes = {p.source: w.dtype or spec.dtype for w in parameters(spec) for p in w.parts}
    return {
        name: Tensor(dtype=dtypes[name], shape=shape) for name, shape in source_shapes(spec).items()
    }


def loaded_bytes(spec: ModelSpec, rank: Rank | None = None, *, settled: bool = False) -> int:
    return sum(
        dtype_bytes(w.held_dtype(spec.dtype), w.census(rank or Rank()).elements)
        for w in loaded_parameters(spec)
        if not (settled and w.dropped)
    )
