"""Patterns that name what is to stay as it is."""

import re

import pytest

from tightfit.model.quantization.leaving import ignoring, short_names
from tightfit.model.quantization.matching import may_explode

ATTENTION = [f"model.layers.{i}.self_attn.{part}_proj" for i in range(12) for part in "qkv"]
EXPERTS = [f"model.layers.{i}.mlp.experts.0.up_proj" for i in range(12)]
HEADS = ["lm_head", "model.vision.head", "model.layers.1.lm_head"]
FLAT = [f"model.layers.{i}.in_proj" for i in range(12)]
ALL = [*ATTENTION, *EXPERTS, *HEADS, *FLAT]


@pytest.mark.parametrize(
    ("modules", "pattern"),
    [
        (ATTENTION, r"self_attn\.(q_proj|k_proj|v_proj)$"),
        (ATTENTION[3:6], r"^model\.layers\.1\b.*self_attn\.(q_proj|k_proj|v_proj)$"),
        (EXPERTS, r"\.experts\."),
        ([EXPERTS[1], EXPERTS[3]], r"^model\.layers\.(1|3)\b.*\.experts\."),
        (HEADS[:1], r"^lm_head$"),
        (FLAT, r"in_proj$"),
        ([*FLAT[:1], *EXPERTS], r"^model\.layers\.0\b.*in_proj$|\.experts\."),
        (ALL, None),
    ],
)
def test_a_pattern_for_modules(modules: list[str], pattern: str | None) -> None:
    found = ignoring(modules, [name for name in ALL if name not in modules])
    assert pattern in (None, found)
    assert [name for name in ALL if re.search(found, name)] == [n for n in ALL if n in modules]
    assert not may_explode(found)


def test_short_names() -> None:
    assert short_names(ATTENTION[:4]) == tuple(f"model.layers.*.self_attn.{n}_proj" for n in "qkv")
