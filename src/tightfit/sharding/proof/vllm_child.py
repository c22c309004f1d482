"""Load rank files in vLLM and generate a few tokens. Run as a script, by vLLM's own interpreter.

usage: vllm_child.py JOB, where JOB is an object: directory, tensor_parallel_size,
pipeline_parallel_size, versions (first and last that read the layout) and fd, to which one line of
JSON goes at the end. It needs nothing but vLLM, whose environment is seldom that of tightfit.

On a CPU each rank is forked, and they meet by gloo (vLLM's executor `external_launcher`): vLLM's
own start of several CPU processes takes minutes.
"""

import importlib.util
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import re
import socket
import sys
import time
from pathlib import Path
from typing import Any

_PROMPT = [1, 2, 3, 5, 7]
_NEW_TOKENS = 8
_MOST_ERROR = 4000
"""Characters; JSON takes at most 12 bytes for one."""
_ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
}
_SHARED = Path("/dev/shm")

Answer = dict[str, Any]


def main() -> None:
    """Answer a job."""
    job = json.loads(sys.argv[1])
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    answer = _answer(job)
    # A pipe takes 64 KiB before somebody has to read.
    if "error" in answer:
        answer["error"] = answer["error"][:_MOST_ERROR]
    os.write(job["fd"], json.dumps(answer).encode() + b"\n")
    sys.stdout.flush()
    sys.stderr.flush()
    # Engines leave threads behind that would keep the interpreter.
    os._exit(0)


def _answer(job: Answer) -> Answer:
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        return {"refused": "not installed"}
    found: Answer = {}
    try:
        from vllm.version import __version__

        found["version"] = str(__version__)
        numbers = [int(word) for word in re.findall(r"\d+", found["version"])[:2]]
        first, last = job["versions"]
        if not first <= numbers <= last:
            return found | {"refused": "version"}
        from vllm.platforms import current_platform

        found["device"] = str(current_platform.device_type)
        size = job["tensor_parallel_size"] * job["pipeline_parallel_size"]
        if current_platform.is_cpu():
            return found | (_forked(job, size) if size > 1 else _generated(job, {}))
        import torch

        found["devices"] = torch.accelerator.device_count()
        if found["devices"] < size:
            return found | {"refused": "devices"}
        if size == 1:
            os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        return found | _generated(job, {})
    except BaseException as error:
        return found | _failed(error)


def _failed(error: BaseException) -> Answer:
    return {"error": f"{type(error).__name__}: {error}"}


def _generated(job: Answer, more: Answer) -> Answer:
    from vllm import LLM, SamplingParams

    started = time.monotonic()
    engine = LLM(
        model=job["directory"],
        load_format="sharded_state",
        tensor_parallel_size=job["tensor_parallel_size"],
        pipeline_parallel_size=job["pipeline_parallel_size"],
        enable_expert_parallel=job["enable_expert_parallel"],
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=job["max_model_len"],
        max_num_seqs=4,
        disable_log_stats=True,
        seed=0,
        **more,
    )
    loaded = time.monotonic()
    sampling = SamplingParams(
        temperature=0, max_tokens=_NEW_TOKENS, ignore_eos=True, detokenize=False, logprobs=1
    )
    (output,) = engine.generate([{"prompt_token_ids": _PROMPT}], sampling, use_tqdm=False)
    first = output.outputs[0]
    return {
        "tokens": list(first.token_ids),
        "finite": first.cumulative_logprob is not None and math.isfinite(first.cumulative_logprob),
        "load_seconds": round(loaded - started, 1),
        "generation_seconds": round(time.monotonic() - loaded, 1),
    }


def _forked(job: Answer, size: int) -> Answer:
    # Imported once, before the ranks are forked.
    import vllm.model_executor.models.registry as registry
    import vllm.v1.engine.llm_engine
    import vllm.v1.worker.cpu_worker  # noqa: F401

    if hasattr(registry, "_run_in_subprocess"):
        # vLLM inspects an architecture in a fresh interpreter, half a minute each; we are in one.
        registry._run_in_subprocess = lambda function: function()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mine = f"tightfit-{os.getpid()}-"
    _name_shared_memory(mine)
    context = multiprocessing.get_context("fork")
    readers: list[Any] = []
    ranks = []
    for rank in range(size):
        reader, writer = context.Pipe(duplex=False)
        process = context.Process(target=_rank, args=(job, rank, size, port, writer))
        process.start()
        writer.close()
        readers.append(reader)
        ranks.append(process)
    answers: list[Answer] = []
    left = list(readers)
    # A rank whose neighbour has failed waits for it forever.
    while left and not any("error" in answer for answer in answers):
        for ready in multiprocessing.connection.wait(left):
            rank = readers.index(ready)
            left.remove(ready)
            try:
                answers.append(readers[rank].recv())
            except EOFError:
                ranks[rank].join(5)
                answers.append({"error": f"rank {rank} ended with code {ranks[rank].exitcode}"})
    for process in ranks:
        process.kill()
    for path in _SHARED.glob(f"{mine}*"):
        path.unlink(missing_ok=True)
    return next((answer for answer in answers if "error" in answer), answers[0])


def _name_shared_memory(prefix: str) -> None:
    """Tell ours from that of another vLLM: with `external_launcher` all have the same names.

    `VLLM_DIST_IDENT` cannot do it: the worker overwrites it (`v1/worker/cpu_worker.py`).
    """
    try:
        from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed

        theirs = _CPUSHMDistributed.make_group_name
    except (ImportError, AttributeError):
        return

    def make_group_name(communicator: Any) -> str:
        return prefix + str(theirs(communicator)).replace("/", "")

    _CPUSHMDistributed.make_group_name = staticmethod(make_group_name)


def _rank(job: Answer, rank: int, size: int, port: int, writer: Any) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // size)),
    }
    try:
        answer = _generated(job, {"distributed_executor_backend": "external_launcher"})
    except BaseException as error:
        answer = _failed(error)
    writer.send(answer)
    writer.close()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
