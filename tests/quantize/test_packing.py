"""Bits are where other programs look for them: each layout read by a loop written from its text."""

import pytest
import torch
from torch import Tensor

from tightfit.codecs import codec
from tightfit.model.quantization.written import Choice

ROWS, COLUMNS, GROUP = 16, 64, 32
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@pytest.fixture
def matrix() -> Tensor:
    noise = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(5))
    return (noise * 0.1).to(torch.bfloat16).float()


def encode(matrix: Tensor, scheme: str, form: str = "compressed-tensors") -> dict[str, Tensor]:
    size = GROUP if scheme.startswith("w") else None
    coder = codec(Choice(scheme=scheme, group_size=size, format=form), torch.bfloat16)
    return coder.encode(matrix.clone(), matrix.abs().amax())


def field(word: Tensor, place: int, bits: int) -> int:
    """One of the values in a word, counted from the lowest bits."""
    return (int(word) >> (place * bits)) & (2**bits - 1)


def compare(matrix: Tensor, scheme: str, form: str, found: list[list[float]]) -> None:
    """With what the codec reads, and with the matrix itself."""
    size = GROUP if scheme.startswith("w") else None
    coder = codec(Choice(scheme=scheme, group_size=size, format=form), torch.bfloat16)
    read = torch.tensor(found, dtype=torch.float64)
    decoded = coder.decode(encode(matrix, scheme, form)).double()
    torch.testing.assert_close(decoded, read, rtol=1e-6, atol=0)
    assert (read - matrix).norm() / matrix.norm() < (0.01 if "8" in scheme else 0.15)


@pytest.mark.parametrize("scheme", ["w4a16", "w8a16", "w4a16-asym"])
def test_pack_quantized(matrix: Tensor, scheme: str) -> None:
    """Inputs in a row from the low bits on; zero points the same way, along outputs."""
    stored = encode(matrix, scheme)
    bits = int(scheme[1])
    per = 32 // bits
    assert stored["weight_shape"].tolist() == [ROWS, COLUMNS]

    def value(row: int, column: int) -> float:
        code = field(stored["weight_packed"][row, column // per], column % per, bits)
        zero = 2 ** (bits - 1)
        if "weight_zero_point" in stored:
            word = stored["weight_zero_point"][row // per, column // GROUP]
            zero = field(word, row % per, bits)
        return (code - zero) * float(stored["weight_scale"][row, column // GROUP])

    found = [[value(row, column) for column in range(COLUMNS)] for row in range(ROWS)]
    compare(matrix, scheme, "compressed-tensors", found)


@pytest.mark.parametrize("scheme", ["w4a16", "w8a16"])
def test_gptq(matrix: Tensor, scheme: str) -> None:
    """Transposed, and zero points are one more than is stored."""
    stored = encode(matrix, scheme, "gptq")
    bits = int(scheme[1])
    per = 32 // bits

    def value(row: int, column: int) -> float:
        group = int(stored["g_idx"][column])
        assert group == column // GROUP
        code = field(stored["qweight"][column // per, row], column % per, bits)
        zero = field(stored["qzeros"][group, row // per], row % per, bits) + 1
        return (code - zero) * float(stored["scales"][group, row])

    found = [[value(row, column) for column in range(COLUMNS)] for row in range(ROWS)]
    compare(matrix, scheme, "gptq", found)


def test_awq(matrix: Tensor) -> None:
    """Eight outputs to a word, of which the low bits have 0, 2, 4, 6, 1, 3, 5 and 7."""
    stored = encode(matrix, "w4a16-asym", "awq")
    place = {output: at for at, output in enumerate((0, 2, 4, 6, 1, 3, 5, 7))}

    def value(row: int, column: int) -> float:
        code = field(stored["qweight"][column, row // 8], place[row % 8], 4)
        zero = field(stored["qzeros"][column // GROUP, row // 8], place[row % 8], 4)
        return (code - zero) * float(stored["scales"][column // GROUP, row])

    found = [[value(row, column) for column in range(COLUMNS)] for row in range(ROWS)]
    compare(matrix, "w4a16-asym", "awq", found)


@pytest.mark.parametrize("scheme", ["nvfp4a16", "mxfp4"])
def test_fp4(matrix: Tensor, scheme: str) -> None:
    """The even column in the low bits, whose highest one is the sign."""
    stored = encode(matrix, scheme)
    size = 16 if scheme == "nvfp4a16" else 32

    def value(row: int, column: int) -> float:
        code = field(stored["weight_packed"][row, column // 2], column % 2, 4)
        scale = stored["weight_scale"][row, column // size]
        factor = (
            float(scale) / float(stored["weight_global_scale"])
            if scheme == "nvfp4a16"
            else 2.0 ** (int(scale) - 127)
        )
        return (-1 if code & 8 else 1) * E2M1[code & 7] * factor

    found = [[value(row, column) for column in range(COLUMNS)] for row in range(ROWS)]
    compare(matrix, scheme, "compressed-tensors", found)


def test_scales_of_eight_bits(matrix: Tensor) -> None:
    """e4m3 is as torch has it, with its scale beside it or as an exponent."""
    stored = encode(matrix, "mxfp8")
    for row, column in ((0, 0), (3, 31), (3, 32), (15, 63)):
        exponent = int(stored["weight_scale"][row, column // 32]) - 127
        value = float(stored["weight"][row, column].float()) * 2.0**exponent
        assert value == pytest.approx(float(matrix[row, column]), rel=0.07)
    stored = encode(matrix, "fp8-channel")
    value = float(stored["weight"][3, 32].float()) * float(stored["weight_scale"][3, 0])
    assert value == pytest.approx(float(matrix[3, 32]), rel=0.07)
