from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from runtime.ranks import MAX_TOKENS, PROMPTS, options
from tightfit.checkpoint.checkpoint import Checkpoint, open_checkpoint
from tightfit.errors import CheckpointError
from tightfit.model.families import model_spec
from tightfit.model.layout import Parallel, Rank, RankTensor
from tightfit.model.parameters import parameters
from tightfit.model.spec import ModelSpec
from tightfit.model.stored import rank_tensors, stored_layout
from tightfit.runtime.loading.loader import load_checkpoint, load_dummy, load_rank_files
from tightfit.runtime.options import SamplingParams
from tightfit.runtime.ranks.world import World
from tightfit.runtime.session import run_rank

TinyModel = Callable[[str], Path]
CPU = torch.device("cpu")
BUILTIN = stored_layout("builtin")


def expected(spec: ModelSpec, rank: Rank) -> tuple[RankTensor, ...]:
    return tuple(weight.rank_tensor(rank, spec.dtype) for weight in parameters(spec))


def open_model(path: Path) -> tuple[Checkpoint, ModelSpec]:
    checkpoint = open_checkpoint(str(path))
    return checkpoint, model_spec(checkpoint.config)


def load(path: Path, rank: Rank, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    checkpoint, spec = open_model(path)
    return load_checkpoint(checkpoint, expected(spec, rank), dtype=dtype, device=CPU)


def write_rank_files(path: Path, rank: Rank, out: Path) -> list[Path]:
    """A rank's tensors in two files, as `tightfit shard` names them."""
    _, spec = open_model(path)
    weights = load(path, rank)
    stored = {
        tensor.name: torch.ones(()) if tensor.parameter is None else weights[tensor.parameter]
        for tensor in rank_tensors(spec, rank, BUILTIN)
    }
    names = list(stored)
    files = []
    for part in range(2):
        file = out / f"model-rank-{rank.rank}-part-{part}.safetensors"
        save_file({name: stored[name] for name in names[part::2]}, file)
        files.append(file)
    return files


def mapped_from(tensor: torch.Tensor) -> str:
    """The file that the tensor's memory is a mapping of, or nothing."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        fields = line.split(maxsplit=5)
        start, stop = (int(x, 16) for x in fields[0].split("-"))
        if start <= tensor.data_ptr() < stop:
            return Path(fields[5]).name if len(fields) > 5 and fields[4] != "0" else ""
    raise AssertionError("not mapped")


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "gemma2", "olmo2", "llama_mqa"])
@pytest.mark.parametrize("size", [1, 2])
def test_rank_files_are_used_where_they_lie(
    name: str, size: int, tiny_model: TinyModel, tmp_path: Path
) -> None:
    path = tiny_model(name)
    _, spec = open_model(path)
    for rank in Parallel(tensor_parallel_size=size, uneven=True).ranks():
        files = write_rank_files(path, rank, tmp_path)
        tensors = rank_tensors(spec, rank, BUILTIN)
        weights = load_rank_files(files, tensors, dtype=torch.bfloat16, device=CPU)
        whole = load(path, rank)
        assert weights.keys() == whole.keys()
        for parameter, tensor in weights.items():
            assert torch.equal(tensor, whole[parameter]), parameter
            assert mapped_from(tensor).startswith("model-rank-"), parameter


def test_a_run_from_rank_files(
    tiny_model: TinyModel, tmp_path: Path, reference_tokens: Callable[[Path], list[list[int]]]
) -> None:
    path = tiny_model("qwen3_moe")
    checkpoint, spec = open_model(path)
    report = run_rank(
        checkpoint,
        spec,
        options(),
        world=World(),
        prompts=PROMPTS,
        sampling=SamplingParams(max_tokens=MAX_TOKENS, ignore_eos=True),
        rank_files=write_rank_files(path, Rank(), tmp_path),
    )
    assert report is not None
    assert [c.token_ids for c in report.completions] == reference_tokens(path)


def test_whole_tensors_of_a_checkpoint_are_not_copied(tiny_model: TinyModel) -> None:
    weights = load(tiny_model("llama"), Rank())
    assert mapped_from(weights["model.layers.0.self_attn.o_proj.weight"]) == "model.safetensors"
    assert mapped_from(weights["model.layers.0.self_attn.qkv_proj.weight"]) == ""


def test_writing_to_weights_leaves_the_file_alone(tiny_model: TinyModel) -> None:
    path = tiny_model("llama")
    before = (path / "model.safetensors").read_bytes()
    load(path, Rank())["model.norm.weight"].zero_()
    assert (path / "model.safetensors").read_bytes() == before


def test_weights_are_converted_to_the_dtype_of_computation(tiny_model: TinyModel) -> None:
    path = tiny_model("llama")
    for name, tensor in load(path, Rank(), torch.float32).items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, load(path, Rank())[name].float())
        break


def test_dummy_weights_are_reproducible(tiny_model: TinyModel) -> None:
    _, spec = open_model(tiny_model("mixtral"))
    tensors = expected(spec, Rank())
    one, two = (load_dummy(tensors, dtype=torch.bfloat16, device=CPU, seed=5) for _ in range(2))
    assert {t.parameter: t.shape for t in tensors} == {n: tuple(w.shape) for n, w in one.items()}
    assert all(torch.equal(one[name], two[name]) for name in one)


def change(path: Path, out: Path, name: str, tensor: torch.Tensor | None) -> Path:
    """A copy of a checkpoint with one tensor replaced or removed."""
    tensors = load_file(path / "model.safetensors")
    del tensors[name]
    if tensor is not None:
        tensors[name] = tensor
    (out / "config.json").write_bytes((path / "config.json").read_bytes())
    save_file(tensors, out / "model.safetensors")
    return out


def test_checkpoints_that_are_not_what_their_config_says(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    name = "model.layers.1.self_attn.k_proj.weight"
    for tensor, message in (
        (None, f"has no tensor '{name}'"),
        (torch.zeros(32, 128), r"has shape \[32, 128\], and its config.json implies \[64, 128\]"),
        (torch.zeros(64, 128, dtype=torch.int8), "has dtype I8, not F32, F16 or BF16"),
    ):
        path = change(tiny_model("llama"), tmp_path, name, tensor)
        with pytest.raises(CheckpointError, match=message):
            load(path, Rank())


def test_rank_files_that_are_not_of_this_rank(tiny_model: TinyModel, tmp_path: Path) -> None:
    path = tiny_model("llama")
    _, spec = open_model(path)
    half = Parallel(tensor_parallel_size=2).ranks()[0]
    tensors = rank_tensors(spec, Rank(), BUILTIN)
    halves = rank_tensors(spec, half, BUILTIN)
    files = write_rank_files(path, half, tmp_path)
    with pytest.raises(CheckpointError, match=r"has shape \[\d+, 128\], and this rank needs"):
        load_rank_files(files, tensors, dtype=torch.bfloat16, device=CPU)
    with pytest.raises(CheckpointError, match=r"part-0\.safetensors has no tensor"):
        load_rank_files(files[:1], halves, dtype=torch.bfloat16, device=CPU)
    with pytest.raises(CheckpointError, match=r"cannot read .*No such file"):
        load_rank_files([tmp_path / "none"], tensors, dtype=torch.bfloat16, device=CPU)
