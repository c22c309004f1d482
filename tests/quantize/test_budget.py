import itertools
import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from support.seeded_models import LLAMA, QWEN3_MOE, write_seeded_model
from tightfit.checkpoint.checkpoint import open_checkpoint
from tightfit.checkpoint.describe import describe
from tightfit.cli.output import NoProgress
from tightfit.errors import CheckpointError, UsageError
from tightfit.model.quantization.written import Choice, Wish
from tightfit.quantize import observe
from tightfit.quantize.budget import CANDIDATES, allocate, fit_budget
from tightfit.quantize.calibration.options import CalibrationOptions
from tightfit.quantize.candidates import Group, Option
from tightfit.quantize.job import prepare
from tightfit.quantize.places import Where
from tightfit.quantize.quality import measure
from tightfit.quantize.recipe_file import document_of, wish_of
from tightfit.quantize.write import write, write_job
from tightfit.units import MiB


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_seeded_model(QWEN3_MOE, tmp_path_factory.mktemp("moe") / "model")


def tensor_bytes(checkpoint: object) -> int:
    return sum(info.nbytes for info in checkpoint.tensors().values())  # type: ignore[attr-defined]


@pytest.mark.parametrize("share", [0.36, 0.45, 0.5, 0.7, 0.99])
def test_sizes_are_exact_and_within_the_budget(moe: Path, share: float) -> None:
    checkpoint = open_checkpoint(str(moe))
    budget = int(tensor_bytes(checkpoint) * share)
    found = fit_budget(checkpoint, budget)
    assert found.total_bytes <= budget
    job = prepare(checkpoint, found.wish)
    assert tensor_bytes(job.virtual) == found.total_bytes
    chosen = {g.name: o.choice for g, o in found.decisions}
    assert chosen.keys() == {
        *(f"model.layers.{i}.self_attn.{name}" for i in (0, 1) for name in ("qkv_proj", "o_proj")),
        *("model.layers.0.mlp.experts", "model.layers.1.mlp.gate_up_proj"),
        "model.layers.1.mlp.down_proj",
    }
    for group, option in found.decisions:
        assert {job.decisions[module] for module in group.modules} == {option.choice}
    quantized = {m for g, o in found.decisions if o.choice for m in g.modules}
    assert {m for m, choice in job.decisions.items() if choice} == quantized


def test_errors_are_those_of_the_recipe(moe: Path) -> None:
    checkpoint = open_checkpoint(str(moe))
    found = fit_budget(checkpoint, int(tensor_bytes(checkpoint) * 0.45))
    job = prepare(checkpoint, found.wish)
    measured = measure(job).total
    error = sum(option.squared_error for _, option in found.decisions)
    assert error == pytest.approx(measured.squared_error, rel=1e-6)
    norm = sum(group.squared_norm for group, _ in found.decisions)
    assert found.relative_error == pytest.approx((error / norm) ** 0.5)


def test_larger_budgets_are_never_worse(moe: Path) -> None:
    checkpoint = open_checkpoint(str(moe))
    total = tensor_bytes(checkpoint)
    damages = []
    for share in (0.36, 0.42, 0.5, 0.6, 0.8, 0.95):
        found = fit_budget(checkpoint, int(total * share))
        damages.append(sum(option.damage for _, option in found.decisions))
        assert found == fit_budget(checkpoint, int(total * share))
    assert damages == sorted(damages, reverse=True)


def test_the_recipe_is_written_and_read_again(moe: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(moe))
    found = fit_budget(checkpoint, int(tensor_bytes(checkpoint) * 0.45))
    assert len(found.wish.choices) > 1
    assert wish_of(document_of(found.wish)) == found.wish
    job = prepare(checkpoint, found.wish)
    write(write_job(job, max_shard_bytes=MiB), str(tmp_path / "out"), NoProgress())
    written = open_checkpoint(str(tmp_path / "out"))
    assert tensor_bytes(written) == found.total_bytes
    # The reader checks every tensor against what the config says of it.
    assert describe(written).spec.quantization is not None
    section = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert len(section["config_groups"]) == len(found.wish.choices)


def test_too_small_a_budget_says_the_smallest(moe: Path) -> None:
    checkpoint = open_checkpoint(str(moe))
    with pytest.raises(UsageError, match=r"takes at least .* \(([\d,]+) bytes\)") as error:
        fit_budget(checkpoint, 1000)
    smallest = int(error.value.message.split("(")[1].split(" ")[0].replace(",", ""))
    assert fit_budget(checkpoint, smallest).total_bytes == smallest
    with pytest.raises(UsageError, match="takes at least"):
        fit_budget(checkpoint, smallest - 1)


def test_a_budget_for_all_of_it_needs_no_recipe(moe: Path) -> None:
    checkpoint = open_checkpoint(str(moe))
    with pytest.raises(UsageError, match="as it is, which is within the budget"):
        fit_budget(checkpoint, tensor_bytes(checkpoint))


