"""How Qwen-VL's processors and their kin choose the size of an image or a video.

Sources: transformers' `smart_resize` of Qwen2-VL, Qwen3-VL (videos) and GLM-4V, and vLLM's
`qwen2_vl.py: get_image_size_with_most_features`. Sizes are `(height, width)` in pixels.
"""

from collections.abc import Mapping
from math import ceil, floor, isqrt, sqrt
from typing import Any

from tightfit.errors import UsageError
from tightfit.model.towers.base import whole_number

MAX_ASPECT_RATIO = 200


def smart_resize(
    height: int,
    width: int,
    *,
    factor: int,
    min_pixels: int,
    max_pixels: int,
    frames: int = 1,
    temporal: int = 1,
) -> tuple[int, int]:
    """The nearest multiples of `factor` whose pixels, over all frames, are within the bounds.

    Raises:
        UsageError: an aspect ratio that the processor refuses.
    """
    if temporal > 1 and min(height, width) < factor:
        scale = max(factor / height, factor / width)
        height, width = int(height * scale), int(width * scale)
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise UsageError(
            f"an image of {width} x {height} pixels has an aspect ratio above {MAX_ASPECT_RATIO}",
            hint="choose another width or height in --limit-mm-per-prompt",
        )
    rows, columns = round(height / factor) * factor, round(width / factor) * factor
    padded = round(frames / temporal) * temporal
    pixels = frames * height * width
    if padded * rows * columns > max_pixels:
        beta = sqrt(pixels / max_pixels)
        return (
            max(factor, floor(height / beta / factor) * factor),
            max(factor, floor(width / beta / factor) * factor),
        )
    if padded * rows * columns < min_pixels:
        beta = sqrt(min_pixels / pixels)
        return ceil(height * beta / factor) * factor, ceil(width * beta / factor) * factor
    return rows, columns


def largest_image(max_pixels: int, unit: int) -> tuple[int, int]:
    """The size with the most squares of `unit` pixels, at an allowed aspect ratio."""
    for squares in range(max_pixels // unit**2, 0, -1):
        short = next(d for d in range(isqrt(squares), 0, -1) if squares % d == 0)
        if squares // short <= MAX_ASPECT_RATIO * short:
            return short * unit, squares // short * unit
    return unit, unit


def pixel_bounds(
    settings: Mapping[str, Any], default_min: int, default_max: int
) -> tuple[int, int]:
    """`min_pixels` and `max_pixels`, or the edges of `size` (`qwen2_vl.py: _get_vision_size`).

    Raises:
        UsageError: bounds that are not numbers, or lie the wrong way round.
    """
    size = settings.get("size")
    edges = size if isinstance(size, Mapping) else {}
    smallest = whole_number(edges, "shortest_edge", default_min)
    largest = whole_number(edges, "longest_edge", default_max)
    smallest = whole_number(settings, "min_pixels", smallest)
    largest = whole_number(settings, "max_pixels", largest)
    if largest > _MOST_PIXELS:
        raise UsageError(
            f"the processor's max_pixels = {largest} is out of range",
            hint=f"at most {_MOST_PIXELS}; see --mm-processor-kwargs",
        )
    return min(smallest, largest), largest


_MOST_PIXELS = 2**34
