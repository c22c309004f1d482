"""`--model-impl transformers`: modelling code of others with our KV cache and scheduler."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from runtime.ranks import MAX_TOKENS, PROMPTS, options
from tightfit.checkpoint.checkpoint import open_checkpoint
from tightfit.checkpoint.describe import describe
from tightfit.errors import CheckpointError, UnsupportedModelError, UsageError
from tightfit.planner.api import plan_model
from tightfit.planner.devices import Device
from tightfit.planner.engines.builtin_transformers import by_transformers, offloaded_layers
from tightfit.planner.options import PlanOptions
from tightfit.runtime.models.hf_loading import _device_map, empty_model
from tightfit.runtime.options import SamplingParams
from tightfit.runtime.ranks.world import World
from tightfit.runtime.session import RunReport, run_rank
from tightfit.units import GiB

TinyModel = Callable[[str], Path]
Tokens = Callable[[Path], list[list[int]]]
CPU = torch.device("cpu")


def run(path: Path, **changes: Any) -> RunReport:
    checkpoint = open_checkpoint(str(path))
    report = run_rank(
        checkpoint,
        describe(checkpoint).spec,
        options(model_impl="transformers", **changes),
        world=World(),
        prompts=PROMPTS,
        sampling=SamplingParams(max_tokens=MAX_TOKENS, ignore_eos=True),
    )
    assert report is not None
    return report


def tokens(report: RunReport) -> list[list[int]]:
    return [completion.token_ids for completion in report.completions]


@pytest.mark.parametrize(
    "name", ["llama", "gemma2", "mixtral", "gpt_oss", "opt", "stablelm", "cohere2", "granite"]
)
def test_tokens_of_its_own_generation(
    name: str, tiny_model: TinyModel, reference_tokens: Tokens
) -> None:
    path = tiny_model(name)
    report = run(path, max_num_batched_tokens=7)
    assert tokens(report) == reference_tokens(path)
    assert (
        report.implementation
        == f"transformers' {open_checkpoint(str(path)).config['architectures'][0]}"
    )


def test_preemption_changes_no_token(tiny_model: TinyModel, reference_tokens: Tokens) -> None:
    path = tiny_model("olmo3")
    report = run(path, num_blocks=14, max_num_batched_tokens=16)
    assert report.num_preemptions > 0
    assert tokens(report) == reference_tokens(path)


@pytest.fixture(scope="module")
def unknown_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of an architecture that no family here describes."""
    from transformers import VaultGemmaConfig, VaultGemmaForCausalLM

    torch.manual_seed(7)
    config = VaultGemmaConfig(
        vocab_size=259,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        query_pre_attn_scalar=16,
        max_position_embeddings=128,
        sliding_window=8,
        initializer_range=0.2,
    )
    path = tmp_path_factory.mktemp("unknown") / "vault"
    VaultGemmaForCausalLM(config).save_pretrained(path)
    return path


def test_an_unknown_architecture(unknown_model: Path, reference_tokens: Tokens) -> None:
    assert tokens(run(unknown_model, max_num_batched_tokens=7)) == reference_tokens(unknown_model)


def test_an_unknown_architecture_is_planned_if_full_attention_is_assumed(
    unknown_model: Path,
) -> None:
    asked = PlanOptions(
        engine="builtin",
        device=Device(name="cpu", kind="cpu", total_bytes=8 * GiB),
        max_model_len=64,
        assume_full_attention=True,
    )
    planned = plan_model(str(unknown_model), asked)
    report = run(unknown_model, dtype="BF16")
    weights = planned.plan.ranks[0].components[0]
    assert weights.planned_bytes == report.ranks[0].weights_tensor_bytes


