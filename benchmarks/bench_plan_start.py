"""What `tightfit plan` costs, beside an empty Python and beside `accelerate estimate-memory`.

Every answer is a process of its own, from the interpreter's start to the printed document. A plan
should take less than 0.35 s of CPU time, a sweep of 100 points less than 1 s, and either less than
60 MB. accelerate reads its config from the Hub; here a loopback server stands in for it.
"""

import os
import sys
import tempfile
from pathlib import Path

from measure import arguments, compare, record, show

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from support.hub_server import HubServer  # noqa: E402

CONFIGS = ROOT / "tests" / "data" / "configs"
PLANS = {
    "Llama-3.2-1B": ("--gpu", "h100-80gb"),
    "Qwen3-235B-A22B": ("--gpu", "h100-80gb", "-tp", "8"),
    "DeepSeek-V3": ("--gpu", "h200-141gb", "-tp", "8"),
}
SWEEP = (
    *("--sweep", "tensor_parallel_size=1,2,4,8"),
    *("--sweep", "max_num_seqs=64,128,256,512,1024"),
    *("--sweep", "max_model_len=2k,4k,8k,16k,32k"),
)
"""4 x 5 x 5 = 100 plans."""


def main() -> None:
    options = arguments(__doc__, rounds=10)
    python, scripts = sys.executable, Path(sys.executable).parent
    commands = {"python -c pass": [python, "-c", "pass"]}
    for model, devices in PLANS.items():
        plan = [python, "-m", "tightfit", "plan", str(CONFIGS / f"{model}.json"), *devices]
        commands[f"plan {model}, drawn"] = plan
        commands[f"plan {model}, --json"] = [*plan, "--json"]
        sweep = [word for word in (*plan, "--json") if word not in ("-tp", "8")]
        commands[f"100 plans {model}, --json"] = [*sweep, *SWEEP]
    with HubServer() as hub, tempfile.TemporaryDirectory() as cache:
        config = (CONFIGS / "Llama-3.1-8B.json").read_bytes()
        hub.add("bench/llama-8b", {"config.json": config})
        commands["accelerate estimate-memory Llama-3.1-8B"] = [
            *(str(scripts / "accelerate"), "estimate-memory", "bench/llama-8b"),
            *("--library_name", "transformers"),
        ]
        result = compare(
            commands, rounds=options.rounds, environment=os.environ | hub.env(Path(cache))
        )
    show(result)
    if options.record:
        record("plan_start", result)


if __name__ == "__main__":
    main()
