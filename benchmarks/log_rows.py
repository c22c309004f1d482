"""Rows of public start-up logs as options of a plan, with what has to be assumed for them."""

import ast
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tightfit.errors import UnsupportedModelError, UsageError
from tightfit.planner.devices import CATALOGUE, Device
from tightfit.planner.options import PlanOptions
from tightfit.units import GiB

GPUS = {
    "NVIDIA A100 40GB": "a100-40gb",
    "NVIDIA A100 80GB": "a100-80gb",
    "NVIDIA A100-SXM4-80GB": "a100-80gb",
    "NVIDIA A40": "a40-48gb",
    "NVIDIA A10": "a10-24gb",
    "NVIDIA A10G": "a10g-24gb",
    "NVIDIA L4": "l4-24gb",
    "NVIDIA L40S": "l40s-48gb",
    "NVIDIA RTX A6000": "rtxa6000-48gb",
    "NVIDIA GeForce RTX 3090": "rtx3090-24gb",
    "NVIDIA GeForce RTX 4080": "rtx4080-16gb",
    "NVIDIA GeForce RTX 4090": "rtx4090-24gb",
    "NVIDIA GeForce RTX 5090": "rtx5090-32gb",
    "NVIDIA GB10": "gb10-128gb",
    "NVIDIA H100 80GB HBM3": "h100-80gb",
    "NVIDIA H100 PCIe": "h100-pcie-80gb",
    "NVIDIA H800": "h800-80gb",
    "NVIDIA H200": "h200-141gb",
    "NVIDIA B200": "b200-180gb",
    "AMD Instinct MI300X": "mi300x-192gb",
    "AMD Instinct MI355": "mi355x-288gb",
    "Tesla T4": "t4-16gb",
}
"""As logs name them; `NVIDIA A100` alone may have 40 or 80 GB."""

BUILDS = {"0.1.dev18496": "0.25.1"}
"""Builds without a release in their name, by the release of their time (July 2026)."""

_FITS, _REST = 0.87, 0.3
"""A device is inferred where weights and KV cache fill this share of what it would grant, and leave
so many GiB for the rest."""


def version_of(row: Mapping[str, Any]) -> str:
    """The release that a build belongs to.

    Raises:
        UsageError: none is known.
    """
    text = row.get("vllm_version") or ""
    text = BUILDS.get(text.split("+")[0], text)
    match = re.match(r"(\d+\.\d+\.\d+)", text)
    if match is None:
        raise UsageError(f"no release: {text or 'version not printed'}")
    return match[1]


def device_of(row: Mapping[str, Any], utilization: float) -> tuple[Device, bool]:
    """The device, and whether it was inferred from how much was used.

    Raises:
        UsageError: it is neither named nor to be inferred.
    """
    printed, name = row.get("total_gpu_gib"), row.get("gpu")
    known = CATALOGUE.get(GPUS.get(name or "", ""))
    if known is not None:
        if printed:
            known = replace(known, total_bytes=int(printed * GiB))
        return known, False
    used = (row.get("model_load_gib") or 0) + (row.get("available_kv_gib") or 0)
    for device in CATALOGUE.values():
        budget = device.total_bytes / GiB * utilization
        near = abs(printed / device.total_bytes * GiB - 1) < 0.005 if printed else None
        if printed is None:
            near = device.logged and device.kind == "cuda" and used + _REST < budget < used / _FITS
        if near:
            total = int(printed * GiB) if printed else device.total_bytes
            chosen = device
            if 78 < total / GiB < 80:
                # The default of the server is 2048 tokens on an A100 and 8192 on an H100.
                small = (row.get("max_num_batched_tokens") or 8192) <= 2048
                chosen = CATALOGUE["a100-80gb" if small else "h100-80gb"]
            return replace(chosen, total_bytes=total), not printed
    raise UsageError(f"GPU {name or 'not named'}, and none fits what was used")


def _packed(bits: int, kind: str, **weights: Any) -> dict[str, Any]:
    scheme = {"num_bits": bits, "type": kind, "symmetric": True, **weights}
    return {"targets": ["Linear"], "weights": scheme, "input_activations": None}


