"""Whatever a manifest says, it is an error of one line or a problem that is named."""

import copy
import json
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from support.work import write_shards
from tightfit.checkpoint.checkpoint import Checkpoint, open_checkpoint
from tightfit.cli.output import NoProgress
from tightfit.errors import TightfitError, VerificationError
from tightfit.model.stored import DEFAULT_LAYOUT, stored_layout
from tightfit.sharding.manifest import read_manifest
from tightfit.sharding.merge import prepare_merge
from tightfit.sharding.proof.verify import verify
from tightfit.sharding.shard import prepare

TinyModel = Callable[[str], Path]
Steps = tuple[str | int, ...]
MANIFEST = "tightfit-manifest.json"
VALUES: list[Any] = [
    *(0, 1, -1, 2**40, 1.5, 1e300, float("nan"), None, True),
    *("x", "\ud800", "../x", "decay", "transposed", "__metadata__", [], {}, [0], [["a"]]),
]
Change = Callable[[list[Any]], None]


@pytest.fixture(scope="module")
def shards(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("damaged") / "shards"
    write_shards(tiny_model("llama"), directory, 2)
    return directory


@pytest.fixture
def edited(shards: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shards, tmp_path / "shards"))


def used(directory: Path, against: Checkpoint) -> None:
    """All that reads a manifest."""
    for use in (
        lambda c: verify(directory, c.config, NoProgress(), against),
        lambda c: prepare_merge(c, max_shard_bytes=10**9),
        lambda c: prepare(
            c, stored_layout(DEFAULT_LAYOUT), tensor_parallel_size=1, max_shard_bytes=10**9
        ),
    ):
        with suppress(TightfitError):
            use(open_checkpoint(str(directory)))


def places(node: Any, steps: Steps = ()) -> Iterator[Steps]:
    if steps:
        yield steps
    if isinstance(node, dict | list):
        for step in node if isinstance(node, dict) else range(len(node)):
            yield from places(node[step], (*steps, step))


def at(node: Any, steps: Steps) -> Any:
    for step in steps:
        node = node[step]
    return node


def mutate(document: Any, all_places: list[Steps], chance: random.Random) -> None:
    *outer, last = chance.choice(all_places)
    parent = at(document, tuple(outer))
    kind = chance.random()
    if kind < 0.5:
        parent[last] = chance.choice(VALUES)
    elif kind < 0.6 and isinstance(parent[last], int):
        parent[last] += chance.choice([1, -1, 16])
    elif kind < 0.8:
        parent[last] = copy.deepcopy(at(document, chance.choice(all_places)))
    elif isinstance(parent, list):
        parent.append(chance.choice(VALUES))
    else:
        parent[chance.choice(["model.norm.weight", "__metadata__", "\ud800"])] = parent[last]


def test_mutations(edited: Path, tiny_model: TinyModel) -> None:
    against = open_checkpoint(str(tiny_model("llama")))
    whole = json.loads((edited / MANIFEST).read_bytes())
    all_places, chance = list(places(whole)), random.Random(7)
    for _ in range(50):
        document = copy.deepcopy(whole)
        # A second change may be about what the first has removed.
        with suppress(KeyError, IndexError, TypeError):
            for _ in range(chance.choice([1, 1, 2])):
                mutate(document, all_places, chance)
        (edited / MANIFEST).write_text(json.dumps(document))
        used(edited, against)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda p: p.__setitem__(0, "\ud800"), "UnicodeEncodeError: "),
        (lambda p: p.__setitem__(0, "__metadata__"), "ValueError: unexpected '__metadata__'"),
        (lambda p: p.__setitem__(1, [1, 1]), "ValueError: a piece of "),
        (lambda p: p.__setitem__(2, [0]), "ValueError: a piece of "),
        (lambda p: p.__setitem__(3, [2**40, 1]), "ValueError: a piece of "),
        (lambda p: p.__setitem__(4, [1, 1]), "ValueError: a piece of "),
        (lambda p: p.append([7, 7]), "ValueError: a piece of "),
        (lambda p: p.append("decay"), "ValueError: "),
    ],
)
def test_pieces(edited: Path, change: Change, complaint: str) -> None:
    document = json.loads((edited / MANIFEST).read_bytes())
    change(document["files"][0]["tensors"]["lm_head.weight"]["pieces"][0])
    (edited / MANIFEST).write_text(json.dumps(document))
    with pytest.raises(VerificationError) as e:
        read_manifest(edited)
    assert f"is damaged or of another version of tightfit: {complaint}" in e.value.message
    e.value.message.encode()


@pytest.mark.parametrize("fill", [1e300, float("nan"), float("inf"), "1", True, 10**400])
def test_fill(edited: Path, fill: Any) -> None:
    document = json.loads((edited / MANIFEST).read_bytes())
    document["files"][0]["tensors"]["lm_head.weight"]["fill"] = fill
    (edited / MANIFEST).write_text(json.dumps(document))
    with pytest.raises(VerificationError, match="is damaged or of another version"):
        read_manifest(edited)
