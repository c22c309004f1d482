"""What vLLM refuses before it allocates anything: devices, dtypes and options that do not go well.

Sources, relative to the vLLM 0.32 package: `config/vllm.py: _get_quantization_config` and the
`get_min_capability` of each method, `platforms/cuda.py: _get_backend_priorities`,
`config/model.py`, `config/scheduler.py: verify_max_model_len`, `config/lora.py`,
`config/compilation.py`, `model_executor/model_loader`. Where older versions needed a newer device
than is said here, that is not known.
"""

from tightfit.errors import UnsupportedModelError, UsageError
from tightfit.model.blocks.mlp import MoE
from tightfit.model.spec import ModelSpec
from tightfit.planner.devices import CATALOGUE, Device
from tightfit.planner.engines.vllm_kv import has_compressed, latents
from tightfit.planner.engines.vllm_versions import Rules
from tightfit.planner.options import PlanOptions, Resolved
from tightfit.planner.resolve import UNSTABLE_IN_FLOAT16

Capability = tuple[int, int]

_TURING, _AMPERE, _ADA = (7, 5), (8, 0), (8, 9)
_METHODS: dict[str, Capability] = {
    "mxfp4": _AMPERE,
    "fbgemm_fp8": _AMPERE,
    "experts_int8": _AMPERE,
    "modelopt (MXFP8)": _AMPERE,
    "gptq": (6, 0),
}
"""By vLLM's name of a method, and the scheme where it matters; all others need a Turing."""
_SPARSE_MAJORS = (9, 10, 12)
_SM120_CHOSEN = 2048
"""Tokens that the kernel of sparse attention on consumer Blackwells chooses, and no others."""
_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_LOAD_FORMATS = """auto hf dummy fastsafetensors instanttensor ipc_cache mistral modelexpress
    npcache pt runai_streamer runai_streamer_sharded safetensors sharded_state tensorizer"""
_QUANTIZING_FORMATS = frozenset({"bitsandbytes", "gguf"})
"""Formats that quantize, which versions before 0.27 have."""
_COMPILATION_KEYS = """mode debug_dump_path cache_dir compile_cache_save_format backend custom_ops
    ir_enable_torch_wrap splitting_ops compile_mm_encoder cudagraph_mm_encoder
    encoder_cudagraph_token_budgets encoder_cudagraph_max_vision_items_per_batch
    encoder_cudagraph_max_frames_per_batch cudagraph_decoder_replay
    decoder_replay_cudagraph_capture_sizes decoder_replay_trim_threshold compile_sizes
    compile_ranges_endpoints compile_ranges_split_points inductor_compile_config inductor_passes
    cudagraph_mode cudagraph_num_of_warmups cudagraph_capture_sizes cudagraph_copy_inputs
    cudagraph_specialize_lora use_inductor use_inductor_graph_partition pass_config
    max_cudagraph_capture_size dynamic_shapes_config local_cache_dir fast_moe_cold_start
    bs_to_padded_graph_size level use_cudagraph full_cuda_graph max_capture_size"""
"""Of all versions."""


def check_device(spec: ModelSpec, device: Device | None, rules: Rules) -> None:
    """Whether kernels for the model's weights and attention run on the device.

    Raises:
        UsageError: they do not.
    """
    capability = None if device is None or device.kind != "cuda" else device.capability
    if device is None or capability is None:
        return
    if spec.quantization is not None:
        name = spec.quantization.name
        needed = _needed(name, rules)
        if capability < needed:
            raise UsageError(
                f"{name} needs compute capability {_dotted(needed)}, and {device.name} has "
                f"{_dotted(capability)}",
                hint=f"a newer GPU, such as {_example(needed)}; or a checkpoint that is not "
                "quantized so",
            )
    chosen = {latent.index_topk for latent in latents(spec) if latent.index_topk}
    if (chosen or has_compressed(spec)) and capability[0] not in _SPARSE_MAJORS:
        raise UsageError(
            f"{spec.architecture} attends sparsely, for which vLLM has no kernel on {device.name}, "
            f"of compute capability {_dotted(capability)}",
            hint=f"a Hopper or a Blackwell, such as {_example((9, 0))}",
        )
    if capability[0] == 12 and any(chosen) and chosen != {_SM120_CHOSEN}:
        raise UsageError(
            f"{spec.architecture} chooses {max(map(int, chosen))} tokens to attend to, and vLLM's "
            f"kernel on {device.name} {_SM120_CHOSEN}",
            hint=f"a data center GPU, such as {_example((9, 0))}",
        )


