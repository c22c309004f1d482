"""Typed access to `config.json`, with the old and the new spellings of its keys.

Only `families/` and this module read Hugging Face's config keys. Every accessor raises a
`ConfigError` that names the key and the value, so that a malformed config is a one-line message.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from tightfit.errors import ConfigError
from tightfit.units import TORCH_DTYPES

_LARGEST = 2**40
_MISSING: Any = object()


class Config:
    """A read-only view of one JSON object of a config, which knows its name for messages."""

    def __init__(self, values: Mapping[str, Any], *, name: str = "config.json") -> None:
        self._values = values
        self.name = name

    def has(self, key: str) -> bool:
        """Whether the key is there with a value other than null."""
        return self._values.get(key) is not None

    def mentions(self, key: str) -> bool:
        """Whether the key is there, be it null: `q_lora_rank: null` is not the default."""
        return key in self._values

    def raw(self, *keys: str, default: Any = None) -> Any:
        """The value of the first of `keys` that is present and not null."""
        for key in keys:
            if self._values.get(key) is not None:
                return self._values[key]
        return default

    def integer(
        self, *keys: str, default: Any = _MISSING, minimum: int = 1, maximum: int = _LARGEST
    ) -> int:
        """A whole number from `minimum` to `maximum`."""
        value = self._required(keys, default)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._wrong(keys, value, "a whole number")
        if not minimum <= value <= maximum:
            raise self._wrong(keys, value, f"at least {minimum} and of a possible size")
        return value

    def number(self, *keys: str, default: Any = _MISSING) -> float:
        """A finite number."""
        value = self._required(keys, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not _finite(value):
            raise self._wrong(keys, value, "a finite number")
        return float(value)

    def positive(self, *keys: str, default: Any = _MISSING) -> float:
        """A finite number above zero."""
        value = self.number(*keys, default=default)
        if value <= 0:
            raise self._wrong(keys, value, "above zero")
        return value

    def boolean(self, *keys: str, default: bool = False) -> bool:
        """True or false."""
        value = self.raw(*keys, default=default)
        if not isinstance(value, bool):
            raise self._wrong(keys, value, "true or false")
        return value

    def text(self, *keys: str, default: Any = _MISSING) -> str:
        """A string."""
        value = self._required(keys, default)
        if not isinstance(value, str):
            raise self._wrong(keys, value, "a string")
        return value

    def strings(self, key: str) -> tuple[str, ...]:
        """A list of strings; empty when the key is absent."""
        value = self.raw(key, default=())
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise self._wrong((key,), value, "a list of strings")
        if not all(isinstance(item, str) for item in value):
            raise self._wrong((key,), value, "a list of strings")
        return tuple(value)

    def integers(self, key: str) -> tuple[int, ...]:
        """A list of whole numbers; empty when the key is absent."""
        value = self.raw(key, default=())
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise self._wrong((key,), value, "a list of whole numbers")
        if not all(isinstance(item, int) and not isinstance(item, bool) for item in value):
            raise self._wrong((key,), value, "a list of whole numbers")
        return tuple(value)

    def numbers(self, key: str) -> tuple[float, ...]:
        """A list of finite numbers."""
        value = self._required((key,), _MISSING)
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise self._wrong((key,), value, "a list of numbers")
        for item in value:
            if isinstance(item, bool) or not isinstance(item, int | float) or not _finite(item):
                raise self._wrong((key,), value, "a list of finite numbers")
        return tuple(map(float, value))

    def section(self, key: str) -> "Config | None":
        """A nested object, or None when the key is absent."""
        value = self.raw(key)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise self._wrong((key,), value, "an object")
        return Config(value, name=f"{self.name}: {key}")

    def sections(self, key: str) -> "tuple[Config, ...]":
        """A list of nested objects; empty when the key is absent."""
        value = self.raw(key, default=())
        if not isinstance(value, Sequence) or not all(isinstance(v, Mapping) for v in value):
            raise self._wrong((key,), value, "a list of objects")
        return tuple(Config(v, name=f"{self.name}: {key}[{i}]") for i, v in enumerate(value))

    def without(self, *keys: str) -> "Config":
        """The same, as if these keys were absent."""
        kept = {key: value for key, value in self._values.items() if key not in keys}
        return Config(kept, name=self.name)

    def completed(self, outer: "Config", architecture: str) -> "Config":
        """A nested text config as if it stood alone, with what only the outer one says."""
        keys = ("dtype", "torch_dtype", "tie_word_embeddings")
        inherited = {key: outer.raw(key) for key in keys if outer.has(key)}
        values = {**inherited, **self._values, "architectures": [architecture]}
        return Config(values, name=self.name)

    def with_defaults(self, values: Mapping[str, Any]) -> "Config":
        """The same, with what a config class fills in where a key is absent or null."""
        given = {k: v for k, v in self._values.items() if v is not None or k not in values}
        return Config({**values, **given}, name=self.name)

    def as_architecture(self, name: str) -> "Config":
        """The same, as if it were of another architecture."""
        return Config({**self._values, "architectures": [name]}, name=self.name)

    def renamed(self, names: Mapping[str, str]) -> "Config":
        """The same, with values also under new names (given as new: old) where those are absent."""
        found = {new: self._values[old] for new, old in names.items() if self.has(old)}
        absent = {new: value for new, value in found.items() if not self.has(new)}
        return Config({**self._values, **absent}, name=self.name)

    def dtype(self) -> str:
        """The checkpoint's dtype in safetensors' spelling; float32 when it is not said."""
        value = self.text("dtype", "torch_dtype", default="float32").removeprefix("torch.")
        if value not in TORCH_DTYPES:
            raise self._wrong(("dtype", "torch_dtype"), value, f"one of {', '.join(TORCH_DTYPES)}")
        return TORCH_DTYPES[value]

    def _required(self, keys: tuple[str, ...], default: Any) -> Any:
        value = self.raw(*keys, default=default)
        if value is _MISSING:
            raise ConfigError(
                f"{self.name} lacks {keys[0]!r}",
                hint="is this the config.json of a complete Hugging Face checkpoint?",
            )
        return value

    def _wrong(self, keys: tuple[str, ...], value: Any, wanted: str) -> ConfigError:
        shown = repr(value)
        key = next((key for key in keys if self.has(key)), keys[0])
        return ConfigError(
            f"{self.name} has {key} = {shown[:60]}, which should be {wanted}",
            hint="correct the config.json, or download it again",
        )


def _finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:
        return False
