"""Errors of quantized models that never were, for pages and tables."""

from tightfit.model.quantization.written import Choice, Wish
from tightfit.quantize.budget import FittedRecipe
from tightfit.quantize.candidates import Group, Option
from tightfit.quantize.places import Where
from tightfit.quantize.quality import Figures, MatrixQuality, Quality

FP8 = Choice(scheme="fp8-channel")


def quality(layers: int = 3, name: str = "m", error: float = 0.01) -> Quality:
    matrices = [
        MatrixQuality(
            module=f"{name}.layers.{layer}.{part}",
            where=Where(kind=kind, layer=layer),
            scheme="w4a16 g64",
            figures=Figures(
                parameters=1000,
                squared_error=error * (layer + 1),
                squared_norm=1.0,
                largest_error=0.125,
                clipped=5,
            ),
            worst=((17, 0.25), (3, 0.125)),
            scales={-7: 4, -5: 12},
        )
        for layer in range(layers)
        for part, kind in (("self_attn.q_proj", "attention"), ("mlp.up_proj", "mlp"))
    ]
    return Quality(model=name, scheme="w4a16 g64", method="rtn", matrices=tuple(matrices))


def recipe(name: str = "model") -> FittedRecipe:
    kept = Option(choice=None, total_bytes=100 << 20, squared_error=0.0, damage=0.0)
    small = Option(choice=FP8, total_bytes=50 << 20, squared_error=0.01, damage=0.1)
    groups = [
        Group(
            name=f"{name}.layers.{layer}.self_attn.qkv_proj",
            modules=(f"{name}.layers.{layer}.self_attn.q_proj",),
            where=Where(kind="attention", layer=layer),
            parameters=1000,
            squared_norm=1.0,
            options=(small, kept),
        )
        for layer in range(3)
    ]
    return FittedRecipe(
        wish=Wish(default=None, rules=(("x", FP8),)),
        budget_bytes=250 << 20,
        total_bytes=200 << 20,
        smallest_bytes=150 << 20,
        decisions=tuple(zip(groups, (small, small, kept), strict=True)),
    )