def test_groups_get_only_what_divides_them(tmp_path: Path) -> None:
    config = {**LLAMA, "intermediate_size": 288}
    checkpoint = open_checkpoint(str(write_seeded_model(config, tmp_path / "model")))
    total = tensor_bytes(checkpoint)
    found = fit_budget(checkpoint, total // 2)
    options = {g.name: [o.label for o in g.options] for g, _ in found.decisions}
    assert options["model.layers.0.mlp.down_proj"] == ["w4a16 g32", "fp8-channel", None]
    assert options["model.layers.0.mlp.gate_up_proj"][0] == "w4a16 g128"
    two = fit_budget(checkpoint, int(total * 0.6), tensor_parallel_size=2)
    options = {g.name: [o.label for o in g.options] for g, _ in two.decisions}
    assert options["model.layers.0.mlp.down_proj"] == ["fp8-channel", None]
    prepare(checkpoint, two.wish, tensor_parallel_size=2)


def test_what_is_ignored_stays(moe: Path) -> None:
    checkpoint = open_checkpoint(str(moe))
    budget = int(tensor_bytes(checkpoint) * 0.6)
    found = fit_budget(checkpoint, budget, ignored=["self_attn"])
    assert not [group.name for group, _ in found.decisions if "self_attn" in group.name]
    assert tensor_bytes(prepare(checkpoint, found.wish).virtual) == found.total_bytes
    with pytest.raises(UsageError, match=r"hold as one what would"):
        fit_budget(checkpoint, budget, ignored=["q_proj"])


def test_text_tells_what_matters(
    moe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = torch.randint(0, 259, (2, 32), generator=torch.Generator().manual_seed(2))
    monkeypatch.setattr(observe, "token_windows", lambda *_: tokens)
    options = CalibrationOptions(texts=(tmp_path / "text.txt",))
    model = tmp_path / "model"
    shutil.copytree(moe, model)
    tensors = load_file(model / "model.safetensors")
    # What this layer adds is all but nothing, whatever becomes of it.
    tensors["model.layers.1.mlp.down_proj.weight"] *= 1e-3
    tensors["model.layers.1.self_attn.o_proj.weight"] *= 1e-3
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    checkpoint = open_checkpoint(str(model))
    budget = int(tensor_bytes(checkpoint) * 0.5)
    found = fit_budget(checkpoint, budget, calibration=options)
    assert found.total_bytes <= budget
    layers = {
        layer: {option.label for group, option in found.decisions if group.where.layer == layer}
        for layer in (0, 1)
    }
    assert layers[0] <= {"fp8-channel", None}
    assert all(label is not None and label.startswith("w4a16") for label in layers[1])
    assert tensor_bytes(prepare(checkpoint, found.wish).virtual) == found.total_bytes


def test_several_schemes_with_scales_of_a_whole_matrix(moe: Path) -> None:
    checkpoint = open_checkpoint(str(moe))
    candidates = (*CANDIDATES, Choice(scheme="nvfp4a16"), Choice(scheme="fp8-block"))
    found = fit_budget(checkpoint, int(tensor_bytes(checkpoint) * 0.4), candidates=candidates)
    for choice in candidates:
        job = prepare(checkpoint, Wish(default=choice))
        modules = {one.module: one.figures for one in measure(job).matrices}
        for group, _ in found.decisions:
            option = next((o for o in group.options if o.choice == choice), None)
            if option is None or group.where.kind == "experts":
                continue
            expected = sum(modules[module].squared_error for module in group.modules)
            assert option.squared_error == pytest.approx(expected, rel=1e-6)
    mixed = (*CANDIDATES, Choice(scheme="w4a16", format="gptq"))
    with pytest.raises(UsageError, match="formats"):
        fit_budget(checkpoint, int(tensor_bytes(checkpoint) * 0.4), candidates=mixed)


def test_damaged_weights_are_refused(tmp_path: Path) -> None:
    model = write_seeded_model(LLAMA, tmp_path / "model")
    checkpoint = open_checkpoint(str(model))
    info = checkpoint.tensors()["model.layers.0.mlp.up_proj.weight"]
    with open(model / "model.safetensors", "r+b") as file:
        file.seek(info.offset)
        file.write(b"\xc0\x7f")
    with pytest.raises(CheckpointError, match="NaN"):
        fit_budget(open_checkpoint(str(model)), tensor_bytes(checkpoint) // 2)


def groups(generator: random.Random, count: int) -> list[Group]:
    found = []
    for number in range(count):
        sizes = sorted(generator.sample(range(1, 100), 4))
        damages = sorted((generator.random() for _ in range(3)), reverse=True)
        options = [
            Option(choice=None, total_bytes=size, squared_error=0.0, damage=damage)
            for size, damage in zip(sizes, (*damages, 0.0), strict=True)
        ]
        where = Where(kind="mlp", layer=number)
        found.append(
            Group(
                name=str(number),
                modules=(),
                where=where,
                parameters=1,
                squared_norm=1.0,
                options=tuple(options),
            )
        )
    return found


def test_allocation_is_near_the_best() -> None:
    generator = random.Random(11)
    ratios = []
    for _ in range(60):
        some = groups(generator, 5)
        least = sum(group.options[0].total_bytes for group in some)
        most = sum(group.options[-1].total_bytes for group in some)
        room = generator.randint(least, most)
        chosen = allocate(some, room, [1.0] * 5)
        assert sum(option.total_bytes for option in chosen) <= room
        best = min(
            sum(option.damage for option in every)
            for every in itertools.product(*(group.options for group in some))
            if sum(option.total_bytes for option in every) <= room
        )
        ratios.append((sum(option.damage for option in chosen) + 0.1) / (best + 0.1))
    assert sum(ratios) / len(ratios) < 1.1
    assert max(ratios) < 2
