"""Names and shapes of every family's rank files, as vLLM 0.32 itself listed them.

`tests/data/vllm_0_32_state.json` is what `tests/vllm/state_jobs.py` answered for the last rank of
two, tensor parallel and pipeline parallel: the tensors outside the layers, and of the last layers.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from support.tiny_families import SHARDED
from tightfit.checkpoint.checkpoint import open_checkpoint
from tightfit.model.families import model_spec
from tightfit.model.layout import Parallel, Rank
from tightfit.model.stored import rank_tensors, stored_layout

STATES = json.loads(
    (Path(__file__).parents[1] / "data" / "vllm_0_32_state.json").read_text(encoding="utf-8")
)
LAYOUTS = {
    "tp": Rank(tp_rank=1, parallel=Parallel(tensor_parallel_size=2)),
    "pp": Rank(pp_rank=1, parallel=Parallel(pipeline_parallel_size=2)),
}


# Only its rank files were loaded, and the tokens compared.
NOT_LISTED = ("internvl_chat",)


def test_every_family_was_asked_for() -> None:
    assert set(SHARDED) == {*STATES, *NOT_LISTED}


CASES = [(name, layout) for name in STATES for layout in LAYOUTS if layout in STATES[name]]


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_names_and_shapes(name: str, layout: str, tiny_model: Callable[[str], Path]) -> None:
    spec = model_spec(open_checkpoint(str(tiny_model(name))).config)
    found = {
        tensor.name: list(tensor.shape)
        for tensor in rank_tensors(spec, LAYOUTS[layout], stored_layout("vllm-0.32"))
        if not any(
            part.isdigit() and int(part) < spec.num_layers - 2 for part in parts(tensor.name)
        )
    }
    assert found == STATES[name][layout]


def parts(name: str) -> list[str]:
    return name.split(".")
