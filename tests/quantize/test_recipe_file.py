"""Recipes as their users write them."""

import json
from pathlib import Path

import pytest

from support.cli import Call, assert_error
from support.seeded_models import LLAMA, write_seeded_model
from tightfit.cli import quantize_request as request
from tightfit.errors import UsageError
from tightfit.quantize.recipe_file import document_of, read_recipe, wish_of


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_seeded_model(LLAMA, tmp_path_factory.mktemp("llama") / "model")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "is no mapping"),
        ("a: [", "is neither YAML nor JSON"),
        ("schem: int8", "unknown key 'schem'"),
        ("scheme: int9", "there is no scheme 'int9'"),
        ("scheme: [int8]", "two names and a whole number are needed"),
        ("scheme: int8\ngroup_size: 64", "a group size of 64 with the scheme int8"),
        ("scheme: w4a16\ngroup_size: true", "two names and a whole number are needed"),
        ("scheme: int8\nrules: {}", None),
        ("scheme: int8\nrules: {a: b}", "rules are no list"),
        ("scheme: int8\nrules: [{scheme: int8}]", "rule 1 has no pattern to match"),
        (
            "scheme: int8\nrules: [{match: a, keep: true, scheme: int8}]",
            "rule 1 ('a') says both `keep: true` and scheme 'int8'",
        ),
        (
            "scheme: int8\nrules: [{match: a, keep: true, group_size: 32}]",
            "rule 1 ('a') says both `keep: true` and group_size 32",
        ),
        ("rules: [{match: a, keep: false}]", "rule 1 ('a') says neither"),
        ("scheme: int8\nrules: [{match: a, keep: 'no'}]", "keep 'no' is neither true nor false"),
        ("scheme: int8\nrules: [{match: '('}]", "rule 1: '(' is not a regular expression"),
        ("scheme: int8\nrules: [{match: a, scheme: int9}]", "rule 1: there is no scheme 'int9'"),
        ("rules: [{match: a, group_size: 32}]", "rule 1 ('a') says neither"),
        (
            "group_size: 32\nrules: [{match: a, scheme: int8}]",
            "a group size of 32, which no scheme takes",
        ),
        (
            "group_size: 32\nrules: [{match: a, scheme: w4a16, group_size: 64}]",
            "a group size of 32, which no scheme takes",
        ),
        ("scheme: int8\nkv_cache: fp4", "there is no KV cache in 'fp4'"),
        ("scheme: int8\nformat: gptq", "the format 'gptq' does not have the scheme int8"),
    ],
)
def test_recipes_that_are_wrong(text: str, message: str | None, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    if message is None:
        wish_of(read_recipe(path))
        return
    with pytest.raises(UsageError) as e:
        wish_of(read_recipe(path), str(path))
    assert message in e.value.message
    assert str(path) in e.value.message


def test_recipes_are_written_back() -> None:
    document = {
        "scheme": "w4a16",
        "group_size": 64,
        "rules": [
            {"match": "a", "scheme": "w4a16-asym"},
            {"match": "b", "group_size": 32},
            {"match": "c", "scheme": "w4a16"},
            {"match": "d", "scheme": "fp8-channel"},
            {"match": "e", "keep": True},
        ],
    }
    wish = wish_of(document, ignore=["f"])
    assert wish.rules[0] == ("f", None)
    groups = [choice.group for _, choice in wish.rules[1:5] if choice is not None]
    assert groups == [128, 32, 64, None]
    again = wish_of(document_of(wish))
    assert [c and c.label for _, c in again.rules] == [c and c.label for _, c in wish.rules]
    assert again.default == wish.default
    assert document_of(again) == document_of(wish)


@pytest.mark.parametrize("size", ["group_size: 32\n", "--group-size"])
def test_a_group_size_without_a_scheme_is_for_all_that_have_groups(
    size: str, llama: Path, tmp_path: Path, call: Call
) -> None:
    path, out = tmp_path / "recipe.yaml", tmp_path / "out"
    flags = [size, "32"] if size.startswith("--") else []
    path.write_text(
        ("" if flags else size)
        + "rules:\n  - {match: down_proj, scheme: w8a16, group_size: 64}\n"
        + "  - {match: mlp, scheme: w4a16}\n  - {match: self_attn, scheme: int8}\n"
    )
    done = call("quantize", llama, out, "--recipe", path, *flags)
    assert done.returncode == 0, done.stderr
    config = json.loads((out / "config.json").read_text())
    groups = config["quantization_config"]["config_groups"].values()
    found = [one["weights"].get("group_size") for one in groups]
    assert found == [64, 32, None]


@pytest.mark.parametrize("command", ["quantize", "shard"])
def test_formats_of_one_scheme_do_not_mix(
    command: str, llama: Path, tmp_path: Path, call: Call
) -> None:
    path, out = tmp_path / "recipe.yaml", tmp_path / "out"
    path.write_text("scheme: w4a16\nformat: gptq\nrules: [{match: down_proj, group_size: 32}]\n")
    message = "the format gptq has one scheme and one group size, and the recipe has "
    for flags in ([], ["--dry-run"]):
        done = call(command, llama, out, "--recipe", path, *flags)
        assert_error(done, 2, f"{message}w4a16 g128 (gptq) + w4a16 g32 (gptq)")
        assert not out.exists()
    path.write_text("scheme: w4a16\nformat: gptq\nrules: [{match: down_proj, group_size: 128}]\n")
    assert call(command, llama, out, "--recipe", path, "--dry-run").returncode == 0


def test_flags_and_a_recipe_that_differ(tmp_path: Path) -> None:
    path = tmp_path / "recipe.json"
    path.write_text('{"scheme": "w4a16", "group_size": 64}')
    flags = {"group_size": None, "file_format": None, "kv_cache": None, "ignore": ()}
    assert request.wish_from(path, scheme="w4a16", **flags).label == "w4a16 g64"
    with pytest.raises(UsageError, match=r"--scheme int8, and .* says 'w4a16'"):
        request.wish_from(path, scheme="int8", **flags)
