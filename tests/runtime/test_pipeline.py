"""Pipelines of stages, with and without tensor parallel ranks in them: what one rank gives."""

from collections.abc import Callable
from pathlib import Path

import pytest

from runtime.test_ranks import check, on_ranks
from support.work import write_shards

TinyModel = Callable[[str], Path]
MODELS = ("llama", "qwen2_tied", "gemma2", "mixtral", "qwen3_moe", "gpt2", "deepseek_v2")
SHARDED = ("qwen2_tied", "mixtral")
"""Of which there are rank files, too."""


@pytest.fixture(scope="module", params=[1, 2], ids=["two stages", "two stages of two ranks"])
def results(
    request: pytest.FixtureRequest,
    tiny_model: TinyModel,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Results for all models, from one launch; those of rank files are called `<model>-cut`."""
    size = request.param
    directory = tmp_path_factory.mktemp(f"ranks{size}")
    paths = [tiny_model(name) for name in MODELS]
    for name in SHARDED:
        paths.append(directory / f"{name}-cut")
        write_shards(tiny_model(name), paths[-1], size, pipeline_parallel_size=2)
    return on_ranks(2 * size, paths, directory, stages=2)


@pytest.mark.parametrize("name", MODELS)
def test_stages_give_what_one_rank_gives(name: str, tiny_model: TinyModel, results: Path) -> None:
    check(results, tiny_model(name))


@pytest.mark.parametrize("name", SHARDED)
def test_so_do_their_files(name: str, tiny_model: TinyModel, results: Path) -> None:
    check(results, tiny_model(name), f"{name}-cut")