def check_options(spec: ModelSpec, resolved: Resolved, rules: Rules) -> None:
    """Whether vLLM starts with these options.

    Raises:
        UsageError: it does not.
        UnsupportedModelError: it does, and what they do to memory is not modelled.
    """
    asked = resolved.asked
    if asked.dtype in ("half", "float16") and spec.model_type in UNSTABLE_IN_FLOAT16:
        raise UsageError(
            f"--dtype {asked.dtype} overflows in {spec.model_type}, and vLLM refuses it",
            hint="--dtype bfloat16 or float32",
        )
    if asked.enable_expert_parallel and not any(isinstance(x.mlp, MoE) for x in spec.layers):
        raise UsageError(
            f"--enable-expert-parallel, and {spec.architecture} has no experts",
            hint="leave it out: it is for mixtures of experts",
        )
    length, tokens = resolved.max_model_len.value, resolved.max_num_batched_tokens.value
    if asked.enable_chunked_prefill is False and tokens < length:
        raise UsageError(
            f"--no-enable-chunked-prefill, and --max-num-batched-tokens {tokens} is less than the "
            f"context of {length} tokens",
            hint="prompts in one piece need a step as long: raise the one or lower the other",
        )
    _check_cache(spec, asked)
    _check_lora(asked)
    _check_loading(asked, rules)
    _check_compilation(asked)


def _check_cache(spec: ModelSpec, asked: PlanOptions) -> None:
    if asked.kv_cache_dtype == "float32":
        raise UsageError(
            "--kv-cache-dtype float32, which vLLM does not know",
            hint="leave it out: the cache has the dtype of computation",
        )
    sparse = has_compressed(spec) or any(latent.index_topk for latent in latents(spec))
    if asked.kv_cache_dtype == "fp8_ds_mla" and not sparse:
        raise UsageError(
            f"--kv-cache-dtype fp8_ds_mla, and {spec.architecture} does not attend sparsely",
            hint="--kv-cache-dtype fp8; those rows are DeepSeek V3.2's",
        )


def _check_lora(asked: PlanOptions) -> None:
    if asked.max_lora_rank not in _RANKS:
        raise UsageError(
            f"--max-lora-rank {asked.max_lora_rank}, for which vLLM has no kernels",
            hint="one of " + ", ".join(map(str, _RANKS)),
        )
    cpu = asked.max_cpu_loras
    if asked.enable_lora and cpu is not None and cpu < asked.max_loras:
        raise UsageError(
            f"--max-cpu-loras {cpu} is less than --max-loras {asked.max_loras}",
            hint="the host keeps every adapter that a batch may use",
        )


def _check_loading(asked: PlanOptions, rules: Rules) -> None:
    word = asked.load_format.lower()
    if word in _QUANTIZING_FORMATS and rules.minor < (0, 27):
        raise UnsupportedModelError(
            f"--load-format {word}, which quantizes while it loads, is not modelled",
            hint="plan --quantization fp8, or a checkpoint that `tightfit quantize` writes",
        )
    known = _LOAD_FORMATS.split()
    if word not in known:
        raise UsageError(f"unknown --load-format {asked.load_format!r}", hint=", ".join(known))


def _check_compilation(asked: PlanOptions) -> None:
    config, known = asked.compilation_config, _COMPILATION_KEYS.split()
    for key in config:
        if key not in known:
            from difflib import get_close_matches

            close = get_close_matches(key, known, n=3)
            raise UsageError(
                f"--compilation-config has {key!r}, which vLLM does not know",
                hint=f"did you mean {' or '.join(close)}?" if close else "such as cudagraph_mode",
            )
    mode = config.get("mode")
    if isinstance(mode, int) and not 0 <= mode <= 3:
        raise UsageError(f"--compilation-config has the mode {mode}", hint="0 to 3")


def _needed(name: str, rules: Rules) -> Capability:
    """The least compute capability of a method; `name` is a `Quantization`'s."""
    if name.startswith("modelopt (FP8"):
        return _AMPERE if rules.modelopt_fp8_on_ampere else _ADA
    if "fp w4" in name and "group 32" in name:
        return _METHODS["mxfp4"]
    method = name.partition(" ")[0]
    return _METHODS.get(name) or _METHODS.get(method, _TURING)


def _dotted(capability: Capability) -> str:
    return ".".join(map(str, capability))


def _example(needed: Capability) -> str:
    """A device of the catalogue that is new enough, and not newer than it has to be."""
    found = (one for one in CATALOGUE.values() if (one.capability or (0, 0)) >= needed)
    return min(found, key=lambda one: (one.capability or (0, 0), one.total_bytes)).name
