"""vLLM quantizes exactly the modules that `quantize` has quantized, and loads what it wrote.

Kernels are not chosen, because most are for GPUs: what is compared is the state before they
rearrange it. That it is the same from rank files says that all of the plain checkpoint was loaded.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from support.tiny_models import make_tiny_model
from support.vllm_answers import ask
from support.wishes import CHOICES, WISHES, mixed
from support.work import write_shards
from tightfit.checkpoint.checkpoint import open_checkpoint
from tightfit.checkpoint.describe import describe
from tightfit.checkpoint.header import TensorInfo
from tightfit.cli.output import NoProgress
from tightfit.model.quantization.written import Wish
from tightfit.model.spec import ModelSpec
from tightfit.quantize.job import prepare
from tightfit.quantize.write import write, write_job
from tightfit.sharding.rank_files import open_rank_files

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

KEPT: Mapping[str, Wish] = {
    "kept layer": Wish(default=CHOICES["fp8-channel"], rules=((r"layers\.1\.", None),)),
    "kept experts": Wish(default=CHOICES["w4a16 g32 (gptq)"], rules=((r"\.experts\.", None),)),
    "blocks of experts": Wish(default=None, rules=((r"\.experts\.", CHOICES["fp8-block (fp8)"]),)),
    "only attention": Wish(
        default=CHOICES["w4a16-asym g32 (awq)"], rules=((r"\.experts\.", None),)
    ),
}
CASES = [
    *(
        ("llama", label, size)
        for label in ("fp8-channel", "mixed", "kept layer")
        for size in (1, 2)
    ),
    *(("mixtral", label, 2) for label in ("int8", "w4a16 g32", "mxfp8", "mixed")),
    *(("qwen3_moe", label, 2) for label in ("fp8-channel", "nvfp4a16", "mxfp4", "mixed")),
    *(("mixtral", label, 1) for label in ("kept experts", "only attention", "blocks of experts")),
    ("granitemoe", "w4a16 g32", 2),
    ("granitemoe", "mixed", 1),
    ("granitemoeshared", "int8", 2),
    ("granitemoehybrid", "fp8-channel", 1),
    ("llama4", "fp8-channel", 2),
    ("deepseek_v3", "int8", 2),
    ("deepseek_v3", "mixed", 1),
    ("qwen3_next", "fp8-channel", 2),
    ("falcon_h1", "fp8-channel", 1),
    ("gemma3", "w8a16 g32", 2),
    ("qwen2_tied", "w4a16 g32 (gptq)", 2),
    ("qwen2", "w4a16-asym g32 (awq)", 2),
    ("phi3", "fp8-tensor", 2),
    ("qwen2_5_vl", "fp8-channel", 2),
    ("qwen3_vl", "mixed", 1),
    ("qwen3_vl_moe", "fp8-channel", 2),
    ("gemma3_mm", "w4a16-asym g32", 2),
    ("mistral3", "fp8-channel", 1),
    ("whisper", "int8", 2),
]
UNUSED = ("input_scale", "input_global_scale")
"""Of schemes for weights alone: vLLM makes room for them, and leaves there what was in memory."""
Answer = dict[str, Any]
Case = tuple[str, str, int]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("written")
    for name, label, size in CASES:
        model, out = directory / name, directory / _called(name, label)
        if not model.exists():
            make_tiny_model(name, model)
        if not out.exists():
            checkpoint = open_checkpoint(str(model))
            job = prepare(checkpoint, wish_of(label, describe(checkpoint).spec))
            write(write_job(job, max_shard_bytes=10**9), out, NoProgress())
        write_shards(out, Path(f"{out}-tp{size}"), size)
    return directory


def wish_of(label: str, spec: ModelSpec) -> Wish:
    return mixed(spec) if label == "mixed" else KEPT.get(label) or WISHES[label]


def _called(name: str, label: str) -> str:
    return f"{name}-{label}".replace(" ", "_").replace("(", "").replace(")", "")


@pytest.fixture(scope="module")
def answers(directory: Path) -> dict[Case, Answer]:
    """One vLLM process builds all models."""
    jobs = []
    for name, label, size in CASES:
        path = directory / _called(name, label)
        jobs.append(
            {"directory": str(path), "tp": size, "kernels": False, "sharded": f"{path}-tp{size}"}
        )
    return dict(zip(CASES, ask("state_jobs.py", jobs, directory), strict=True))


@pytest.mark.parametrize(("name", "label", "size"), CASES)
def test_state(
    answers: dict[Case, Answer], directory: Path, name: str, label: str, size: int
) -> None:
    answer = answers[name, label, size]
    assert "error" not in answer, answer["error"]
    out = f"{directory / _called(name, label)}-tp{size}"
    ranks = open_rank_files(open_checkpoint(out))
    for rank, state in enumerate(answer["states"]):
        found: dict[str, TensorInfo] = {}
        for file, header in ranks.files.items():
            if file.startswith(f"model-rank-{rank}-"):
                found |= header
        assert {one: list(info.shape) for one, info in found.items()} == {
            one: shape for one, (shape, *_) in state.items()
        }
    alone = "a16" in label
    for names in answer["different"]:
        assert [one for one in names if not (alone and one.endswith(UNUSED))] == []
