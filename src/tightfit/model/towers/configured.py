"""Media of a checkpoint that says itself how large its images and videos may become."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from tightfit.model.towers.base import Item, Media, Sizes, Tower
from tightfit.model.towers.qwen_media import Qwen2Media

_SCOPES = ("images_kwargs", "videos_kwargs", "media_proc_cfg")


@dataclass(frozen=True, slots=True, kw_only=True)
class Configured(Media):
    """Media whose settings are those of the checkpoint where the user gives none."""

    media: Media
    settings: Mapping[str, Any]

    def items(
        self, processor: Mapping[str, Any], max_tokens: int, sizes: Sizes, active: Collection[str]
    ) -> tuple[Item, ...]:
        """The items with both settings."""
        return self.media.items(overlaid(self.settings, processor), max_tokens, sizes, active)


def configured(tower: Tower, settings: Mapping[str, Any]) -> Media:
    """The media of a tower with the settings of its checkpoint.

    vLLM sizes the videos of Qwen2-VL and Qwen2.5-VL by the processor of images (`qwen2_vl.py:
    get_num_video_tokens`).
    """
    if isinstance(tower.media, Qwen2Media):
        images = settings.get("images_kwargs")
        settings = images if isinstance(images, Mapping) else settings
    return Configured(media=tower.media, settings=settings)


def overlaid(settings: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint's settings with the user's over them, which count for every modality.

    Objects such as `size` are merged by key; whatever the user gives without a scope is also taken
    for the scopes of the checkpoint.
    """
    merged = _over(settings, given)
    for scope in _SCOPES:
        nested, own = settings.get(scope), given.get(scope, {})
        if isinstance(nested, Mapping) and isinstance(own, Mapping):
            flat = {key: value for key, value in given.items() if key in nested}
            merged[scope] = _over(_over(nested, flat), own)
    return merged


def _over(settings: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    merged = {**settings, **given}
    for key in settings.keys() & given.keys():
        old, new = settings[key], given[key]
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            merged[key] = {**old, **new}
    return merged
