"""`plan --quantization` says to the byte what `quantize` writes, and plans it as that."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest

from support.cli import tightfit
from support.tiny_families import FAMILIES
from support.tiny_media import MEDIA
from support.tiny_models import NAMES
from support.wishes import CHOICES, WISHES, mixed
from tightfit.checkpoint.checkpoint import Checkpoint, open_checkpoint
from tightfit.checkpoint.describe import describe
from tightfit.errors import LayoutError, UnsupportedModelError
from tightfit.model.families import model_spec
from tightfit.model.quantization.written import Wish
from tightfit.planner.api import OpenedModel
from tightfit.planner.assemble import make_plan
from tightfit.planner.options import PlanOptions
from tightfit.planner.quantized import stored_bytes
from tightfit.quantize.job import QuantizeJob, prepare
from tightfit.units import dtype_bytes

ALL = (*NAMES, *FAMILIES, *MEDIA)
STORED_OTHERWISE = ("dbrx", "gpt2", "gpt_oss", "mamba", "mamba2")
QUANTIZED = [name for name in ALL if name not in STORED_OTHERWISE]


@pytest.mark.parametrize("name", QUANTIZED)
def test_bytes_of_every_scheme(name: str, tiny_model: Callable[[str], Path]) -> None:
    """The sum of what lies in the files, and of what the virtual checkpoint has."""
    model = opened(open_checkpoint(str(tiny_model(name))))
    fitting = 0
    for label, wish in WISHES.items():
        job = prepared(model, wish)
        if job is not None:
            fitting += 1
            assert planned_bytes(model, label) == bytes_of(job), label
    assert fitting >= len(WISHES) - 3


@pytest.mark.parametrize("name", ["llama", "mixtral", "qwen3_vl_moe", "granitemoe"])
def test_dtypes_of_the_headers_count(name: str, tiny_model: Callable[[str], Path]) -> None:
    """config.json says bfloat16; scales get the dtype of their own matrix."""
    plain = open_checkpoint(str(tiny_model(name)))
    sizes = set()
    for dtypes in (("BF16", "BF16"), ("F16", "F32"), ("F32", "F32")):
        model = opened(with_dtypes(plain, *dtypes))
        for label, wish in WISHES.items():
            job = prepared(model, wish)
            if job is not None:
                assert planned_bytes(model, label) == bytes_of(job), (label, dtypes)
        sizes.add(model.plan(PlanOptions()).model.checkpoint_bytes)
    assert len(sizes) == 3


@pytest.mark.parametrize("name", QUANTIZED)
def test_planned_as_what_will_be_written(name: str, tiny_model: Callable[[str], Path]) -> None:
    model = opened(open_checkpoint(str(tiny_model(name))))
    for wish in (WISHES["int8"], WISHES["w4a16-asym g32 (awq)"], mixed(model.spec)):
        written = opened(prepare(model.checkpoint, wish).virtual)
        for size in (1, 2):
            options = PlanOptions(tensor_parallel_size=size)
            try:
                expected = written.plan(options)
            except LayoutError:
                with pytest.raises(LayoutError):
                    model.plan(replace(options, quantization_recipe=wish))
                continue
            found = model.plan(replace(options, quantization_recipe=wish))
            assert found.model.checkpoint_bytes == expected.model.checkpoint_bytes
            for ours, theirs in zip(found.ranks, expected.ranks, strict=True):
                assert ours.total_bytes == theirs.total_bytes
                a, b = ours.component("weights"), theirs.component("weights")
                assert (a.planned_bytes, a.detail) == (b.planned_bytes, b.detail)


@pytest.mark.parametrize("name", ["dbrx", "gpt2", "gpt_oss"])
def test_refused_by_both(name: str, tiny_model: Callable[[str], Path]) -> None:
    checkpoint = open_checkpoint(str(tiny_model(name)))
    with pytest.raises(UnsupportedModelError) as written:
        prepare(checkpoint, WISHES["int8"])
    with pytest.raises(UnsupportedModelError) as planned:
        planned_bytes(opened(checkpoint), "int8")
    assert planned.value.message == written.value.message
    assert "cannot be quantized: " in written.value.message


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("qwen3_moe", ["fp8-channel", "--ignore", "self_attn"]),
        ("qwen2_tied", ["w8a16", "--group-size", "-1", "--format", "gptq"]),
    ],
)
def test_by_command(
    name: str, options: list[str], tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    model, out = tiny_model(name), tmp_path / "out"
    scheme, *more = options
    flags = [one.replace("--", "--quantization-", 1) for one in more]
    done = tightfit("plan", model, "--quantization", scheme, *flags, "--json")
    assert done.returncode == 0, done.stderr
    planned = json.loads(done.stdout)
    done = tightfit("quantize", model, out, "--scheme", scheme, *more, "-q")
    assert done.returncode == 0, done.stderr
    assert planned["model"]["checkpoint_bytes"] == bytes_in(out)
    written = json.loads(tightfit("plan", out, "--json").stdout)
    assert written["model"] == {**planned["model"], "name": "out"}
    assert weights(written) == weights(planned)


def test_by_recipe(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    model, out, recipe = tiny_model("llama"), tmp_path / "out", tmp_path / "recipe.yaml"
    recipe.write_text(
        "scheme: fp8-channel\nrules:\n- {match: down_proj, scheme: w4a16, group_size: 32}\n"
    )
    planned = json.loads(tightfit("plan", model, "--quantization-recipe", recipe, "--json").stdout)
    done = tightfit("quantize", model, out, "--recipe", recipe, "-q")
    assert done.returncode == 0, done.stderr
    assert planned["model"]["checkpoint_bytes"] == bytes_in(out)
    assert planned["options"]["quantization"]["value"] == "fp8-channel + w4a16 g32"


def test_scales_of_a_cache(tiny_model: Callable[[str], Path]) -> None:
    """Two of each layer, which calibration finds; the plan has a cache of fp8 then."""
    model = tiny_model("llama")
    wish = Wish(default=CHOICES["fp8-channel"], kv_cache=True)
    plan = opened(open_checkpoint(str(model))).plan(PlanOptions(quantization_recipe=wish))
    options = PlanOptions(quantization="fp8-channel")
    plain = opened(open_checkpoint(str(model))).plan(options)
    assert plan.model.checkpoint_bytes == plain.model.checkpoint_bytes + 2 * 2 * 4
    assert (plan.kv_cache.dtype, plain.kv_cache.dtype) == ("F8_E4M3", "BF16")
    config = open_checkpoint(str(model / "config.json")).config
    by_shapes = make_plan(model_spec(config), PlanOptions(quantization_recipe=wish), name="x")
    assert by_shapes.model.checkpoint_bytes == plan.model.checkpoint_bytes


def opened(checkpoint: Checkpoint) -> OpenedModel:
    return OpenedModel(checkpoint=checkpoint, spec=describe(checkpoint).spec, from_headers=True)


def prepared(model: OpenedModel, wish: Wish) -> QuantizeJob | None:
    """None if engines could not load it, which plans refuse as well."""
    try:
        return prepare(model.checkpoint, wish)
    except (LayoutError, UnsupportedModelError):
        assert {choice.scheme for choice in wish.choices} <= {"fp8-block", "fp8-tensor"}
        with pytest.raises((LayoutError, UnsupportedModelError)):
            model.plan(PlanOptions(quantization_recipe=wish))
        return None


def planned_bytes(model: OpenedModel, label: str) -> int:
    choice = CHOICES[label]
    options = PlanOptions(
        quantization=choice.scheme,
        quantization_group_size=choice.group_size,
        quantization_format=choice.format,
    )
    return stored_bytes(model.spec, options, model.checkpoint.tensors())


def bytes_of(job: QuantizeJob) -> int:
    return sum(info.nbytes for info in job.virtual.tensors().values())


def bytes_in(directory: Path) -> int:
    """Of the tensors of all files."""
    return sum(info.nbytes for info in open_checkpoint(str(directory)).tensors().values())


def with_dtypes(checkpoint: Checkpoint, matrices: str, others: str) -> Checkpoint:
    """The same headers but for the dtypes."""
    infos = {}
    for name, info in checkpoint.tensors().items():
        dtype = matrices if len(info.shape) > 1 else others
        nbytes = dtype_bytes(dtype, prod(info.shape))
        infos[name] = replace(info, dtype=dtype, nbytes=nbytes)
    return replace(checkpoint, known=infos)


def weights(plan: Mapping[str, Any]) -> list[int]:
    return [
        component["planned_bytes"]
        for rank in plan["ranks"]
        for component in rank["components"]
        if component["name"] == "weights"
    ]
