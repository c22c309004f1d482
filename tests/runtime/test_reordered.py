"""Plain matrices in oneDNN's order."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from runtime.ranks import open_session
from tightfit.runtime.layers import PlainMatrix
from tightfit.runtime.models.decoder import Decoder
from tightfit.runtime.quantized.reordered import ReorderedMatrix, has_reordering

pytestmark = pytest.mark.skipif(not has_reordering(), reason="this CPU or torch has no such kernel")


@pytest.mark.parametrize("shape", [(1, 8), (64, 64), (100, 72), (576, 1536), (4099, 17)])
@pytest.mark.parametrize("tokens", [0, 1, 3, 65])
def test_products_are_the_same(shape: tuple[int, int], tokens: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator).bfloat16()
    bias = torch.randn(shape[0], generator=generator).bfloat16()
    x = torch.randn(tokens, 2 * shape[1], generator=generator).bfloat16()[:, ::2]
    expected = [F.linear(x, weight), F.linear(x, weight, bias)]
    matrix = ReorderedMatrix(weight.clone())
    for found, wanted in zip([matrix(x), matrix(x, bias)], expected, strict=True):
        assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
        torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("name", ["llama", "gemma2", "deepseek_v2"])
def test_which_matrices_are_reordered(name: str, tiny_model: Callable[[str], Path]) -> None:
    path = tiny_model(name)
    for dtype, expected in (("F32", PlainMatrix), ("BF16", ReorderedMatrix)):
        decoder = open_session(path, dtype=dtype).engine.worker.decoder
        assert isinstance(decoder, Decoder)
        assert type(decoder.layers[0].mlp.down.matrix) is expected
        # A table that rows are looked up in too stays as it is.
        tied = decoder.spec.tie_word_embeddings
        assert type(decoder.lm_head) is (PlainMatrix if tied else expected)
