"""Start a real vLLM (CPU build) and say how large its KV pool is. Run by its interpreter.

usage: cpu_pool_jobs.py JOBS.json   where JOBS is a list of {"model", "env": {}, "arguments": {}}

vLLM is imported once and each job is a fork of that process. What vLLM logs
of a job comes before its line of JSON with the blocks, the groups and the options.
"""

import json
import multiprocessing
import os
import sys
from pathlib import Path
from queue import Empty

os.environ |= {
    "VLLM_TARGET_DEVICE": "cpu",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_CI_ENV": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}

TIMEOUT_SECONDS = 300


def run(job, results):
    answer = {}
    try:
        os.environ |= job.get("env", {})
        from vllm import LLM

        arguments = {"enforce_eager": True, "disable_log_stats": True} | job.get("arguments", {})
        llm = LLM(model=job["model"], skip_tokenizer_init=True, **arguments)
        core = llm.llm_engine.engine_core.engine_core
        cache = core.vllm_config.cache_config
        pool = core.scheduler.kv_cache_config
        answer |= {
            "num_blocks": pool.num_blocks,
            "block_size": cache.block_size,
            "groups": [
                [len(group.layer_names), group.kv_cache_spec.block_size]
                for group in pool.kv_cache_groups
            ],
            "bytes": sum(tensor.size for tensor in pool.kv_cache_tensors),
            "max_num_batched_tokens": core.vllm_config.scheduler_config.max_num_batched_tokens,
            "max_num_seqs": core.vllm_config.scheduler_config.max_num_seqs,
            "capture_sizes": core.vllm_config.compilation_config.cudagraph_capture_sizes,
        }
    except BaseException as error:
        answer["error"] = f"{type(error).__name__}: {error}"[:2000]
    results.put(answer)
    results.close()
    results.join_thread()
    os._exit(0)


def main():
    import vllm.model_executor.models.registry as registry
    import vllm.v1.engine.llm_engine
    import vllm.v1.executor.uniproc_executor
    import vllm.v1.worker.cpu_worker  # noqa: F401

    # vLLM inspects every architecture in a fresh interpreter, half a minute each; we are in one.
    registry._run_in_subprocess = lambda function: function()
    context = multiprocessing.get_context("fork")
    for job in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        results = context.Queue()
        process = context.Process(target=run, args=(job, results))
        process.start()
        try:
            answer = results.get(timeout=TIMEOUT_SECONDS)
        except Empty:
            answer = {"error": "no answer in time"}
        process.join(3)
        if process.is_alive():
            process.kill()
        # CPU ranks meet in shared memory of a fixed name, which vLLM leaves behind.
        for left in Path("/dev/shm").glob("*-cpushm_*"):
            left.unlink(missing_ok=True)
        print("ANSWER " + json.dumps(job | answer), flush=True)


if __name__ == "__main__":
    main()
