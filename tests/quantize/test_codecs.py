"""What every codec promises, on matrices of all magnitudes."""

from collections.abc import Mapping

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tightfit.checkpoint.header import TensorInfo
from tightfit.codecs import Codec, codec
from tightfit.errors import CheckpointError
from tightfit.model.quantization.written import Choice
from tightfit.quantize.encoding import check_finite
from tightfit.quantize.matrices import Matrix

CHOICES: Mapping[str, Choice] = {
    **{
        name: Choice(scheme=name)
        for name in ("fp8-tensor", "fp8-channel", "fp8-block", "int8", "nvfp4a16", "mxfp4", "mxfp8")
    },
    **{
        f"{scheme} g{size}": Choice(scheme=scheme, group_size=size)
        for scheme in ("w8a16", "w4a16", "w4a16-asym")
        for size in (32, 128, -1)
    },
    "fp8-block (fp8)": Choice(scheme="fp8-block", format="fp8"),
    "w4a16 (gptq)": Choice(scheme="w4a16", group_size=64, format="gptq"),
    "w8a16 (gptq)": Choice(scheme="w8a16", group_size=-1, format="gptq"),
    "w4a16-asym (awq)": Choice(scheme="w4a16-asym", group_size=64, format="awq"),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SAFE_NAMES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F8_E4M3": torch.float8_e4m3fn,
    "I8": torch.int8,
    "I32": torch.int32,
    "I64": torch.int64,
    "U8": torch.uint8,
}
EVERY = pytest.mark.parametrize("name", CHOICES)
FEW = settings(max_examples=12)
COLUMNS = 256


