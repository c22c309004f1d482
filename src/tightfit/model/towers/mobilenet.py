"""MobileNet V5 300M, the vision encoder of Gemma 3n: timm's `mobilenetv5_300m_enc`.

Its shapes are those of timm's `models/mobilenetv5.py`; vLLM runs timm's module, whole on every
rank. Every convolution has no bias except the first.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from tightfit.model.blocks.linear import norm, vector
from tightfit.model.layout import Weight
from tightfit.model.towers.vit import WHERE, convolution, parameter

STEM = 64
FUSED = 1920
FUSED_EXPANSION = 2
OUTPUT = 2048
"""Channels of the first convolution, and of the fusion of the last two stages."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Edge:
    """A 3 x 3 convolution that widens, and one that narrows."""

    outputs: int
    expansion: int = 4

    def weights(self, at: str, inputs: int) -> Iterator[Weight]:
        """`conv_exp`, `conv_pwl` and the norms after them."""
        inner = inputs * self.expansion
        yield from _convolved(f"{at}.conv_exp", f"{at}.bn1", inner, (inputs, 3, 3))
        yield from _convolved(f"{at}.conv_pwl", f"{at}.bn2", self.outputs, (inner, 1, 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class Inverted:
    """The universal inverted bottleneck: depthwise convolutions before and inside an MLP."""

    outputs: int
    expansion: int
    start: int = 0
    """Sides of the kernels of the two depthwise convolutions; 0 for none."""
    middle: int = 0

    def weights(self, at: str, inputs: int) -> Iterator[Weight]:
        """Up to four convolutions with a norm each, and the scale of the block."""
        inner = inputs * self.expansion
        for name, rows, kernel in (
            ("dw_start", inputs, (1, self.start, self.start)),
            ("pw_exp", inner, (inputs, 1, 1)),
            ("dw_mid", inner, (1, self.middle, self.middle)),
            ("pw_proj", self.outputs, (inner, 1, 1)),
        ):
            if kernel[1]:
                yield from _convolved(f"{at}.{name}.conv", f"{at}.{name}.bn", rows, kernel)
        yield vector(f"{at}.layer_scale.gamma", self.outputs, WHERE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Attended:
    """Attention whose heads share one key and one value, which may be convolved first."""

    outputs: int
    heads: int
    head_dim: int
    convolved: bool

    def weights(self, at: str, inputs: int) -> Iterator[Weight]:
        """Projections as 1 x 1 convolutions."""
        width = self.heads * self.head_dim
        yield from norm(f"{at}.norm", inputs, WHERE)
        yield parameter(f"{at}.attn.query.proj.weight", width, inputs, 1, 1)
        for name in ("key", "value"):
            part = f"{at}.attn.{name}"
            if self.convolved:
                yield from _convolved(f"{part}.down_conv", f"{part}.norm", inputs, (1, 3, 3))
            yield parameter(f"{part}.proj.weight", self.head_dim, inputs, 1, 1)
        yield parameter(f"{at}.attn.output.proj.weight", inputs, width, 1, 1)
        yield vector(f"{at}.layer_scale.gamma", self.outputs, WHERE)


STAGES: tuple[tuple[Edge | Inverted | Attended, ...], ...] = (
    (Edge(outputs=128),) * 3,
    (
        Inverted(outputs=256, expansion=6, start=3, middle=5),
        *(Inverted(outputs=256, expansion=4, start=side) for side in (5, 3, 5, 3)),
    ),
    (
        Inverted(outputs=640, expansion=6, start=5, middle=5),
        *(Inverted(outputs=640, expansion=4, start=5),) * 7,
        Inverted(outputs=640, expansion=1),
        *(
            Attended(outputs=640, heads=12, head_dim=64, convolved=True),
            Inverted(outputs=640, expansion=2),
        )
        * 14,
    ),
    (
        Inverted(outputs=1280, expansion=6, start=5, middle=5),
        *(
            Attended(outputs=1280, heads=16, head_dim=96, convolved=False),
            Inverted(outputs=1280, expansion=2),
        )
        * 19,
    ),
)


def mobilenet(prefix: str) -> Iterator[Weight]:
    """All parameters; `prefix` is the timm module."""
    yield from convolution(f"{prefix}.conv_stem.conv", rows=STEM, kernel=(3, 3, 3), bias=True)
    yield from norm(f"{prefix}.conv_stem.bn", STEM, WHERE)
    inputs = STEM
    for i, stage in enumerate(STAGES):
        for j, block in enumerate(stage):
            yield from block.weights(f"{prefix}.blocks.{i}.{j}", inputs)
            inputs = block.outputs
    at, inner = f"{prefix}.msfa.ffn", FUSED * FUSED_EXPANSION
    yield from _convolved(f"{at}.pw_exp.conv", f"{at}.pw_exp.bn", inner, (FUSED, 1, 1))
    yield from _convolved(f"{at}.pw_proj.conv", f"{at}.pw_proj.bn", OUTPUT, (inner, 1, 1))
    yield from norm(f"{prefix}.msfa.norm", OUTPUT, WHERE)


def _convolved(
    name: str, norm_name: str, rows: int, kernel: tuple[int, int, int]
) -> Iterator[Weight]:
    """A convolution and the norm after it."""
    yield from convolution(name, rows=rows, kernel=kernel, bias=False)
    yield from norm(norm_name, rows, WHERE)
