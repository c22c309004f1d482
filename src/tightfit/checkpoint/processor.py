"""What a checkpoint says of the sizes of its images, videos and clips, in files beside its config.

The priority is that of transformers (`get_image_processor_dict`, `get_video_processor_dict`): a
section of `processor_config.json` before the file of that processor alone. Old checkpoints have
one file for both images and videos, and then it counts for both.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tightfit.checkpoint.files import read_config
from tightfit.checkpoint.source import Source
from tightfit.model.spec import ModelSpec
from tightfit.model.towers.configured import configured

PROCESSOR = "processor_config.json"
IMAGES = "preprocessor_config.json"
VIDEOS = "video_preprocessor_config.json"

_SECTIONS = {
    "images_kwargs": ("image_processor", IMAGES),
    "videos_kwargs": ("video_processor", VIDEOS),
}
_EDGES = {"min_pixels": "shortest_edge", "max_pixels": "longest_edge"}


def with_processor(spec: ModelSpec, source: Source) -> ModelSpec:
    """The spec, whose encoders' media have the settings of the checkpoint.

    Raises:
        ConfigError: a file of the processor is not a JSON object, or is larger than any is.
    """
    settings = read_processor(source) if spec.towers else {}
    if not settings:
        return spec
    towers = (replace(tower, media=configured(tower, settings)) for tower in spec.towers)
    return replace(spec, towers=tuple(towers))


def read_processor(source: Source) -> dict[str, Any]:
    """The settings as one object of the shape of `mm_processor_kwargs`.

    Those of images are at its top, and in `images_kwargs` where videos have their own in
    `videos_kwargs`. `min_pixels` and `max_pixels` become edges of `size`, as Qwen2-VL's processor
    does it.

    Raises:
        ConfigError: a file is not a JSON object, or is larger than any is.
    """
    common = _read(source, PROCESSOR)
    found: dict[str, dict[str, Any]] = {}
    for scope, (section, file) in _SECTIONS.items():
        nested = common.pop(section, None)
        given = nested if isinstance(nested, Mapping) else _read(source, file)
        if settings := _as_size({k: v for k, v in given.items() if v is not None}):
            found[scope] = settings
    images = found.get("images_kwargs", {})
    if "videos_kwargs" not in found:
        return {**common, **images}
    # A size at the top would count for videos that state none.
    return {**common, **{k: v for k, v in images.items() if k != "size"}, **found}


def _read(source: Source, name: str) -> dict[str, Any]:
    return read_config(source, name) if source.exists(name) else {}


def _as_size(settings: dict[str, Any]) -> dict[str, Any]:
    edges = {_EDGES[key]: settings.pop(key) for key in _EDGES if key in settings}
    if edges:
        size = settings.get("size")
        settings["size"] = {**(size if isinstance(size, Mapping) else {}), **edges}
    return settings
