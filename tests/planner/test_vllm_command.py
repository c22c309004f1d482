"""Commands that people have, as the options of a plan."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tightfit.errors import ConfigError, TightfitError, UsageError
from tightfit.planner.options import PlanOptions
from tightfit.planner.vllm_command import parse_command, parse_config_file

MODEL = "Qwen/Qwen3-8B"


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ("--max-model-len 4k", {"max_model_len": 4000}),
        ("--max-model-len=4K", {"max_model_len": 4096}),
        ("--max_model_len 25.6k", {"max_model_len": 25_600}),
        ("--max-model-len auto", {"max_model_len": -1}),
        ("--max-model-len -1", {"max_model_len": -1}),
        ("--max-num-batched-tokens 1M", {"max_num_batched_tokens": 2**20}),
        ("--kv-cache-memory-bytes 8G", {"kv_cache_memory_bytes": 8 * 2**30}),
        # argparse completes what is not ambiguous, and vLLM's own log prints this one.
        ("--kv-cache-memory=151519866880", {"kv_cache_memory_bytes": 151_519_866_880}),
        ("-tp 2 -pp=3 -dp 4", {"tensor_parallel_size": 2, "pipeline_parallel_size": 3}
         | {"data_parallel_size": 4}),
        ("--tensor-parallel-size 8 --enable-expert-parallel", {"tensor_parallel_size": 8}
         | {"enable_expert_parallel": True}),
        ("-ep -dcp 2", {"enable_expert_parallel": True, "decode_context_parallel_size": 2}),
        ("--no-enable-prefix-caching", {"enable_prefix_caching": False}),
        ("--enable-chunked-prefill False", {"enable_chunked_prefill": False}),
        ("--enable-chunked-prefill=true", {"enable_chunked_prefill": True}),
        ("--enforce-eager --max-num-seqs 16", {"enforce_eager": True, "max_num_seqs": 16}),
        ("--device-memory-utilization 0.8", {"gpu_memory_utilization": 0.8}),
        ("--cudagraph-capture-sizes 1 2 4 --dtype half", {"cudagraph_capture_sizes": (1, 2, 4)}
         | {"dtype": "half"}),
        ("-O3", {"optimization_level": 3}),
        ("-O 0", {"optimization_level": 0}),
        ("--optimization-level O1", {"optimization_level": 1}),
        ("-cc.cudagraph_mode=NONE", {"compilation_config": {"cudagraph_mode": "NONE"}}),
        ("-cc.mode 0 -cc.pass_config.fuse_norm_quant=true",
         {"compilation_config": {"mode": 0, "pass_config": {"fuse_norm_quant": True}}}),
        ("-O.cudagraph_mode=FULL", {"compilation_config": {"cudagraph_mode": "FULL"}}),
        ("""--compilation-config '{"cudagraph_mode": "PIECEWISE"}'""",
         {"compilation_config": {"cudagraph_mode": "PIECEWISE"}}),
        ("--limit-mm-per-prompt.image 2 --limit-mm-per-prompt.video=0",
         {"limit_mm_per_prompt": {"image": 2, "video": 0}}),
        ("""--limit-mm-per-prompt '{"image": {"count": 1, "width": 512}}'""",
         {"limit_mm_per_prompt": {"image": {"count": 1, "width": 512}}}),
        ("--limit-mm-per-prompt image=2,video=1",
         {"limit_mm_per_prompt": {"image": 2, "video": 1}}),
        ("--kv-cache-dtype fp8 -q fp8", {"kv_cache_dtype": "fp8", "quantization": "fp8"}),
        ("--enable-lora --max-loras 4 --max-lora-rank 64", {"enable_lora": True, "max_loras": 4}
         | {"max_lora_rank": 64}),
        ("--max-num-seqs 8 --max-num-seqs 9", {"max_num_seqs": 9}),
    ],
)  # fmt: skip
def test_flags(arguments: str, options: dict[str, Any]) -> None:
    parsed = parse_command(f"vllm serve {MODEL} {arguments}")
    assert (parsed.model, parsed.entrypoint) == (MODEL, "server")
    assert parsed.options == options
    assert parsed.warnings == ()
    PlanOptions(**parsed.options)


@pytest.mark.parametrize(
    "text",
    [
        f"vllm serve --max-num-seqs 7 --model {MODEL}",
        f"python -m vllm.entrypoints.openai.api_server --model {MODEL} --max-num-seqs 7",
        f"CUDA_VISIBLE_DEVICES=0 nohup /venv/bin/python3.12 -m vllm.entrypoints.openai.api_server"
        f" --model={MODEL} --max-num-seqs=7 > server.log 2>&1 &",
        f"cd /srv && source env/bin/activate; uv run vllm serve {MODEL} --max-num-seqs 7 | tee log",
        f"$ vllm serve {MODEL} \\\n    --max-num-seqs 7 \\\n    --port 8001\n",
        f"# start it\nvllm serve {MODEL} --max-num-seqs 7  # a few",
        f"export MODEL={MODEL}\nSEQS=7 && vllm serve $MODEL --max-num-seqs ${{SEQS}}",
        f'bash -c "vllm serve {MODEL} --max-num-seqs 7"',
        f"docker run --rm -it --gpus '\"device=0,1\"' -v ~/.cache/vllm:/x --ipc=host -p 80:80"
        f" vllm/vllm-openai --model {MODEL} --max-num-seqs 7",
        "sudo docker run --entrypoint bash vllm/vllm-openai -c "
        f"'vllm serve {MODEL} --max-num-seqs 7'",
    ],
)
def test_shells(text: str) -> None:
    parsed = parse_command(text)
    assert parsed.model == MODEL
    assert parsed.options == {"max_num_seqs": 7}


def test_an_image_says_the_version_and_its_environment_counts() -> None:
    parsed = parse_command(
        "docker run --runtime nvidia -e VLLM_USE_V2_MODEL_RUNNER=1 --env VLLM_CPU_KVCACHE_SPACE=40 "
        f"vllm/vllm-openai:v0.25.1-cu129 {MODEL} -tp 2"
    )
    assert parsed.options == {
        "engine_version": "0.25.1",
        "tensor_parallel_size": 2,
        "use_v2_model_runner": True,
        "cpu_kvcache_space": 40.0,
    }
    assert len(parsed.warnings) == 1
    assert "--kv-cache-memory-bytes" in parsed.warnings[0]


def test_an_optimization_level_was_a_compilation_mode_before_0_12() -> None:
    parsed = parse_command(f"docker run vllm/vllm-openai:v0.9.2 --model {MODEL} -O3")
    assert parsed.options == {"engine_version": "0.9.2", "compilation_config": {"mode": 3}}


@pytest.mark.parametrize(
    ("text", "successor", "options"),
    [
        ("--max-seq-len-to-capture 8192", "--max-cudagraph-capture-size", {}),
        ("--swap-space 16", "--kv-offloading-size", {}),
        ("--cuda-graph-sizes 256", "--max-cudagraph-capture-size",
         {"max_cudagraph_capture_size": 256}),
        ("--cuda-graph-sizes 1 2 4", "--cudagraph-capture-sizes",
         {"cudagraph_capture_sizes": (1, 2, 4)}),
        ("--disable-mm-preprocessor-cache", "--mm-processor-cache-gb 0",
         {"mm_processor_cache_gb": 0.0}),
        ("""--rope-scaling '{"rope_type": "yarn"}'""", "--hf-overrides", {}),
        ("--task embed", "--runner", {}),
        ("-cc.level=3", "mode", {"compilation_config": {"mode": 3}}),
        ("""-cc '{"max_capture_size": 64}'""", "max_cudagraph_capture_size",
         {"compilation_config": {"max_cudagraph_capture_size": 64}}),
        ("-cc.full_cuda_graph=true", "cudagraph_mode",
         {"compilation_config": {"cudagraph_mode": "FULL"}}),
    ],
)  # fmt: skip
def test_removed_names_name_their_successor(
    text: str, successor: str, options: dict[str, Any]
) -> None:
    parsed = parse_command(f"vllm serve {MODEL} {text}")
    assert parsed.options == options
    assert len(parsed.warnings) == 1
    assert successor in parsed.warnings[0]


def test_a_removed_variable_yields_to_the_flag() -> None:
    text = f"VLLM_MM_INPUT_CACHE_GIB=8 vllm serve {MODEL}"
    assert parse_command(text).options == {"mm_processor_cache_gb": 8.0}
    assert "--mm-processor-cache-gb" in parse_command(text).warnings[0]
    assert parse_command(text + " --mm-processor-cache-gb 2").options["mm_processor_cache_gb"] == 2


def test_what_matters_and_is_not_modelled_is_said() -> None:
    parsed = parse_command(
        f"VLLM_PP_LAYER_PARTITION=16,32 vllm serve {MODEL} --host 0.0.0.0 --port 80 "
        """--speculative-config '{"method": "mtp"}' -pcp 2 --runner generate --api-key a b """
        "--no-enable-eplb --hf-token --frobnicate 7 --served-model-name x --max-num-seqs 4"
    )
    assert parsed.options == {"max_num_seqs": 4}
    told = "\n".join(parsed.warnings)
    for name in ("VLLM_PP_LAYER_PARTITION", "--speculative-config", "-pcp", "--frobnicate 7"):
        assert name in told
    assert len(parsed.warnings) == 4
    assert {"--host", "--port", "--api-key", "--served-model-name"} < set(parsed.ignored)


def test_an_unknown_variable_names_no_model() -> None:
    parsed = parse_command("vllm serve $MODEL_ID --max-num-seqs 4")
    assert parsed.model is None
    assert "$MODEL_ID" in parsed.warnings[0]


def test_python() -> None:
    parsed = parse_command(
        "from vllm import LLM\n"
        "llm = LLM(\n    'Qwen/Qwen3-8B', tensor_parallel_size=2, max_model_len=8192,\n"
        "    gpu_memory_utilization=0.9, enforce_eager=True, limit_mm_per_prompt={'image': 1},\n"
        "    seed=f(1), revision='main',  # (a comment\n)\nprint(llm)"
    )
    assert (parsed.model, parsed.entrypoint, parsed.revision) == (MODEL, "llm", "main")
    assert parsed.options == {
        "tensor_parallel_size": 2,
        "max_model_len": 8192,
        "gpu_memory_utilization": 0.9,
        "enforce_eager": True,
        "limit_mm_per_prompt": {"image": 1},
    }
    assert len(parsed.warnings) == 1


def test_a_config_file(tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text(
        f"model: {MODEL}\nmax-model-len: 16K\ntensor_parallel_size: 2\nport: 8001\n"
        "enforce-eager: true\nenable-prefix-caching: false\ncudagraph-capture-sizes: [1, 2]\n"
        "compilation-config:\n  cudagraph_mode: NONE\nswap-space: 4\n"
    )
    parsed = parse_config_file(path)
    assert parsed.model == MODEL
    assert parsed.options == {
        "max_model_len": 16_384,
        "tensor_parallel_size": 2,
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "cudagraph_capture_sizes": (1, 2),
        "compilation_config": {"cudagraph_mode": "NONE"},
    }
    assert "--kv-offloading-size" in parsed.warnings[0]
    both = parse_command(f"vllm serve --config {path} -tp 4")
    assert (both.model, both.options["tensor_parallel_size"]) == (MODEL, 4)
    assert both.options["max_model_len"] == 16_384


@pytest.mark.parametrize("text", ["- a\n", "a: [", "x" * (2**20 + 1), "!!python/object:os.x {}"])
def test_files_that_are_no_config(tmp_path: Path, text: str) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"serve\.yaml"):
        parse_config_file(path)
    with pytest.raises(ConfigError, match="absent"):
        parse_config_file(tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("echo hello", "no command of vLLM"),
        ("", "no command of vLLM"),
        ("vllm serve 'a", "cannot be read"),
        ("vllm serve a --max-model-len 1.5K", "--max-model-len '1.5K' is not a number"),
        ("vllm serve a --max-num-seqs many", "--max-num-seqs 'many' is not a number"),
        ("vllm serve a --cpu-offload-gb inf", "--cpu-offload-gb 'inf' is not a number"),
        ("vllm serve a -cc {", "-cc '{' is not JSON"),
        ("vllm serve a -tp", "-tp has no value"),
        ("vllm serve a -O9", "-O 9 is no level"),
        ("LLM(model=", "not Python"),
        ("vllm serve " + "a" * 70_000, "characters"),
        ("vllm serve a --config b\0.yaml", "null byte"),
    ],
)
def test_commands_that_vllm_would_refuse(text: str, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        parse_command(text)


PIECES = (
    "vllm serve a -tp 2 --max-model-len -1 --x -- - = . -cc.a.b=1 -cc . {} [] --hf-token docker "
    "run python -m ; && | $A ${ ' \" \\ \n # LLM( ) -O -O3 --config --no-x --enforce-eager bash -c "
    "A=1 VLLM_CPU_KVCACHE_SPACE=x -q --cuda-graph-sizes export 1K é --limit-mm-per-prompt"
)
WORDS = st.lists(st.sampled_from(PIECES.split(" "))).map(" ".join)


@given(st.one_of(st.text(), WORDS, WORDS.map(lambda words: "vllm serve " + words)))
def test_no_text_gives_a_traceback(text: str) -> None:
    with suppress(TightfitError):
        parse_command(text)
