"""Read `quant_method: fp8` (DeepSeek, Qwen, AutoFP8) and `fbgemm_fp8` (Llama 3.1 405B)."""

from tightfit.errors import ConfigError
from tightfit.model.config import Config
from tightfit.model.quantization import schemes
from tightfit.model.quantization.forms import Form
from tightfit.model.quantization.matching import modules
from tightfit.model.quantization.modelopt import PLACEHOLDERS
from tightfit.model.quantization.recipe import Inputs, Recipe, Rule


def fp8(section: Config) -> Recipe:
    """Blocks with `weight_scale_inv`, or one `weight_scale` for each matrix.

    Scales are float32 on disk also where `scale_fmt` says that all are powers of two (`ue8m0`,
    DeepSeek V3.1).

    Raises:
        ConfigError: a value is malformed.
    """
    activations = section.text("activation_scheme", default="dynamic")
    if activations not in ("dynamic", "static"):
        raise ConfigError(
            f"quantization_config has activation_scheme = {activations!r}, which is neither "
            "dynamic nor static",
            hint="correct the config.json",
        )
    blocks = section.integers("weight_block_size")
    if blocks and (len(blocks) != 2 or min(blocks) < 1):
        raise ConfigError(
            f"quantization_config has weight_block_size = {list(blocks)}, not two sizes",
            hint="correct the config.json",
        )
    if blocks:
        forms = schemes.fp8_block(*blocks, scale="weight_scale_inv")
        name = f"fp8 (block {blocks[0]}x{blocks[1]})"
    else:
        forms = schemes.per_tensor(schemes.FP8, static=activations == "static")
        name = f"fp8 (tensor, {activations})"
    inputs = Inputs(dtype=schemes.FP8, group_size=blocks[1] if blocks else 0)
    ignored = section.strings("ignored_layers") or section.strings("modules_to_not_convert")
    return Recipe(
        name=name,
        rules=(Rule(forms=forms, everything=True, inputs=inputs),),
        ignored=modules(ignored),
        placeholders=PLACEHOLDERS,
        # vLLM dequantizes the keys of the lightning indexer.
        optional_sources=(
            r"\.[kvq]_scale$",
            r"\.output_scale$",
            r"\.indexer\.wk\.weight_scale_inv$",
        ),
    )


def fbgemm(section: Config) -> Recipe:
    """One float32 scale for each output; activations are quantized as they come.

    Raises:
        ConfigError: a value is malformed.
    """
    bound = Form(
        kind="input_scale_ub",
        dtype="F32",
        rows=0,
        columns=None,
        stored=False,
        shared=True,
        scalar=True,
        fill=section.number("activation_scale_ub", default=0.0),
    )
    forms = (*schemes.per_channel(schemes.FP8, static=False, scale_dtype="F32"), bound)
    return Recipe(
        name="fbgemm_fp8",
        rules=(Rule(forms=forms, everything=True, inputs=Inputs(dtype=schemes.FP8)),),
        # vLLM has no such method for experts.
        ignored=modules((*section.strings("modules_to_not_convert"), "experts")),
        optional_sources=(r"\.input_scale_ub$",),
    )
