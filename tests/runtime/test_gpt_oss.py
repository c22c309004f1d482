"""gpt-oss as it is published: experts in MXFP4, of any width, alone and on two ranks."""

import json
import shutil
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from runtime.ranks import PROMPTS, all_logits, open_session
from runtime.test_ranks import on_ranks
from support.configs import read_spec
from support.tiny_models import make_tiny_model
from support.work import write_shards
from tightfit.codecs.fp4 import MxFp4
from tightfit.model.layout import Parallel
from tightfit.model.parameters import plain_parameters
from tightfit.planner.assemble import make_plan
from tightfit.planner.devices import Device
from tightfit.planner.options import PlanOptions
from tightfit.runtime.loading.parameters import rank_parameters
from tightfit.units import GiB, dtype_bytes

SECTION = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
# On two ranks, one of them has half a block of zeros.
WIDTHS = {"even": 128, "odd": 96}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """By width: what the experts decode to, for transformers, and the experts in MXFP4."""
    found = {}
    for name, width in WIDTHS.items():
        root = tmp_path_factory.mktemp(name)
        decoded = make_tiny_model("gpt_oss", root / "plain", others={"intermediate_size": width})
        packed = root / name
        shutil.copytree(decoded, packed)
        tensors = load_file(decoded / "model.safetensors")
        plain, blocks = dict(tensors), dict(tensors)
        for key in tensors:
            if key.endswith(("gate_up_proj", "down_proj")):
                del blocks[key]
                plain[key], some = packed_experts(tensors[key])
                blocks |= {f"{key}_{kind}": tensor for kind, tensor in some.items()}
        save_file(plain, decoded / "model.safetensors", {"format": "pt"})
        save_file(blocks, packed / "model.safetensors", {"format": "pt"})
        config = json.loads((packed / "config.json").read_bytes())
        (packed / "config.json").write_text(json.dumps({**config, "quantization_config": SECTION}))
        found[name] = decoded, packed
    return found


def packed_experts(weight: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """What [experts, inputs, outputs] decodes to, and `blocks` and `scales` of it."""
    codec = MxFp4()
    stored = [codec.encode(matrix.contiguous()) for matrix in weight.float().mT]
    decoded = torch.stack([codec.decode(one) for one in stored]).mT
    return decoded.to(weight.dtype).contiguous(), {
        "blocks": torch.stack([one["weight_packed"].unflatten(-1, (-1, 16)) for one in stored]),
        "scales": torch.stack([one["weight_scale"] for one in stored]),
    }


@pytest.mark.parametrize("width", WIDTHS)
def test_logits_of_the_decoded_weights(
    width: str, models: dict[str, tuple[Path, Path]], reference: Callable[[Path], Any]
) -> None:
    decoded, packed = models[width]
    ours = all_logits(open_session(packed), PROMPTS[0])
    with torch.no_grad():
        theirs = reference(decoded)(torch.tensor([PROMPTS[0]])).logits[0]
    assert ours is not None
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-4)


def test_two_ranks(models: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    paths = []
    for _, packed in models.values():
        cut = tmp_path / f"{packed.name}-cut"
        write_shards(packed, cut, 2, layout="builtin")
        paths += [packed, cut]
    on_ranks(2, paths, tmp_path, only_logits=True)
    for path in paths:
        alone = all_logits(open_session(models[path.name.removesuffix("-cut")][1]), PROMPTS[0])
        cut = load_file(tmp_path / f"{path.name}.safetensors")["logits"]
        torch.testing.assert_close(cut, alone, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_weights_are_planned_to_the_byte(ranks: int) -> None:
    """The published 20B: 2,880 features are 90 blocks, of which 8 ranks get 12 each."""
    spec = read_spec("gpt-oss-20b")
    cpu = Device(name="cpu", total_bytes=64 * GiB, kind="cpu")
    options = PlanOptions(
        engine="builtin", device=cpu, tensor_parallel_size=ranks, max_model_len=1024
    )
    for planned in make_plan(spec, options, name="gpt-oss-20b").ranks:
        rank = Parallel(tensor_parallel_size=ranks, uneven=True).ranks()[planned.rank]
        held = rank_parameters(spec, plain_parameters(spec), rank, "BF16").tensors
        needed = sum(dtype_bytes(t.dtype, prod(t.shape)) for t in held)
        assert planned.component("weights").planned_bytes == needed
