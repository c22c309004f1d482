"""Runs at the edge: the largest KV cache that `plan` gives a GPU, under the worst step.

    python benchmarks/edge_cases.py --out rows.jsonl [NAME ...]

Each case is a published shape with random weights. `run --check` gets all of the GPU but a
thousandth, so that a byte too many of the plan is out of memory; and `plan` has to refuse a pool
that is 3 % larger. A name is one of CASES, or the beginning of some.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CONFIGS = Path(__file__).parents[1] / "tests" / "data" / "configs"
UTILIZATION = "0.999"
MIB = 1024**2
SECONDS = 240

CASES: dict[str, tuple[str, str]] = {
    "llama-8b-long": ("Llama-3.1-8B", "--max-num-seqs 64"),
    "llama-8b-wide": ("Llama-3.1-8B", "--max-model-len 8192 --max-num-seqs 512"),
    "llama-8b-fp8-cache": ("Llama-3.1-8B", "--max-model-len 32768 --kv-cache-dtype fp8"),
    "qwen3-8b-fp8": ("Qwen3-8B-FP8", "--max-model-len 32768"),
    "qwen3-30b-fp8": ("Qwen3-30B-A3B-FP8", "--max-model-len 32768"),
    "qwen3-32b-fp8-eager": ("Qwen3-32B-FP8", "--max-model-len 16384 --enforce-eager"),
    "gpt-oss": ("gpt-oss-20b", "--max-model-len 32768"),
    "deepseek-v2-lite": ("DeepSeek-V2-Lite", "--max-model-len 16384"),
    "glm-4.7-flash": ("GLM-4.7-Flash", "--max-model-len 16384 --max-num-seqs 64"),
    "gemma-3-12b": ("gemma-3-12b-it", "--max-model-len 32768 --max-num-seqs 128"),
    "gemma-2-9b": ("gemma-2-9b", "--max-model-len 8192"),
    "olmo-2-7b": ("OLMo-2-7B", "--max-model-len 4096"),
    "granite-3.3-8b": ("granite-3.3-8b-instruct", "--max-model-len 16384 --max-num-seqs 512"),
    "granite-4.0-h": ("granite-4.0-h-small", "--max-model-len 8192 --max-num-seqs 64"),
    "qwen1.5-moe": ("Qwen1.5-MoE-A2.7B", "--max-model-len 8192"),
    "qwen3-0.6b": ("Qwen3-0.6B", "--max-model-len 40960 --max-num-seqs 1024"),
    "qwen2.5-14b": (
        "Qwen2.5-14B",
        "--max-model-len 16384 --max-num-seqs 1024 --max-num-batched-tokens 16384",
    ),
    "phi-4": ("phi-4", "--max-model-len 8192 --max-num-batched-tokens 2048"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--pipeline-parallel-size", type=int, default=1)
    parser.add_argument("--out", type=Path, help="a JSON document for each case, in lines")
    options = parser.parse_args()
    ranks = [
        f"--tensor-parallel-size={options.tensor_parallel_size}",
        f"--pipeline-parallel-size={options.pipeline_parallel_size}",
    ]
    chosen = [
        name
        for name in CASES
        if not options.names or any(name.startswith(begin) for begin in options.names)
    ]
    rows = []
    for name in chosen:
        row = run(name, *CASES[name], ranks)
        rows.append(row)
        print(line(row), flush=True)
        if options.out:
            with options.out.open("a", encoding="utf-8") as out:
                out.write(json.dumps(row) + "\n")
    survived = sum(row["survived"] for row in rows)
    refused = sum(row["refuses_more"] for row in rows)
    judged = sum(row["exit_code"] == 0 for row in rows)
    print(f"{len(rows)} cases: {survived} survived, {judged} as planned, {refused} refuse 3 % more")


def run(name: str, config: str, flags: str, ranks: list[str]) -> dict[str, Any]:
    """The case's answers: of `run --check`, and of `plan` about a larger pool."""
    with tempfile.TemporaryDirectory() as directory:
        model = Path(directory) / config
        model.mkdir()
        (model / "config.json").write_bytes((CONFIGS / f"{config}.json").read_bytes())
        common = [str(model), *flags.split(), *ranks, "--json"]
        began = time.monotonic()
        code, document, errors = tightfit(
            "run", *common, "--check", "--load-format=dummy", "--device=cuda",
            f"--gpu-memory-utilization={UTILIZATION}",
        )  # fmt: skip
        row: dict[str, Any] = {
            "name": name,
            "config": config,
            "flags": flags,
            "ranks": ranks,
            "exit_code": code,
            "seconds": round(time.monotonic() - began, 1),
            "survived": "checks" in document,
            "refuses_more": False,
            "errors": errors[-1500:] if code else "",
        }
        if row["survived"]:
            row["checks"] = document["checks"]
            row["left_bytes"] = document.get("left_bytes")
            cache, device = document["kv_cache"], document["device"]
            row["pool_bytes"] = cache["num_blocks"] * cache["bytes_per_block"]
            code, larger, _ = tightfit(
                "plan", *common, "--engine=builtin",
                f"--gpu-memory={device['total_bytes']}",
                f"--gpu-memory-utilization={UTILIZATION}",
                f"--kv-cache-memory-bytes={int(row['pool_bytes'] * 1.03)}",
            )  # fmt: skip
            row["refuses_more"] = code == 1 and not larger["verdict"]["fits"]
    return row


def tightfit(*arguments: str) -> tuple[int, dict[str, Any], str]:
    command = [sys.executable, "-m", "tightfit", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return 124, {}, f"more than {SECONDS} seconds"
    document = json.loads(done.stdout) if done.stdout.startswith("{") else {}
    return done.returncode, document, done.stderr


def line(row: dict[str, Any]) -> str:
    if not row["survived"]:
        return f"{row['name']}: exit {row['exit_code']}: {row['errors'][-600:]}"
    worst = max(
        (check for check in row["checks"] if check["component"] != "total"),
        key=lambda check: abs(check["difference_bytes"]),
    )
    totals = [check for check in row["checks"] if check["component"] == "total"]
    total = max(totals, key=lambda check: abs(check["difference_bytes"]))
    return (
        f"{row['name']}: exit {row['exit_code']}, "
        f"total {total['difference_bytes'] / MIB:+.0f} MiB, "
        f"worst {worst['component']} {worst['difference_bytes'] / MIB:+.1f} MiB, "
        f"more {'refused' if row['refuses_more'] else 'NOT REFUSED'}, {row['seconds']} s"
    )


if __name__ == "__main__":
    main()
