"""What `tightfit plan` costs, beside an empty Python and beside `accelerate estimate-memory`.

accelerate reads its config from the Hub; here a loopback server stands in for it.
"""

import os
import sys
import tempfile
from pathlib import Path

from measure import arguments, compare, record, show

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from support.hub_server import HubServer  # noqa: E402

CONFIG = ROOT / "tests" / "data" / "configs" / "Llama-3.1-8B.json"


def main() -> None:
    options = arguments(__doc__, rounds=10)
    python, scripts = sys.executable, Path(sys.executable).parent
    plan = [python, "-m", "tightfit", "plan", str(CONFIG), "--json"]
    with HubServer() as hub, tempfile.TemporaryDirectory() as cache:
        hub.add("bench/llama-8b", {"config.json": CONFIG.read_bytes()})
        accelerate = [str(scripts / "accelerate"), "estimate-memory", "bench/llama-8b"]
        result = compare(
            {
                "python -c pass": [python, "-c", "pass"],
                "tightfit plan --json": plan,
                "tightfit plan --json, 8 H100": [*plan, "-tp", "8", "--gpu", "h100-80gb"],
                "tightfit plan, drawn": plan[:-1],
                "accelerate estimate-memory": [*accelerate, "--library_name", "transformers"],
            },
            rounds=options.rounds,
            environment=os.environ | hub.env(Path(cache)),
        )
    show(result)
    if options.record:
        record("plan_start", result)


if __name__ == "__main__":
    main()
