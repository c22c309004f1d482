"""llm-compressor, asked for what `tightfit quantize` is asked for; runs where that is installed.

usage: llm_compressor.py MODEL OUT SCHEME [GROUP_SIZE]     without data, in this process
       llm_compressor.py --jobs FILE                        many, with data as well
       llm_compressor.py --import-only                      what starting costs

A job of FILE (a JSON list) has `model`, `out`, `scheme`, `group_size`, `method`, and for the
methods that need it `calibration` (a text file), `samples` and `length`. What needs no data goes
through `model_free_ptq`, everything else through `oneshot`, with the defaults of each. One line of
JSON is printed for each job.
"""

import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from llmcompressor import model_free_ptq, oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from llmcompressor.pipelines.cache import IntermediatesCache

if not torch.accelerator.is_available():
    # AWQ pins memory for a GPU, and fails where there is none. Nothing else is changed.
    IntermediatesCache.pin_memory = lambda *_: None  # type: ignore[method-assign]

_IGNORED = ["lm_head", "re:.*embed_tokens$"]
_TOKENS = {"num_bits": 8, "strategy": "token", "symmetric": True, "dynamic": True}
_NVFP4 = {
    "num_bits": 4,
    "type": "float",
    "strategy": "tensor_group",
    "group_size": 16,
    "scale_dtype": torch.float8_e4m3fn,
    "zp_dtype": torch.float8_e4m3fn,
}
_MX = {
    "type": "float",
    "strategy": "group",
    "group_size": 32,
    "scale_dtype": torch.uint8,
    "zp_dtype": torch.uint8,
}
_FLOAT8 = {"num_bits": 8, "type": "float"}
_WEIGHTS: dict[str, dict[str, Any]] = {
    "fp8-tensor": {**_FLOAT8, "strategy": "tensor"},
    "fp8-channel": {**_FLOAT8, "strategy": "channel"},
    "fp8-block": {**_FLOAT8, "strategy": "block", "block_structure": [128, 128]},
    "int8": {"num_bits": 8, "type": "int", "strategy": "channel"},
    "w8a16": {"num_bits": 8, "type": "int", "strategy": "group"},
    "w4a16": {"num_bits": 4, "type": "int", "strategy": "group"},
    "w4a16-asym": {"num_bits": 4, "type": "int", "strategy": "group", "symmetric": False},
    "nvfp4": _NVFP4,
    "nvfp4a16": _NVFP4,
    "mxfp4": {**_MX, "num_bits": 4},
    "mxfp8": {**_MX, "num_bits": 8},
}
_INPUTS: dict[str, dict[str, Any]] = {
    "fp8-tensor": {**_TOKENS, "type": "float"},
    "fp8-channel": {**_TOKENS, "type": "float"},
    "fp8-block": {**_TOKENS, "type": "float", "strategy": "group", "group_size": 128},
    "int8": {**_TOKENS, "type": "int"},
    "nvfp4": {**_NVFP4, "dynamic": "local", "observer": "static_minmax"},
    "mxfp8": {**_MX, "num_bits": 8, "dynamic": True},
}
_DATA_FREE = ("rtn", "mse")


def scheme(name: str, group_size: int | None, method: str) -> QuantizationScheme:
    """The same arguments as in the `quantization_config` that tightfit writes."""
    weights = {"symmetric": True, "dynamic": False, **_WEIGHTS[name]}
    if weights["strategy"] == "group" and "group_size" not in weights:
        weights["group_size"] = group_size or 128
    if method == "mse":
        weights["observer"] = "memoryless_mse"
    inputs = _INPUTS.get(name)
    return QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs(**weights),
        input_activations=QuantizationArgs(**inputs) if inputs else None,
    )


def needs_data(name: str, method: str) -> bool:
    """Also the activations of W4A4, which have a static global scale."""
    return method not in _DATA_FREE or name == "nvfp4"


def recipe(method: str, asked: QuantizationScheme) -> list[Any]:
    groups = {"group_0": asked}
    plain = QuantizationModifier(config_groups=groups, ignore=_IGNORED)
    match method:
        case "gptq":
            return [GPTQModifier(config_groups=groups, ignore=_IGNORED)]
        case "awq":
            return [AWQModifier(), plain]
        case "smoothquant":
            return [SmoothQuantModifier(), plain]
        case _:
            return [plain]


def calibrated(job: dict[str, Any], asked: QuantizationScheme) -> None:
    """`samples` windows of `length` tokens: the ones that tightfit draws as well."""
    from datasets import Dataset
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    text = Path(job["calibration"]).read_text()
    ids = tokenizer(text, add_special_tokens=False).input_ids
    length, first = job["length"], []
    if tokenizer.bos_token == "<bos>":
        first = [tokenizer.bos_token_id]
    step = length - len(first)
    chosen = random.Random(0).sample(range(len(ids) // step), job["samples"])
    windows = [first + ids[step * i : step * (i + 1)] for i in sorted(chosen)]
    data = {"input_ids": windows, "attention_mask": [[1] * length] * len(windows)}
    oneshot(
        model=job["model"],
        dataset=Dataset.from_dict(data),
        recipe=recipe(job["method"], asked),
        output_dir=job["out"],
        max_seq_length=length,
        num_calibration_samples=job["samples"],
    )


def carry_out(job: dict[str, Any]) -> None:
    asked = scheme(job["scheme"], job.get("group_size"), job["method"])
    if needs_data(job["scheme"], job["method"]):
        calibrated(job, asked)
    else:
        model_free_ptq(job["model"], job["out"], scheme=asked, ignore=_IGNORED, device="cpu")


def main() -> None:
    match sys.argv[1:]:
        case ["--import-only"]:
            return
        case ["--jobs", path]:
            for job in json.loads(Path(path).read_text()):
                started, error = time.process_time(), None
                try:
                    carry_out(job)
                except Exception as problem:
                    error = f"{type(problem).__name__}: {problem}"[:300]
                spent = round(time.process_time() - started, 1)
                print("JOB", json.dumps({**job, "cpu_seconds": spent, "error": error}), flush=True)
        case [model, out, name, *size]:
            job = {"model": model, "out": out, "scheme": name, "method": "rtn"}
            carry_out(job | {"group_size": int(size[0]) if size else None})
        case _:
            raise SystemExit(__doc__)


if __name__ == "__main__":
    main()