def test_keys_that_the_plan_has_not(unknown_model: Path, tmp_path: Path) -> None:
    """The config says 2 KV heads; the plan is then made for 1."""
    from dataclasses import replace

    checkpoint = open_checkpoint(str(unknown_model))
    spec = describe(checkpoint).spec
    attention = replace(spec.layers[0].attention, num_kv_heads=1)
    other = replace(spec, layers=(replace(spec.layers[0], mixers=(attention,)),) * 2)
    with pytest.raises(
        UnsupportedModelError, match="2 KV heads of 16 features, and the plan has 1"
    ):
        run_rank(checkpoint, other, options(model_impl="transformers"), world=World())


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("bloom", "ALiBi"),
        ("llama4", "chunks"),
        ("mamba2", "Mamba2"),
        ("deepseek_v3", "LatentAttention"),
    ],
)
def test_what_cannot_work_is_told_before_anything_is_loaded(
    name: str, reason: str, tiny_model: TinyModel
) -> None:
    spec = describe(open_checkpoint(str(tiny_model(name)))).spec
    with pytest.raises(UnsupportedModelError, match=reason):
        by_transformers(spec, "transformers")


def test_attention_that_is_not_replaced(tiny_model: TinyModel) -> None:
    with pytest.raises(UnsupportedModelError, match="do not attend through"):
        run(tiny_model("gptj"))


def test_auto_takes_our_decoder_where_it_can(tiny_model: TinyModel, unknown_model: Path) -> None:
    ours = describe(open_checkpoint(str(tiny_model("llama")))).spec
    theirs = describe(open_checkpoint(str(unknown_model))).spec
    assert not by_transformers(ours, "auto")
    assert by_transformers(ours, "transformers")
    assert by_transformers(theirs, "auto")
    with pytest.raises(UnsupportedModelError, match="no code of its own"):
        by_transformers(theirs, "builtin")
    with pytest.raises(UsageError, match="unknown --model-impl"):
        by_transformers(ours, "vllm")


def test_code_of_a_checkpoint_is_never_executed(tiny_model: TinyModel, tmp_path: Path) -> None:
    source = tiny_model("llama")
    for file in source.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Config"}
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')")
    (tmp_path / "config.json").write_text(json.dumps(config))
    run(tmp_path)
    config |= {"model_type": "evil", "architectures": ["EvilForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match="code of a checkpoint is never executed"):
        run(tmp_path)
    assert not (tmp_path / "executed").exists()


def test_a_missing_tensor(tiny_model: TinyModel, tmp_path: Path) -> None:
    source = tiny_model("llama")
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    tensors = load_file(source / "model.safetensors")
    checkpoint = open_checkpoint(str(source))
    spec = describe(checkpoint).spec
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        run_rank(
            open_checkpoint(str(tmp_path)), spec, options(model_impl="transformers"), world=World()
        )


def test_random_weights_from_the_config_alone(tiny_model: TinyModel, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((tiny_model("mixtral") / "config.json").read_bytes())
    checkpoint = open_checkpoint(str(tmp_path))
    report = run_rank(
        checkpoint,
        describe(checkpoint).spec,
        options(model_impl="transformers"),
        world=World(),
        prompts=PROMPTS,
        sampling=SamplingParams(max_tokens=3, ignore_eos=True),
        load_format="dummy",
    )
    assert report is not None
    assert all(len(completion.token_ids) == 3 for completion in report.completions)


def test_the_last_layers_are_offloaded(tiny_model: TinyModel) -> None:
    checkpoint = open_checkpoint(str(tiny_model("llama")))
    spec = describe(checkpoint).spec
    _, all_layers = offloaded_layers(spec, "F32", 2**40)
    each = all_layers // 2
    assert offloaded_layers(spec, "F32", each) == (1, each)
    assert offloaded_layers(spec, "F32", each - 1) == (0, 0)
    devices = _device_map(spec, empty_model(checkpoint, spec, options()), torch.device("cuda:0"), 1)
    assert devices.pop("model.layers.1") == "cpu"
    assert set(devices) == {"model.layers.0", "model.embed_tokens", "model.norm", "lm_head"} | (
        {"model.rotary_emb"} & set(devices)
    )


def test_offloading_is_for_gpus_and_transformers(tiny_model: TinyModel) -> None:
    asked = PlanOptions(
        engine="builtin",
        device=Device(name="cpu", kind="cpu", total_bytes=8 * GiB),
        model_impl="transformers",
        cpu_offload_gb=1.0,
    )
    with pytest.raises(UsageError, match="--cpu-offload-gb needs a GPU"):
        plan_model(str(tiny_model("llama")), asked)
