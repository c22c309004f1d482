import json

import pytest

from tightfit.cli.arguments import like_vllm


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ("plan x --max_model_len 8k", "plan x --max-model-len 8k"),
        ("plan x --max_model_len=8_k", "plan x --max-model-len=8_k"),
        ("plan my_model -tp 2", "plan my_model -tp 2"),
        ("plan x -O3", "plan x --optimization-level 3"),
        ("plan x -O 2", "plan x -O 2"),
        ("plan x --gpu-memory=1.5GiB", "plan x --gpu-memory=1.5GiB"),
        ("plan ./x.json --sweep cc.mode=1", "plan ./x.json --sweep cc.mode=1"),
        ("run x -p -- --a_b", "run x -p -- --a_b"),
        ("plan --cudagraph_capture_sizes 1 2 4,8 x", "plan --cudagraph-capture-sizes 1,2,4,8 x"),
        ("plan x --cudagraph-capture-sizes", "plan x --cudagraph-capture-sizes"),
        ("plan x --cudagraph-capture-sizes --json", "plan x --cudagraph-capture-sizes --json"),
    ],
)
def test_spellings(given: str, read: str) -> None:
    assert like_vllm(given.split()) == read.split()


def test_dotted_keys_are_joined() -> None:
    words = "x -cc.cudagraph_mode=NONE -cc.mode 0 --compilation-config.pass_config.fuse=true"
    *rest, flag, value = like_vllm(words.split())
    assert (rest, flag) == (["x"], "--compilation-config")
    assert json.loads(value) == {"cudagraph_mode": "NONE", "mode": 0, "pass_config": {"fuse": True}}


@pytest.mark.parametrize("words", [["-cc.a"], ["-cc.=1"], ["-cc.a=1", "-cc.a.b=2"], ["-cc.a.=x"]])
def test_odd_keys_are_no_crash(words: list[str]) -> None:
    flag, value = like_vllm(words)
    assert flag == "--compilation-config"
    assert isinstance(json.loads(value), dict)
