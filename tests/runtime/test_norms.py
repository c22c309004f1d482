import pytest
import torch

from tightfit.runtime.models.norms import LayerNorm


@pytest.mark.parametrize("kind", ["plain", "bias", "unit offset", "heads", "no weight"])
def test_layer_norms_at_once_and_by_rows(kind: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(600, 3, 32) if kind == "heads" else torch.randn(600, 32)
    weight = None if kind == "no weight" else torch.randn(x.shape[1:])
    norm = LayerNorm(
        weight,
        torch.randn(32) if kind == "bias" else None,
        eps=1e-5,
        unit_offset=kind == "unit offset",
    )
    centered = x - x.mean(dim=-1, keepdim=True)
    expected = centered / (centered.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()
    if weight is not None:
        expected = expected * (weight + 1 if kind == "unit offset" else weight)
    if norm.bias is not None:
        expected = expected + norm.bias
    torch.testing.assert_close(norm(x), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(norm.at_once(x), expected, atol=1e-5, rtol=1e-5)
