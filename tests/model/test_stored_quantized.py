"""The tensors of quantized rank files, held against those that vLLM makes room for."""

import json

import pytest

from support.make_quantized_data import EXPERTS, LLAMA
from support.quantized import DATA, GATE, Tensor
from tightfit.model.families import model_spec
from tightfit.model.layout import Parallel, Rank
from tightfit.model.pieces import Piece, RankTensor, element
from tightfit.model.stored import DEFAULT_LAYOUT, rank_tensors, stored_layout

BUFFERS = ("._k_scale", "._v_scale", "._q_scale", "._prob_scale")


@pytest.mark.parametrize("case", DATA["held"])
def test_names_and_shapes(case: str) -> None:
    """Of the layers on rank 0 of 2."""
    name, _, model = case.rpartition(", ")
    section = json.loads(json.dumps(DATA["sections"][name]))
    if "config_groups" in section:
        section["ignore"].append(GATE.strip("."))
    base = LLAMA if model == "dense" else EXPERTS
    spec = model_spec({**base, "quantization_config": section})
    rank = Rank(parallel=Parallel(tensor_parallel_size=2))
    ours = {
        tensor.name: tensor.shape
        for tensor in rank_tensors(spec, rank, stored_layout(DEFAULT_LAYOUT))
        if ".layers." in tensor.name
        and "norm" not in tensor.name
        and not tensor.name.endswith((*BUFFERS, ".gate.weight"))
    }
    theirs = {
        key: Tensor.read(line).shape
        for key, line in DATA["held"][case].items()
        if ".gate." not in key
    }
    assert ours == theirs


def piece(source: str, at: int = 0) -> Piece:
    return Piece(source=source, source_shape=(1,), start=(0,), shape=(1,), at=(at,))


def test_the_first_source_that_is_there() -> None:
    tensor = RankTensor(
        name="k_scale",
        parameter="k_scale",
        dtype="F32",
        shape=(1,),
        pieces=(piece("a"), piece("b"), piece("c")),
        fill=1.0,
        optional=True,
    )
    assert tensor.settled({}).pieces == ()
    assert tensor.settled({}).fill == 1.0
    found = tensor.settled({"c": (1,), "b": ()})
    assert [p.source for p in found.pieces] == ["b"]
    assert (found.pieces[0].view, found.pieces[0].source_shape, found.fill) == ((1,), (), 0.0)


def test_elements() -> None:
    assert element(-1.0, "F32").hex() == "000080bf"
    assert element(-1.0, "BF16").hex() == "80bf"
    assert element(-1.0, "F16").hex() == "00bc"