def _compressed(form: str, group: dict[str, Any]) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def assumed_quantization(row: Mapping[str, Any]) -> dict[str, Any] | None:
    """A likely `quantization_config` for a checkpoint of which only the base config is known.

    Raises:
        UnsupportedModelError: the method says too little.
    """
    method, name = row.get("quantization"), str(row.get("model_basename")).lower()
    if method in (None, "None"):
        return None
    if method in ("awq", "awq_marlin"):
        return {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True} | {
            "version": "gemm"
        }
    if method == "fp8":
        return {"quant_method": "fp8", "activation_scheme": "dynamic"} | {
            "weight_block_size": [128, 128]
        }
    if method == "modelopt_fp4":
        return {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]} | {
            "group_size": 16
        }
    if method == "compressed-tensors":
        if "nvfp4" in name:
            group = _packed(4, "float", strategy="tensor_group", group_size=16)
            return _compressed("nvfp4-pack-quantized", group)
        if "int4" in name or "awq" in name or "4bit" in name:
            group = _packed(4, "int", strategy="group", group_size=128)
            return _compressed("pack-quantized", group)
        if "fp8" in name:
            group = _packed(8, "float", strategy="channel", dynamic=False)
            dynamic = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}
            return _compressed("float-quantized", group | {"input_activations": dynamic})
    raise UnsupportedModelError(f"quantization {method} of {row.get('model_basename')} is unclear")


def config_of(row: Mapping[str, Any], config: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """The config of what was run, and whether its quantization is assumed.

    Raises:
        UnsupportedModelError: the quantization says too little.
    """
    method = row.get("quantization")
    inside = config.get("quantization_config") or {}
    if method in (None, "None"):
        return {key: value for key, value in config.items() if key != "quantization_config"}, False
    if inside.get("quant_method") in (method, str(method).removesuffix("_marlin")):
        return config, False
    return {**config, "quantization_config": assumed_quantization(row)}, True


def check(row: Mapping[str, Any]) -> None:
    """Leave out what plans do not model, and what the log says too little of.

    Raises:
        UsageError: the reason.
    """
    if row.get("engine") == "V0":
        raise UsageError("the engine before V1")
    if row.get("speculative"):
        raise UsageError("speculative decoding")
    if not row.get("tp"):
        raise UsageError("tensor parallel size not printed")


def options_of(row: Mapping[str, Any], device: Device, version: str | None = None) -> PlanOptions:
    """The options of a start-up; `version` plans it as another version."""
    given: dict[str, Any] = {
        "tensor_parallel_size": row["tp"],
        "pipeline_parallel_size": row.get("pp") or 1,
        "data_parallel_size": row.get("dp") or 1,
        "enable_expert_parallel": bool(row.get("ep")),
        "max_model_len": row.get("max_model_len"),
        "max_num_seqs": row.get("max_num_seqs"),
        "max_num_batched_tokens": row.get("max_num_batched_tokens"),
        "gpu_memory_utilization": row.get("gpu_memory_utilization") or row.get("util_printed"),
        "dtype": (row.get("dtype") or "auto").removeprefix("torch."),
        "kv_cache_dtype": row.get("kv_cache_dtype") or "auto",
        "block_size": row.get("block_size"),
        "enforce_eager": bool(row.get("enforce_eager")),
        # As Python writes it, in the log.
        "limit_mm_per_prompt": ast.literal_eval(row.get("limit_mm_per_prompt") or "{}"),
        "language_model_only": bool(row.get("language_model_only")),
    }
    if row.get("enable_prefix_caching") in ("True", "False"):
        given["enable_prefix_caching"] = row["enable_prefix_caching"] == "True"
    if not given["enforce_eager"]:
        given["max_cudagraph_capture_size"] = row.get("max_cudagraph_capture_size") or None
        mode = str(row.get("cudagraph_mode") or "").rsplit(".", 1)[-1]
        if mode:
            given["compilation_config"] = {"cudagraph_mode": mode}
    return PlanOptions(
        engine="vllm", engine_version=version or version_of(row), device=device, **given
    )
