"""Write down what compressed-tensors stores and what vLLM makes room for, for tiny models.

usage: PYTHON_OF_VLLM make_quantized_data.py OUT.json

Run by the interpreter of an environment with vLLM's CPU build; needs no GPU, because models are
built on the meta device and kernels are not. The tests read the file: they need neither package.
"""

import importlib
import json
import os
import pkgutil
import sys
import tempfile
from unittest.mock import MagicMock

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "vocab_size": 320,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 512,
    "hidden_act": "silu",
}
EXPERTS = {
    **LLAMA,
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 256,
    "norm_topk_prob": True,
    "mlp_only_layers": [],
    "decoder_sparse_step": 1,
}
PRESETS = (
    "W8A16",
    "W4A16",
    "W4A16_ASYM",
    "INT8",
    "FP8",
    "FP8_DYNAMIC",
    "FP8_BLOCK",
    "NVFP4A16",
    "NVFP4",
    "MXFP4",
    "MXFP8",
)
_GATE = "model.layers.0.mlp.gate"
_KEPT = ["lm_head", _GATE]
_GPTQ = {
    "quant_method": "gptq",
    "desc_act": False,
    "sym": True,
    "modules_in_block_to_quantize": ["_proj", "experts"],
}
OTHERS = {
    "fp8 static": {
        "quant_method": "fp8",
        "activation_scheme": "static",
        "modules_to_not_convert": _KEPT,
    },
    "fp8 dynamic": {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "modules_to_not_convert": _KEPT,
    },
    "fp8 block": {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": _KEPT,
    },
    "gptq": {**_GPTQ, "bits": 4, "group_size": 128},
    "gptq 8 bits, no groups": {**_GPTQ, "bits": 8, "group_size": -1},
    "awq": {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 64,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": ["lm_head", "mlp.gate."],
    },
    "fbgemm": {
        "quant_method": "fbgemm_fp8",
        "activation_scale_ub": 1200.0,
        "modules_to_not_convert": _KEPT,
    },
    **{
        f"modelopt {algorithm}": {
            "quant_method": "modelopt",
            "quant_algo": algorithm,
            "ignore": ["lm_head", "*.mlp.gate"],
        }
        for algorithm in ("FP8", "NVFP4", "W4A16_NVFP4", "MXFP8")
    },
}


def compressed(preset):
    """The config and the tensors that compressed-tensors writes for a preset."""
    import torch
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationConfig,
        QuantizationStatus,
        apply_quantization_config,
        preset_name_to_scheme,
    )
    from transformers import LlamaConfig, LlamaForCausalLM

    known = {key: value for key, value in LLAMA.items() if key not in ("architectures",)}
    model = LlamaForCausalLM(LlamaConfig(**known)).to(torch.bfloat16)
    config = QuantizationConfig(
        config_groups={"group_0": preset_name_to_scheme(preset, ["Linear"])},
        ignore=["lm_head"],
        quantization_status=QuantizationStatus.COMPRESSED,
    )
    apply_quantization_config(model, config)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and "scale" in name:
                parameter.data = torch.ones_like(parameter.data.float()).to(parameter.dtype)
            if parameter is not None and "zero_point" in name:
                parameter.data.zero_()
        if hasattr(module, "quantization_scheme"):
            module.quantization_status = QuantizationStatus.FROZEN
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    written = json.loads(compressor.quantization_config.model_dump_json())
    return written, {name: _line(tensor) for name, tensor in model.state_dict().items()}


def held(config, tensor_parallel_size):
    """What rank 0 of vLLM makes room for."""
    import torch
    import vllm.distributed.parallel_state as parallel_state
    from vllm.config import ModelConfig, VllmConfig, set_current_vllm_config
    from vllm.model_executor.model_loader.utils import initialize_model

    with tempfile.TemporaryDirectory() as directory:
        with open(f"{directory}/config.json", "w", encoding="utf-8") as file:
            json.dump(config, file)
        model_config = ModelConfig(
            model=directory,
            skip_tokenizer_init=True,
            dtype="bfloat16",
            allow_deprecated_quantization=True,
        )
    vllm_config = VllmConfig(model_config=model_config)
    vllm_config.parallel_config.tensor_parallel_size = tensor_parallel_size
    for name in ("_TP", "_WORLD", "_PP", "_DP", "_EP", "_DCP", "_PCP"):
        if hasattr(parallel_state, name):
            size = tensor_parallel_size if name in ("_TP", "_WORLD") else 1
            group = MagicMock(world_size=size, rank_in_group=0, rank=0, local_rank=0)
            group.is_first_rank = group.is_last_rank = True
            setattr(parallel_state, name, group)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with set_current_vllm_config(vllm_config), torch.device("meta"):
            model = initialize_model(vllm_config)
    finally:
        torch.set_default_dtype(torch.float32)
    return {name: _line(parameter) for name, parameter in model.named_parameters()}


def without_kernels():
    """Kernels are for GPUs: choose none."""
    import vllm.model_executor.layers.quantization as package
    import vllm.model_executor.models.registry as registry

    registry._run_in_subprocess = lambda function: function()
    for found in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        try:
            module = importlib.import_module(found.name)
        except Exception:
            continue
        for name in dir(module):
            if name.startswith("init_") and name.endswith("_linear_kernel"):
                setattr(module, name, MagicMock())
            if name.startswith("select_") and name.endswith("_moe_backend"):
                setattr(module, name, lambda *_, **__: (MagicMock(), MagicMock()))
            if name in ("expose_input_quant_key", "verify_marlin_supported"):
                setattr(module, name, MagicMock())
            if name == "choose_mp_linear_kernel":
                # Its name is logged.
                setattr(module, name, lambda *_, **__: type("Kernel", (MagicMock,), {}))


def _line(tensor):
    return " ".join([str(tensor.dtype).removeprefix("torch."), *map(str, tensor.shape)])


def main():
    # Not at import: tests read the configurations above in processes that start vLLM themselves.
    os.environ |= {
        "VLLM_TARGET_DEVICE": "cpu",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    import compressed_tensors

    import vllm

    without_kernels()
    sections, stored = dict(OTHERS), {}
    for preset in PRESETS:
        sections[preset], stored[preset] = compressed(preset)
    answer = {
        "versions": {
            "vllm": vllm.__version__,
            "compressed_tensors": compressed_tensors.__version__,
        },
        "sections": sections,
        "stored": stored,
        "held": {},
    }
    for name, section in sections.items():
        for model, config in (("dense", LLAMA), ("experts", EXPERTS)):
            given = json.loads(json.dumps(section))
            if "config_groups" in given:
                given["ignore"] = [*given["ignore"], _GATE]
            try:
                found = held({**config, "quantization_config": given}, 2)
            except Exception as error:
                print(f"{name}, {model}: {type(error).__name__}: {error}"[:200], file=sys.stderr)
                continue
            answer["held"][f"{name}, {model}"] = {
                key: line for key, line in found.items() if ".layers." in key and "norm" not in key
            }
    with open(sys.argv[1], "w", encoding="utf-8") as file:
        json.dump(answer, file, indent=1)
        file.write("\n")


if __name__ == "__main__":
    main()
