"""The built-in runtime under loads: tightfit_loads.py JOB ANSWERS (`runtime_speed.py` calls it)."""

import json
import sys
import time
from pathlib import Path

from loads import load_of

from tightfit.planner.api import plan_model
from tightfit.planner.devices import this_machine
from tightfit.planner.nvml import this_gpu
from tightfit.planner.options import PlanOptions
from tightfit.runtime.bench import measure
from tightfit.runtime.options import EngineOptions
from tightfit.runtime.ranks.lockstep import Lockstep
from tightfit.runtime.ranks.world import World
from tightfit.runtime.session import start


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    on_gpu = job["device"] == "cuda"
    has_weights = any(Path(job["model"]).glob("*.safetensors"))
    options = PlanOptions(
        engine="builtin",
        device=this_gpu().device() if on_gpu else this_machine(),
        dtype=job["dtype"],
        max_model_len=job["max_model_len"],
        max_num_seqs=job["max_num_seqs"],
        max_num_batched_tokens=job["max_num_batched_tokens"],
    )
    planned = plan_model(job["model"], options)
    found = planned.plan.options
    sizes = found.cudagraph_capture_sizes
    assert planned.plan.kv_cache.num_blocks is not None
    engine = EngineOptions(
        dtype=found.dtype.value,
        max_model_len=found.max_model_len.value,
        max_num_seqs=found.max_num_seqs.value,
        max_num_batched_tokens=found.max_num_batched_tokens.value,
        num_blocks=planned.plan.kv_cache.num_blocks,
        block_size=found.block_size.value,
        cudagraph_capture_sizes=sizes.value if sizes else (),
        enable_prefix_caching=False,
    )
    began = time.perf_counter()
    session = start(
        planned.checkpoint,
        planned.spec,
        engine,
        world=World.from_environment(job["device"]),
        load_format="auto" if has_weights else "dummy",
    )
    ready = time.perf_counter() - began
    lockstep = Lockstep(session.engine, session.world)
    with open(sys.argv[2], "a", encoding="utf-8") as answers:
        for text in job["loads"]:
            result = measure(lockstep, load_of(text), planned.spec.vocab_size)
            document = {
                "load": text,
                "seconds": result.duration_seconds,
                "output_tokens": sum(map(len, result.tokens)),
                "ready_seconds": ready,
            }
            answers.write(json.dumps(document) + "\n")
            answers.flush()


if __name__ == "__main__":
    main()
