"""The `config.json` files of published models, of every architecture that tightfit models."""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from tightfit.model.families import model_spec
from tightfit.model.spec import ModelSpec

DIRECTORY = Path(__file__).parents[1] / "data" / "configs"
MODELS = tuple(sorted(path.stem for path in DIRECTORY.glob("*.json")))


def read_config(name: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((DIRECTORY / f"{name}.json").read_bytes())
    return document


@lru_cache
def read_spec(name: str) -> ModelSpec:
    return model_spec(read_config(name))


ONE_PER_ARCHITECTURE = tuple({read_config(n)["architectures"][0]: n for n in MODELS}.values())
