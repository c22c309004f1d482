from typing import Any

import pytest
import torch

from tightfit.model.config import Config
from tightfit.model.families import decoder
from tightfit.runtime.rope import Rotation, inverse_frequencies, rope_table, rotate_

SCALINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 128},
    "yarn, all options": {
        "factor": 8.0,
        "original_max_position_embeddings": 128,
        "beta_fast": 24.0,
        "beta_slow": 2.0,
        "mscale": 1.0,
        "mscale_all_dim": 0.5,
        "truncate": False,
    },
    "longrope": {
        "short_factor": [1.0 + 0.1 * i for i in range(32)],
        "long_factor": [1.0 + i for i in range(32)],
        "original_max_position_embeddings": 128,
    },
}


@pytest.mark.parametrize("length", [128, 512, 1024])
@pytest.mark.parametrize("kind", SCALINGS)
def test_frequencies_are_those_of_transformers(kind: str, length: int) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope_type = kind.split(",")[0]
    parameters = {"rope_type": rope_type, "rope_theta": 10_000.0, **SCALINGS[kind]}
    config = LlamaConfig(
        hidden_size=256,
        num_attention_heads=4,
        max_position_embeddings=512,
        rope_parameters=parameters,
    )
    ours, factor = inverse_frequencies(decoder.rope(Config(config.to_dict()), 64), length)
    if rope_type == "default":
        theirs, their_factor = 10_000.0 ** (-torch.arange(0, 64, 2) / 64), 1.0
    else:
        theirs, their_factor = ROPE_INIT_FUNCTIONS[rope_type](config, CPU, seq_len=length)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    assert factor == pytest.approx(their_factor)


CPU = torch.device("cpu")


def test_rotation_is_by_position_and_leaves_the_other_features() -> None:
    rope = decoder.rope(Config({"partial_rotary_factor": 0.5}), 8)
    table = rope_table(rope, 16, torch.float32, CPU)
    x = torch.randn(16, 3, 8)
    rotated = x.clone()
    rotate_(rotated, Rotation(rows=table))
    angles = torch.arange(16)[:, None] * 10_000.0 ** (-torch.arange(2) / 2)
    pairs = torch.complex(x[..., :2], x[..., 2:4]) * torch.polar(torch.ones(16, 2), angles)[:, None]
    torch.testing.assert_close(rotated[..., :4], torch.cat([pairs.real, pairs.imag], dim=-1))
    assert torch.equal(rotated[..., 4:], x[..., 4:])


def test_neighbours_are_pairs_if_interleaved() -> None:
    rope = decoder.rope(Config({"partial_rotary_factor": 0.5}), 8)
    rows = rope_table(rope, 16, torch.float32, CPU)
    x = torch.randn(16, 3, 8)
    halves = x[..., [0, 2, 1, 3, 4, 5, 6, 7]]
    rotate_(x, Rotation(rows=rows, interleaved=True))
    rotate_(halves, Rotation(rows=rows))
    assert torch.equal(x[..., [0, 2, 1, 3, 4, 5, 6, 7]], halves)
