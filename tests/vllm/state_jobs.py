"""Ask a real vLLM (CPU build) which tensors its sharded-state loader wants. Run by its interpreter.

usage: state_jobs.py JOBS.json   where JOBS is a list of
    {"directory", "tp", "pp", "kernels", "sharded", "memory"}

A model is built without weights on every rank of the layout, and what is listed is its state before
any kernel rearranges it, after the loader's own filter of tensors that share memory. vLLM is
imported once; each job forks one process per rank, joined by gloo. Every job gives one line of
JSON: for each rank a dictionary of name to [shape, dtype, value if all elements have it], or an
error. Without `kernels` none are chosen, because those of most quantizations are for GPUs. With
`sharded`, the rank files of the same model, vLLM fills its state from each of the two directories,
and the answer has the names of tensors whose bytes are `different` then; before, all bytes of the
memory are `memory`.
"""

import json
import multiprocessing
import os
import sys
import tempfile
from pathlib import Path
from queue import Empty

import own_configs

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

TIMEOUT_SECONDS = 120


def build(job, rank, store, results):
    answer = {"rank": rank}
    try:
        from vllm.config import set_current_vllm_config
        from vllm.distributed import init_distributed_environment, initialize_model_parallel
        from vllm.engine.arg_utils import EngineArgs
        from vllm.model_executor.model_loader import ShardedStateLoader, get_model_loader
        from vllm.utils.torch_utils import set_default_torch_dtype

        if not job.get("kernels", True):
            without_kernels()
        tp, pp = job["tp"], job.get("pp", 1)
        config = EngineArgs(
            model=job["directory"],
            tensor_parallel_size=tp,
            pipeline_parallel_size=pp,
            enable_expert_parallel=job.get("ep", False),
            enforce_eager=True,
            dtype="bfloat16",
            skip_tokenizer_init=True,
            allow_deprecated_quantization=True,
            load_format="dummy",
            max_model_len=128,
            distributed_executor_backend="mp" if tp * pp > 1 else "uni",
        ).create_engine_config()
        config.parallel_config.rank = rank
        os.environ["VLLM_DIST_IDENT"] = Path(store).parent.name
        with set_current_vllm_config(config):
            init_distributed_environment(tp * pp, rank, f"file://{store}", rank, "gloo")
            initialize_model_parallel(tp, pp, backend="gloo")
            with set_default_torch_dtype(config.model_config.dtype):
                model = get_model_loader(config.load_config).create_model(
                    vllm_config=config, model_config=config.model_config
                )
        answer["class"] = f"{type(model).__module__}.{type(model).__name__}"
        kept = ShardedStateLoader._filter_subtensors(model.state_dict())
        answer["state"] = {
            name: [
                list(tensor.shape),
                str(tensor.dtype).removeprefix("torch."),
                value(tensor),
            ]
            for name, tensor in kept.items()
        }
        if "sharded" in job:
            with set_current_vllm_config(config):
                answer["different"] = different(
                    model, config, job["sharded"], job.get("memory", 77)
                )
    except BaseException as error:
        answer["error"] = f"{type(error).__name__}: {error}"[:500]
    results.put(answer)
    results.close()
    results.join_thread()
    os._exit(0)


def without_kernels():
    sys.path.insert(0, str(Path(__file__).parent.parent))
    from support.make_quantized_data import without_kernels

    without_kernels()


def different(model, config, sharded, memory):
    import torch
    from vllm.config.load import LoadConfig
    from vllm.model_executor.model_loader import ShardedStateLoader, get_model_loader

    def state():
        return ShardedStateLoader._filter_subtensors(model.state_dict())

    get_model_loader(LoadConfig()).load_weights(model, config.model_config)
    loaded = {name: tensor.clone() for name, tensor in state().items()}
    for tensor in state().values():
        tensor.view(torch.uint8 if tensor.dim() else tensor.dtype).fill_(memory)
    config.model_config.model_weights = sharded
    get_model_loader(LoadConfig(load_format="sharded_state")).load_weights(
        model, config.model_config
    )
    return [
        name
        for name, tensor in state().items()
        if not torch.equal(
            *(t.contiguous().reshape(-1).view(torch.uint8) for t in (tensor, loaded[name]))
        )
    ]


def value(tensor):
    if tensor.numel() > 8:
        return None
    first, *others = tensor.detach().float().flatten().tolist()
    # JSON knows no NaN, which memory that nobody has filled may hold.
    return first if first == first and all(first == other for other in others) else None


def run_job(context, job):
    results = context.Queue()
    size = job["tp"] * job.get("pp", 1)
    with tempfile.TemporaryDirectory() as directory:
        store = Path(directory) / "store"
        ranks = [context.Process(target=build, args=(job, r, store, results)) for r in range(size)]
        for process in ranks:
            process.start()
        answers = []
        try:
            while len(answers) < size and not any("error" in a for a in answers):
                answers.append(results.get(timeout=TIMEOUT_SECONDS))
        except Empty:
            answers.append({"error": f"no answer in time: {[p.exitcode for p in ranks]}"})
        for process in ranks:
            process.join(3)
            if process.is_alive():
                process.kill()
    for answer in answers:
        if "error" in answer:
            return {"error": answer["error"]}
    answers.sort(key=lambda answer: answer["rank"])
    states = [answer["state"] for answer in answers]
    found = {"class": answers[0]["class"], "states": states}
    if "sharded" in job:
        found["different"] = [answer["different"] for answer in answers]
    return found


def main():
    import vllm.model_executor.models.registry as registry
    import vllm.v1.worker.cpu.shm  # noqa: F401

    from vllm import LLM  # noqa: F401

    # vLLM inspects every architecture in a fresh interpreter, half a minute each; we are in one.
    registry._run_in_subprocess = lambda function: function()
    own_configs.prepare()
    context = multiprocessing.get_context("fork")
    with open(sys.argv[1], encoding="utf-8") as file:
        jobs = json.load(file)
    if not any(job.get("kernels", True) for job in jobs):
        # Once for all: it imports a hundred modules.
        without_kernels()
    for job in jobs:
        print("ANSWER " + json.dumps(job | run_job(context, job)), flush=True)


if __name__ == "__main__":
    main()
