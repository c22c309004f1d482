"""The forms of every scheme: names, dtypes and blocks, as published formats have them.

Sources: vLLM 0.32 `model_executor/layers/quantization/` (`fp8.py`, `fbgemm_fp8.py`, `auto_gptq.py`,
`auto_awq.py`, `modelopt.py`, `mxfp4.py`, `compressed_tensors/schemes/`, each `create_weights`), and
compressed-tensors 0.17's compressors for what is on disk.
"""

from dataclasses import replace

from tightfit.errors import UnsupportedModelError
from tightfit.model.quantization.forms import Form, Forms

FP8 = "F8_E4M3"
_WORD_BITS = 32


def fp8_block(rows: int, columns: int, *, scale: str, dtype: str | None = "F32") -> Forms:
    """e4m3 with a scale for each block; DeepSeek's `weight_scale_inv` multiplies as well."""
    return (
        Form(kind="weight", dtype=FP8),
        Form(
            kind=scale,
            dtype=dtype,
            engine_dtype="F32",
            rows=rows,
            columns=columns,
            ragged=True,
        ),
    )


def per_tensor(
    dtype: str, *, static: bool, scale_dtype: str | None = "F32", symmetric: bool = True
) -> Forms:
    """One scale for each matrix, and one for its inputs if they are quantized statically.

    Args:
        dtype: of the values, `F8_E4M3` or `I8`.
        static: scales of activations are in the checkpoint.
        scale_dtype: of the scales on disk; engines hold float32.
        symmetric: activations have no zero points.
    """
    scale = Form(kind="weight_scale", dtype=scale_dtype, engine_dtype="F32", rows=0, columns=None)
    return (
        Form(kind="weight", dtype=dtype),
        scale,
        *_inputs(dtype, static, scale_dtype, symmetric),
    )


def per_channel(
    dtype: str, *, static: bool, scale_dtype: str | None = None, symmetric: bool = True
) -> Forms:
    """One scale for each output, `[rows, 1]`; arguments as of `per_tensor`."""
    scale = Form(kind="weight_scale", dtype=scale_dtype, engine_dtype="F32", columns=0)
    return (
        Form(kind="weight", dtype=dtype),
        scale,
        *_inputs(dtype, static, scale_dtype, symmetric),
    )


def _inputs(dtype: str, static: bool, scale_dtype: str | None, symmetric: bool) -> Forms:
    if not static:
        return ()
    int8 = dtype == "I8"
    scale = Form(
        kind="input_scale", dtype=scale_dtype, engine_dtype="F32", rows=0, columns=None, shared=int8
    )
    experts = Form(
        kind="input_scale",
        dtype=scale_dtype,
        engine_dtype="F32",
        rows=0,
        columns=None,
        shared=True,
        only="experts",
    )
    forms = (_only(scale, "linear"), experts)
    if symmetric:
        return forms
    zero = Form(kind="input_zero_point", dtype="I8", rows=0, columns=None, shared=True)
    return (*forms, zero)


def _only(form: Form, only: str) -> Form:
    return replace(form, only=only)


def pack_quantized(bits: int, group_size: int | None, *, symmetric: bool) -> Forms:
    """compressed-tensors' integers in 32-bit words along the inputs, for weights alone.

    Args:
        bits: of a value: 2, 4 or 8.
        group_size: inputs that share a scale; None for one scale for each output.
        symmetric: no zero points, which are packed along the outputs.

    Raises:
        UnsupportedModelError: values that do not fill words.
    """
    per_word = words(bits)
    group = group_size or 0
    shape = Form(kind="weight_shape", dtype="I64", rows=0, columns=None, count=2, shared=True)
    forms = (
        Form(kind="weight_packed", dtype="I32", columns=per_word),
        Form(kind="weight_scale", dtype=None, columns=group),
        _only(shape, "linear"),
        # vLLM makes these in the default dtype.
        replace(shape, engine_dtype="BF16", only="experts"),
    )
    if symmetric:
        return forms
    zero = Form(kind="weight_zero_point", dtype="I32", rows=per_word, columns=group)
    return (*forms, zero)


