"""Colours by kind of component: safe for the colour-blind, with enough contrast in both themes.

Six kinds rather than one colour per component, because nobody tells twenty hues apart; two shades
of each separate neighbours of one kind. A test computes the contrasts (WCAG 2.2: 3 for areas, 4.5
for text) and the distances under simulated protanopia, deuteranopia and tritanopia.
"""

from collections.abc import Mapping
from typing import NamedTuple


class Shade(NamedTuple):
    """One fill: its colour in the light and in the dark theme."""

    light: str
    dark: str


INK = Shade("#1a1d21", "#e8eaed")
MUTED = Shade("#5b626c", "#a2a9b4")
PAPER = Shade("#ffffff", "#15181d")
GRID = Shade("#d9dde2", "#343a43")
GOOD = Shade("#0a6b53", "#56cfae")
BAD = Shade("#b3261e", "#ff8a80")

FILLS: Mapping[str, Shade] = {
    "weights": Shade("#1b4f9c", "#4a8fe8"),
    "weights-2": Shade("#4d83cc", "#86b6f4"),
    "kv": Shade("#12866b", "#34b38d"),
    "kv-2": Shade("#0a6450", "#5fd3b1"),
    "step": Shade("#d9730d", "#f5b14c"),
    "step-2": Shade("#b0560a", "#d58a2b"),
    "buffers": Shade("#9a6fd0", "#c39cf7"),
    "buffers-2": Shade("#6d3fb0", "#9370d6"),
    "graphs": Shade("#8c1d59", "#cc3d8a"),
    "runtime": Shade("#8b919b", "#b4bbc6"),
    "runtime-2": Shade("#656c78", "#7f8794"),
}

_KINDS: Mapping[str, str] = {
    "weights": "weights",
    "weights_after_load": "weights-2",
    "lora": "weights-2",
    "kv_cache": "kv",
    "block_tables": "kv-2",
    "activations": "step",
    "logits_and_sampler": "step-2",
    "moe_workspace": "step",
    "vision_encoder": "step-2",
    "encoder_cache": "step",
    "persistent_buffers": "buffers",
    "cuda_graphs": "graphs",
    "non_torch": "runtime",
    "cuda_context": "runtime-2",
    "nccl": "runtime",
    "allocator_cache": "runtime-2",
    "process_baseline": "runtime",
    "loading_peak": "weights",
    "mm_processor_cache": "step",
    "pinned_buffers": "buffers",
    "cpu_offload": "weights-2",
    "kv_offload": "kv-2",
    "cpu_kv_cache": "kv",
}


def fill(component: str) -> str:
    """The fill of a component; one that is not known is like the runtime's own."""
    return _KINDS.get(component, "runtime")


def luminance(color: str) -> float:
    """Relative luminance of `#rrggbb` (WCAG 2.2)."""

    def linear(channel: int) -> float:
        value = channel / 255
        return value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4

    red, green, blue = (linear(int(color[i : i + 2], 16)) for i in (1, 3, 5))
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(first: str, second: str) -> float:
    """Contrast ratio of two colours, 1 to 21 (WCAG 2.2)."""
    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


def ink_on(color: str) -> str:
    """White or near black, whichever is easier to read on a fill."""
    return max("#ffffff", "#101216", key=lambda ink: contrast(color, ink))


def svg_rules(theme: int) -> str:
    """Plain CSS for one theme (0 light, 1 dark), for pictures whose viewers know no variables."""
    rules = [
        f".ink{{fill:{INK[theme]}}}.muted{{fill:{MUTED[theme]}}}.paper{{fill:{PAPER[theme]}}}",
        f".grid{{stroke:{GRID[theme]}}}.rule{{stroke:{INK[theme]}}}",
        f".seam{{stroke:{PAPER[theme]}}}.room{{fill:{PAPER[theme]};stroke:{MUTED[theme]}}}",
        f".good{{fill:{GOOD[theme]}}}.bad{{fill:{BAD[theme]}}}.badline{{stroke:{BAD[theme]}}}",
    ]
    for name, shade in FILLS.items():
        color = shade[theme]
        rules.append(f".f-{name}{{fill:{color}}}.i-{name}{{fill:{ink_on(color)}}}")
    return "".join(rules)


def page_variables() -> str:
    """The same colours as CSS variables that follow the page's `color-scheme`."""
    named = {"ink": INK, "muted": MUTED, "paper": PAPER, "grid": GRID, "good": GOOD, "bad": BAD}
    variables = [f"--{name}:light-dark({s.light},{s.dark})" for name, s in named.items()]
    rules = []
    for name, shade in FILLS.items():
        inks = ink_on(shade.light), ink_on(shade.dark)
        variables.append(f"--{name}:light-dark({shade.light},{shade.dark})")
        rules.append(f".f-{name}{{fill:var(--{name});background:var(--{name})}}")
        rules.append(f".i-{name}{{fill:light-dark({inks[0]},{inks[1]})}}")
    return ":root{" + ";".join(variables) + "}" + "".join(rules)
