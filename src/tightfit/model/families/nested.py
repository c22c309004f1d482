"""Decoders inside multimodal checkpoints, whose modules have other names there."""

from dataclasses import replace

from tightfit.model.layout import Weight
from tightfit.model.spec import ModelSpec
from tightfit.model.towers.base import Tower


def nested(
    spec: ModelSpec, inner: str, head: str, towers: tuple[Tower, ...], *, verified: bool = False
) -> ModelSpec:
    """The decoder with `model.` called `inner.`, its `lm_head` called `head`, and towers.

    `verified` says that vLLM's names of all of it are known (`stored.media`).
    """

    def name(old: str) -> str:
        return f"{inner}.{old.removeprefix('model.')}"

    def renamed(weight: Weight) -> Weight:
        parts = tuple(replace(part, source=name(part.source)) for part in weight.parts)
        return replace(weight, name=name(weight.name), parts=parts)

    names = spec.names
    return replace(
        spec,
        names=replace(
            names,
            embedding=name(names.embedding),
            layers=name(names.layers),
            norm=None if names.norm is None else name(names.norm),
            head=head,
        ),
        extras=tuple(map(renamed, spec.extras)),
        towers=towers,
        verified_for_sharding=verified,
    )
