"""What the commands say of directories of rank files: their layout is that of the files."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from support.cli import assert_error, tightfit
from support.work import write_shards

TinyModel = Callable[[str], Path]
GPU = ("--gpu", "h100-80gb")


@pytest.fixture
def stages(tiny_model: TinyModel, tmp_path: Path) -> Path:
    out = tmp_path / "in two stages"
    write_shards(tiny_model("llama"), out, 2, pipeline_parallel_size=2)
    return out


@pytest.fixture
def experts(tiny_model: TinyModel, tmp_path: Path) -> Path:
    out = tmp_path / "experts"
    write_shards(tiny_model("qwen3_moe"), out, 2, expert_parallel=True)
    return out


def test_commands_load_them_as_they_were_cut(stages: Path, experts: Path) -> None:
    for directory, flags in ((stages, "-pp 2"), (experts, "--enable-expert-parallel")):
        done = tightfit("plan", directory, *GPU, "--emit", "vllm")
        assert done.returncode == 0, done.stderr
        assert f"  {flags} \\\n" in done.stdout
        assert "  -tp 2 \\\n" in done.stdout
        assert "  --load-format sharded_state \\\n" in done.stdout


def test_plans_are_for_their_ranks(stages: Path) -> None:
    plan = json.loads(tightfit("plan", stages, *GPU, "--json").stdout)
    assert len(plan["ranks"]) == 4
    done = tightfit("plan", stages, *GPU, "--pipeline-parallel-size", "1")
    assert_error(done, 1, f"{stages} was sharded with pipeline_parallel_size = 2, not 1")
    done = tightfit("plan", stages, *GPU, "--sweep", "tensor_parallel_size=1,2")
    message = f"--sweep tensor_parallel_size=1,2: {stages} is sharded, for one layout"
    assert_error(done, 2, message)


def test_cutting_again_says_what_is_dropped(stages: Path, experts: Path, tmp_path: Path) -> None:
    done = tightfit("shard", stages, tmp_path / "a", "-tp", "2")
    assert "has 2 pipeline stages, and the output has one" in done.stderr
    done = tightfit("shard", experts, tmp_path / "b", "-tp", "2")
    assert "has whole experts on each rank, and the output has slices" in done.stderr
    done = tightfit("shard", experts, tmp_path / "c", "-tp", "2", "--enable-expert-parallel")
    assert done.stderr == ""


def test_commands_can_be_copied(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = tiny_model("llama")
    for layout, flags in (
        ("vllm-0.32", "--load-format sharded_state --tensor-parallel-size 2"),
        ("sglang-0.5", "--load-format sharded_state --tp-size 2"),
    ):
        out = tmp_path / f"a name with spaces {layout}"
        done = tightfit("shard", model, out, "-tp", "2", "--layout", layout)
        last = done.stdout.splitlines()[-1]
        assert last.startswith("next: ")
        assert last.endswith(f"'{out}' {flags}")


def test_verify_says_how_they_were_cut(stages: Path, experts: Path) -> None:
    assert "tensor parallel size 2, 2 pipeline stages in" in tightfit("verify", stages).stdout
    assert "2, whole experts on each rank in" in tightfit("verify", experts).stdout


def test_another_model_is_named_once(stages: Path, tiny_model: TinyModel) -> None:
    other = tiny_model("qwen3")
    message = (
        f"{other} is another model: its architectures are ['Qwen3ForCausalLM'], and those of "
        f"{stages} are ['LlamaForCausalLM']"
    )
    assert_error(tightfit("verify", stages, "--against", other), 1, message)