def gptq(bits: int, group_size: int | None, *, symmetric: bool) -> Forms:
    """GPTQ's words along the inputs, transposed; zero points are stored even where all are alike.

    Kernels drop those of symmetric weights. `g_idx` says which group an input is in.
    """
    per_word = words(bits)
    group = group_size or 0
    return (
        Form(kind="qweight", dtype="I32", columns=per_word, transposed=True),
        Form(
            kind="qzeros",
            dtype="I32",
            rows=per_word,
            columns=group,
            transposed=True,
            dropped=symmetric,
        ),
        Form(kind="scales", dtype=None, columns=group, transposed=True),
        Form(kind="g_idx", dtype="I32", rows=0, loaded=False, optional=True),
        # vLLM makes room for biases that some checkpoints have.
        Form(kind="bias", dtype=None, columns=None, stored=False, only="experts", dropped=True),
    )


def awq(bits: int, group_size: int | None, *, zero_point: bool) -> Forms:
    """AWQ's words along the outputs, transposed.

    vLLM makes zero points whether the checkpoint has them or not.
    """
    per_word = words(bits)
    group = group_size or 0
    return (
        Form(kind="qweight", dtype="I32", rows=per_word, transposed=True),
        Form(
            kind="qzeros",
            dtype="I32",
            rows=per_word,
            columns=group,
            transposed=True,
            optional=not zero_point,
        ),
        Form(kind="scales", dtype=None, columns=group, transposed=True),
    )


def nvfp4(*, activations: bool, modelopt: bool = False) -> Forms:
    """Two e2m1 values to a byte, an e4m3 scale for 16 of them, a float32 scale for all.

    Args:
        activations: inputs are quantized too, with a global scale of their own.
        modelopt: ModelOpt's names; its weight-only checkpoints may still have `input_scale`.
    """
    names = ("weight", "weight_scale_2", "input_scale")
    if not modelopt:
        names = ("weight_packed", "weight_global_scale", "input_global_scale")
    values, scale, inputs = names
    forms = (
        Form(kind=values, dtype="U8", columns=2),
        Form(kind="weight_scale", dtype=FP8, columns=16),
        Form(kind=scale, dtype="F32", rows=0, columns=None),
    )
    given = Form(kind=inputs, dtype="F32", rows=0, columns=None)
    if activations:
        return (*forms, given)
    # vLLM makes room for what old exports have, and what experts' kernels take.
    unused = replace(given, stored=False, dropped=True, fill=1.0)
    if not modelopt:
        return (*forms, replace(unused, only="experts"))
    linear = replace(unused, dtype=None, only="linear")
    return (*forms, linear, replace(unused, only="experts"))


def mxfp4() -> Forms:
    """Two e2m1 values to a byte, and an e8m0 scale for 32 of them (compressed-tensors)."""
    return (
        Form(kind="weight_packed", dtype="U8", columns=2),
        Form(kind="weight_scale", dtype="U8", columns=32),
    )


def mxfp4_blocks() -> Forms:
    """MXFP4 of gpt-oss's stacked experts: 16 bytes of 32 values are a dimension of their own."""
    return (
        Form(kind="blocks", dtype="U8", columns=2, nested=16, engine_kind="weight"),
        Form(kind="scales", dtype="U8", columns=32, engine_kind="weight_scale"),
    )


def mxfp8() -> Forms:
    """e4m3 with an e8m0 scale for 32 values along the inputs."""
    return (
        Form(kind="weight", dtype=FP8),
        Form(kind="weight_scale", dtype="U8", columns=32),
    )


def int8_experts() -> Forms:
    """vLLM's online int8 of experts: a float32 scale for each output, `w13_scale`."""
    return (
        Form(kind="weight", dtype="I8"),
        Form(kind="scale", dtype="F32", columns=0),
    )


def words(bits: int) -> int:
    """Values in a 32-bit word.

    Raises:
        UnsupportedModelError: they do not fill it.
    """
    if bits not in (2, 4, 8):
        raise UnsupportedModelError(
            f"quantized weights of {bits} bits are not modelled", hint="modelled: 2, 4 and 8 bits"
        )
    return _WORD_BITS // bits
