"""Grouped weights sum to what all weights sum to, on every rank."""

import pytest

from support.configs import read_spec
from tightfit.model.groups import grouped
from tightfit.model.layout import Parallel, on_rank
from tightfit.model.parameters import parameters

MODELS = ("DeepSeek-V3.2", "gpt-oss-20b-BF16", "Llama-4-Maverick-17B-128E-text", "gemma-2-2b-it")


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("size", "pp"), [(1, 1), (4, 1), (2, 3)])
def test_groups_sum_to_all_weights(name: str, size: int, pp: int) -> None:
    spec = read_spec(name)
    groups = grouped(spec, parameters(spec))
    assert len(groups) < len(parameters(spec)) / 5
    for rank in Parallel(tensor_parallel_size=size, pipeline_parallel_size=pp).ranks():
        each = [w.census(rank) for w in parameters(spec) if on_rank(w, rank, spec.num_layers)]
        counted = [(g.weight.census(rank), g.on_rank(rank, spec.num_layers)) for g in groups]
        assert sum(c.elements for c in each) == sum(c.elements * n for c, n in counted)
        assert sum(c.padding for c in each) == sum(c.padding * n for c, n in counted)
        assert sum(c.copies for c in each) == sum(c.copies * n for c, n in counted)
