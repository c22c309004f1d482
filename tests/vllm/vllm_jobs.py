"""Load checkpoints in a real vLLM (CPU build) and generate greedy tokens. Run by its interpreter.

usage: vllm_jobs.py JOBS.json   where JOBS is a list of {"directory", "load_format", "tp", "dtype"}

vLLM is imported once; each job forks one process per rank, joined by gloo (the executor
`external_launcher`), because a fresh engine costs half a minute of imports. Every job gives one
line of JSON with its tokens and log-probabilities, or an error. Without a "dtype" everything is
computed in float32, so that the order of sums does not change tokens between sizes. With "save", a
directory, vLLM itself writes its sharded state there. With "texts", lists of tokens, the answer has
"losses", of each of their tokens but the first.
"""

import json
import multiprocessing
import os
import socket
import sys
from pathlib import Path
from queue import Empty

import own_configs
import plain_cpu

os.environ |= {
    "VLLM_TARGET_DEVICE": "cpu",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}

PROMPTS = [[1, 5, 9, 33, 77], [7, 8], [200, 201, 202, 13, 14, 15, 16]]
NEW_TOKENS = 12
TIMEOUT_SECONDS = 300


def keep_weights():
    """As on GPUs: vLLM repacks weights for some CPUs, and empties the parameters then."""
    import vllm.model_executor.layers.utils as layers

    dispatch = layers.dispatch_cpu_unquantized_gemm
    layers.dispatch_cpu_unquantized_gemm = lambda layer, remove_weight: dispatch(layer, False)


def run_rank(job, rank, port, results):
    answer = {"rank": rank}
    try:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(job["tp"]),
            "LOCAL_WORLD_SIZE": str(job["tp"]),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        from vllm import LLM, SamplingParams

        if "save" in job:
            keep_weights()
        several = {"distributed_executor_backend": "external_launcher"} if job["tp"] > 1 else {}
        llm = LLM(
            model=job["directory"],
            load_format=job["load_format"],
            tensor_parallel_size=job["tp"],
            dtype=job.get("dtype", "float32"),
            enforce_eager=True,
            skip_tokenizer_init=True,
            max_model_len=max(128, *(len(ids) + 1 for ids in job.get("texts", [[]]))),
            max_num_seqs=4,
            enable_prefix_caching=False,
            disable_log_stats=True,
            seed=0,
            **several,
        )
        sampling = SamplingParams(
            temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False, logprobs=1
        )
        prompts = [{"prompt_token_ids": ids} for ids in job.get("prompts", PROMPTS)]
        outputs = [o.outputs[0] for o in llm.generate(prompts, sampling, use_tqdm=False)]
        answer["tokens"] = [list(o.token_ids) for o in outputs]
        answer["logprobs"] = [o.cumulative_logprob for o in outputs]
        if "texts" in job:
            answer["losses"] = losses(llm, job["texts"])
        if "save" in job:
            llm.llm_engine.engine_core.save_sharded_state(job["save"], None, None)
    except BaseException as error:
        answer["error"] = f"{type(error).__name__}: {error}"[:500]
    results.put(answer)
    results.close()
    results.join_thread()
    os._exit(0)


def losses(llm, texts):
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=1, detokenize=False, prompt_logprobs=0)
    prompts = [{"prompt_token_ids": ids} for ids in texts]
    found = []
    for ids, output in zip(texts, llm.generate(prompts, sampling, use_tqdm=False), strict=True):
        places = zip(ids[1:], output.prompt_logprobs[1:], strict=True)
        found += [-known[token].logprob for token, known in places]
    return found


def run_job(context, job):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results = context.Queue()
    ranks = [
        context.Process(target=run_rank, args=(job, rank, port, results))
        for rank in range(job["tp"])
    ]
    for process in ranks:
        process.start()
    answers = []
    try:
        while len(answers) < len(ranks) and not any("error" in a for a in answers):
            answers.append(results.get(timeout=TIMEOUT_SECONDS))
    except Empty:
        codes = [process.exitcode for process in ranks]
        answers.append({"rank": -1, "error": f"no answer in time; exit codes {codes}"})
    for process in ranks:
        process.join(3)
        if process.is_alive():
            process.kill()
    # CPU ranks meet in shared memory of a fixed name, which vLLM leaves behind.
    for left in Path("/dev/shm").glob("*-cpushm_*"):
        left.unlink(missing_ok=True)
    failed = [a for a in answers if "error" in a]
    return failed[0] if failed else min(answers, key=lambda a: a["rank"])


def main():
    import vllm.model_executor.models.registry as registry
    import vllm.v1.engine.llm_engine
    import vllm.v1.executor.uniproc_executor
    import vllm.v1.worker.cpu_worker  # noqa: F401

    # vLLM inspects every architecture in a fresh interpreter, half a minute each; we are in one.
    registry._run_in_subprocess = lambda function: function()
    own_configs.prepare()
    plain_cpu.prepare()
    context = multiprocessing.get_context("fork")
    with open(sys.argv[1], encoding="utf-8") as file:
        jobs = json.load(file)
    for job in jobs:
        print("ANSWER " + json.dumps(job | run_job(context, job)), flush=True)


if __name__ == "__main__":
    main()