@st.composite
def matrices(draw: st.DrawFn, *, rows: tuple[int, ...] = (8, 128, 200)) -> Tensor:
    """Float32 `[rows, 256]` of values that a checkpoint's dtype has, of any magnitude."""
    dtype = DTYPES[draw(st.sampled_from(sorted(DTYPES)))]
    count = draw(st.sampled_from(rows))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    matrix = torch.randn(count, COLUMNS, generator=generator)
    lowest, highest = (-20, 10) if dtype is torch.float16 else (-100, 60)
    matrix *= 2.0 ** draw(st.integers(lowest, highest))
    match draw(st.sampled_from(("plain", "outlier", "zero row", "one sign", "uneven"))):
        case "outlier":
            matrix[count // 2, 7] *= 30
        case "zero row":
            matrix[1] = 0
        case "one sign":
            matrix.abs_()
        case "uneven":
            matrix *= torch.logspace(-3, 0, count)[:, None]
    return matrix.to(dtype).float()


def encoded(coder: Codec, matrix: Tensor, *, search: bool = False) -> dict[str, Tensor]:
    return coder.encode(matrix.clone(), matrix.abs().amax(), search=search)


def spread(coder: Codec, stored: Mapping[str, Tensor], shape: torch.Size) -> Tensor:
    """The scale of each element."""
    _, scales = coder.unpack(stored)
    return coder.values(torch.ones(shape), type(scales)(factor=scales.factor, stored=scales.stored))


def half_steps(coder: Codec, name: str, size: Tensor, eps: float) -> Tensor:
    """How far rounding may move a value, `size` times its scale, in scales.

    Scales are rounded themselves, so that the grid may end a little below the largest value.
    """
    if "fp8" in name:
        return size / 16 + 2.0**-10
    if "fp4" in name:
        steps = torch.where(size < 2, 0.25, torch.where(size < 4, 0.5, 1.0))
        # e4m3's smallest scales are whole steps apart.
        return steps if name == "mxfp4" else torch.where(size > 6.4, 3.0, steps)
    codes = 2 ** getattr(coder, "bits", 8)
    return torch.full_like(size, 0.5 + codes * eps)


@EVERY
@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
@FEW
def test_error_is_within_half_a_step(name: str, dtype: str, data: st.DataObject) -> None:
    matrix = data.draw(matrices()).to(DTYPES[dtype]).float()
    assume(matrix.isfinite().all())
    coder = codec(CHOICES[name], DTYPES[dtype])
    stored = encoded(coder, matrix)
    scale = spread(coder, stored, matrix.shape)
    error = (coder.decode(stored) - matrix).abs()
    assert scale.isfinite().all()
    assert (scale > 0).all()
    eps = torch.finfo(DTYPES[dtype]).eps
    # Scales below the dtype's normal range are coarser.
    eps = eps if scale.min() >= torch.finfo(DTYPES[dtype]).tiny else 2.0**-5
    assert (error <= half_steps(coder, name, matrix.abs() / scale, eps) * scale * 1.0001).all()


@EVERY
@given(matrix=matrices())
@FEW
def test_values_of_codes_have_the_same_codes(name: str, matrix: Tensor) -> None:
    coder = codec(CHOICES[name], torch.bfloat16)
    codes, scales = coder.unpack(encoded(coder, matrix))
    again = coder.codes(coder.values(codes, scales).contiguous(), scales)
    assert torch.equal(again, codes)


@pytest.mark.parametrize("name", [n for n in CHOICES if "fp" in n and n != "mxfp8"])
@given(matrix=matrices())
@FEW
def test_what_was_decoded_gets_the_same_codes(name: str, matrix: Tensor) -> None:
    """Grids that end at the largest value; other scales reach half a step beyond."""
    # Below, NVFP4's scales of scales end.
    assume(matrix.abs().amax() > 1e-15)
    coder = codec(CHOICES[name], torch.bfloat16)
    codes, scales = coder.unpack(encoded(coder, matrix))
    decoded = coder.values(codes, scales).contiguous()
    amax = matrix.abs().amax() if name == "nvfp4a16" else decoded.abs().amax()
    codes_again, scales_again = coder.unpack(coder.encode(decoded, amax))
    assert torch.equal(codes_again, codes)
    torch.testing.assert_close(scales_again.factor, scales.factor, rtol=1e-6, atol=0)


@EVERY
@given(matrix=matrices(rows=(264, 384)), search=st.booleans())
@settings(max_examples=6)
def test_joined_pieces_are_the_whole(name: str, matrix: Tensor, search: bool) -> None:
    coder = codec(CHOICES[name], torch.bfloat16)
    pieces = [
        coder.encode(rows.clone(), matrix.abs().amax(), search=search)
        for rows in (matrix[:128], matrix[128:256], matrix[256:])
    ]
    assert 128 % coder.row_step == 0
    assert_same(coder.joined(pieces), encoded(coder, matrix, search=search))


@EVERY
@given(matrix=matrices(rows=(128,)))
@settings(max_examples=8)
def test_search_is_never_worse_than_nearest(name: str, matrix: Tensor) -> None:
    coder = codec(CHOICES[name], torch.bfloat16)
    matrix = matrix / matrix.abs().amax()
    nearest, searched = (encoded(coder, matrix, search=search) for search in (False, True))
    errors = []
    for stored in (nearest, searched):
        error = (coder.decode(stored) - matrix).double().square()
        errors.append(error.view(128, -1, coder.group_size or COLUMNS).sum(dim=-1))
    if coder.row_step == 128:
        errors = [error.sum(dim=0) for error in errors]
    assert (errors[1] <= errors[0] * (1 + 1e-5)).all()


@EVERY
@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros(name: str, dtype: str) -> None:
    coder = codec(CHOICES[name], DTYPES[dtype])
    stored = encoded(coder, torch.zeros(128, COLUMNS))
    assert coder.decode(stored).eq(0).all()
    assert spread(coder, stored, torch.Size((128, COLUMNS))).gt(0).all()


@EVERY
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("search", [False, True])
def test_smallest_values(name: str, dtype: str, search: bool) -> None:
    """Subnormals, of which quotients of scales would vanish."""
    coder = codec(CHOICES[name], DTYPES[dtype])
    info = torch.finfo(DTYPES[dtype])
    matrix = torch.full((128, COLUMNS), info.tiny * info.eps)
    matrix[::2] *= -3
    decoded = coder.decode(encoded(coder, matrix, search=search))
    assert decoded.isfinite().all()
    assert (decoded - matrix).abs().max() <= 8 * matrix.abs().max()


@EVERY
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("signs", [(1, 1), (-1, 1), (-1, -1)])
def test_largest_values(name: str, dtype: str, search: bool, signs: tuple[int, int]) -> None:
    """They stay finite in the dtype in which engines multiply."""
    coder = codec(CHOICES[name], DTYPES[dtype])
    largest = torch.finfo(DTYPES[dtype]).max / 2
    matrix = torch.full((128, COLUMNS), largest * 1e-3)
    matrix[:, ::32], matrix[:, 1::32] = (sign * largest for sign in signs)
    decoded = coder.decode(encoded(coder, matrix, search=search))
    assert decoded.to(DTYPES[dtype]).isfinite().all()
    assert (decoded - matrix).abs().max() <= 0.2 * largest


@EVERY
def test_one_outlier_costs_only_its_group(name: str) -> None:
    coder = codec(CHOICES[name], torch.bfloat16)
    matrix = torch.randn(128, COLUMNS, generator=torch.Generator().manual_seed(3))
    spoilt = matrix.clone()
    spoilt[3, 5] = 1e4
    decoded = coder.decode(encoded(coder, spoilt))
    assert decoded[3, 5] == pytest.approx(1e4, rel=0.2)
    if CHOICES[name].scheme in ("fp8-tensor", "nvfp4a16"):
        return
    before = coder.decode(encoded(coder, matrix))
    group = coder.group_size or COLUMNS
    assert torch.equal(decoded[:, group:], before[:, group:])
    if coder.row_step != 128:
        assert torch.equal(decoded[:3], before[:3])
        assert torch.equal(decoded[4:], before[4:])


@EVERY
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_stored_tensors_are_those_of_the_scheme(name: str, dtype: str) -> None:
    stored = encoded(codec(CHOICES[name], SAFE_NAMES[dtype]), torch.ones(128, COLUMNS))
    forms = [form for form in CHOICES[name].forms if form.stored and form.only != "experts"]
    expected = {form.kind: form.dtype or dtype for form in forms}
    # The group of each input is optional, and needed only where inputs are in another order.
    assert {kind: tensor.dtype for kind, tensor in stored.items()} == {
        kind: SAFE_NAMES[one] for kind, one in expected.items()
    }


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_no_scale_can_hold_is_refused(value: float) -> None:
    info = TensorInfo(
        name="a.weight", dtype="F32", shape=(4, 32), file="m.safetensors", offset=0, nbytes=512
    )
    matrix = Matrix(
        module="a",
        source=info,
        rows=4,
        columns=32,
        first=0,
        pitch=32,
        transposed=False,
        choice=CHOICES["int8"],
        outputs={},
        fused="a",
    )
    rows = torch.zeros(4, 32)
    rows[2, 3] = value
    with pytest.raises(CheckpointError, match=r"'a\.weight' in m\.\w+ holds (NaN|infinity)"):
        check_finite(rows, matrix)
    # Their sum overflows, and they are fine.
    check_finite(torch.full((4, 32), torch.finfo(torch.float32).max), matrix)


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for kind, tensor in found.items():
        other = expected[kind]
        assert (tensor.dtype, tensor.shape) == (other.dtype, other.shape), kind
        assert torch.equal(*(one.reshape(-1).view(torch.uint8) for one in (tensor, other))), kind
