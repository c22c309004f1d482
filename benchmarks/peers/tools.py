"""The planners that run without a network: how each is installed, asked and read."""

import json
import re
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.probes import TOKENS

GiB = 2**30

Answer = tuple[float | None, float | None]
"""Bytes of the weights, and of what one sequence keeps; None where nothing was said."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """A planner in an environment of its own."""

    name: str
    requirements: tuple[str, ...] = ()
    ask: Callable[[Path, str, Path], list[str]]
    """The command, from the environment's `bin`, a repository and a file for its output."""
    read: Callable[[str], Answer]
    package: str | None = None
    """Its import package, where it names the Hub's address instead of asking for it."""
    rounds: int = 3


def _after_brace(text: str) -> Any:
    return json.loads(text[text.index("{") :])


def _hf_mem(text: str) -> Answer:
    found = _after_brace(text)
    return found.get("memory"), found.get("kv_cache")


def _kvfit(text: str) -> Answer:
    found = _after_brace(text)
    return found["weights"]["bytes"], found["cache"]["bytes_per_sequence"]


def _vramscout(text: str) -> Answer:
    found = _after_brace(text)
    if "error" in found:
        raise ValueError(found["error"])
    parts = found["parts_gib"]
    weights = next(value for name, value in parts.items() if name.startswith("Model weights"))
    caches = [v for name, v in parts.items() if re.search(r"cache|state", name, re.IGNORECASE)]
    return weights * GiB, sum(caches) * GiB if caches else None


def _ridgepoint(text: str) -> Answer:
    found = _after_brace(text)
    return found["memory"]["weights_bytes"]["best"], found["capacity"]["bytes_per_seq"]


def _llm_d_planner(text: str) -> Answer:
    found = _after_brace(text)
    detail = found.get("kv_cache_detail") or {}
    cache = detail.get("per_request_kv_cache_gb")
    return found["model_memory_gb"] * GiB, cache and cache * GiB


def _accelerate(text: str) -> Answer:
    row = re.search(r"│float16│[^│]*│\s*([\d.]+) (KB|MB|GB|TB)", text)
    assert row is not None
    return float(row[1]) * 1024 ** ("KB", "MB", "GB", "TB").index(row[2]) * 1024, None


def _hf_vram_calc(text: str) -> Answer:
    found = _after_brace(text)["memory_requirements"][0]
    return found["model_size_gib"] * GiB, found["kv_cache_size_gib"] * GiB


def tightfit_answer(text: str) -> Answer:
    """What `tightfit plan --json` says: the published weights, and what the model itself needs."""
    found = json.loads(text)
    return found["model"]["checkpoint_bytes"], found["kv_cache"]["one_sequence"]["minimum_bytes"]


TOOLS: Sequence[Tool] = (
    Tool(
        name="kvfit",
        requirements=("kvfit==0.3.0",),
        ask=lambda at, repo, _: [
            *(f"{at}/kvfit", repo, "--hardware", "h200", "--gpus", "8"),
            *("--context", str(TOKENS), "--kv-dtype", "bf16", "--json"),
        ],
        read=_kvfit,
        package="kvfit",
    ),
    Tool(
        name="hf-mem",
        requirements=("hf-mem==0.5.6",),
        ask=lambda at, repo, _: [
            *(f"{at}/hf-mem", "--model-id", repo, "--experimental", "--json-output"),
            *("--max-model-len", str(TOKENS), "--kv-cache-dtype", "bfloat16"),
        ],
        read=_hf_mem,
        package="hf_mem",
    ),
    Tool(
        name="ridgepoint",
        requirements=("ridgepoint==0.1.2",),
        ask=lambda at, repo, _: [
            *(f"{at}/ridgepoint", "fit", repo, "--gpu", "h200-141gb:8", "--json"),
            *("--ctx", str(TOKENS), "--kv-cache-dtype", "bf16"),
        ],
        read=_ridgepoint,
        package="ridgepoint",
    ),
    Tool(
        name="vramscout",
        requirements=("vramscout==0.7.0",),
        ask=lambda at, repo, _: [
            *(f"{at}/vramscout", repo, "--engine", "vllm", "--vram-gib", "1128", "--json"),
            *("--context", str(TOKENS), "--kv-dtype", "bf16"),
        ],
        read=_vramscout,
    ),
    Tool(
        name="llm-d-planner",
        requirements=("llm-d-planner[estimation]==0.3.3",),
        ask=lambda at, repo, _: [
            *(f"{at}/planner", "plan", "--model", repo),
            *("--max-model-len", str(TOKENS), "--gpu-memory", "141"),
        ],
        read=_llm_d_planner,
        rounds=1,
    ),
    Tool(
        name="accelerate",
        requirements=("accelerate==1.15.0", "transformers==5.23.0", "torch", "huggingface_hub"),
        ask=lambda at, repo, _: [
            *(f"{at}/accelerate", "estimate-memory", repo),
            *("--library_name", "transformers", "--dtypes", "float16"),
        ],
        read=_accelerate,
        rounds=1,
    ),
    Tool(
        name="hf-vram-calc",
        requirements=("hf-vram-calc==1.0.9",),
        ask=lambda at, repo, out: [
            *(f"{at}/hf-vram-calc", "--model", repo, "--dtype", "bf16"),
            *("--max_seq_len", str(TOKENS), "--output_json", str(out)),
        ],
        read=_hf_vram_calc,
        rounds=1,
    ),
)


def install(tool: Tool, environments: Path, torch: str) -> Path:
    """The `bin` of the tool's environment, made the first time.

    Raises:
        subprocess.CalledProcessError: it cannot be installed.
    """
    environment = environments / tool.name
    done = environment / ".installed"
    if not done.exists():
        environments.mkdir(parents=True, exist_ok=True)
        constraints = environments / "constraints.txt"
        # The builds with CUDA are gigabytes larger, and no planner computes anything.
        constraints.write_text(f"torch=={torch}\n")
        _call("uv", "venv", "-q", "--clear", str(environment))
        python = str(environment / "bin" / "python")
        _call(
            "uv",
            "pip",
            "install",
            "-q",
            "--python",
            python,
            "-c",
            str(constraints),
            *tool.requirements,
        )
        done.touch()
    return environment / "bin"


def _call(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


def redirect(tool: Tool, at: Path, url: str) -> None:
    """Let a tool that names the Hub's address in its code ask the loopback one."""
    if tool.package is None:
        return
    (package,) = (at.parent / "lib").glob(f"python*/site-packages/{tool.package}")
    for file in package.rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        changed = re.sub(r"https://huggingface\.co|http://127\.0\.0\.1:\d+", url, text)
        if changed != text:
            file.write_text(changed, encoding="utf-8")
