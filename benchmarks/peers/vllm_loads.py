"""vLLM under the same loads: vllm_loads.py JOB ANSWERS, as `runtime_speed.py` calls it."""

import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

from loads import load_of

from vllm import LLM, SamplingParams


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    has_weights = any(Path(job["model"]).glob("*.safetensors"))
    settings = {"gpu_memory_utilization": 0.9} if job["device"] == "cuda" else {}
    llm = LLM(
        model=job["model"],
        load_format="auto" if has_weights else "dummy",
        skip_tokenizer_init=True,
        dtype=job["dtype"],
        tensor_parallel_size=job["tensor_parallel_size"],
        max_model_len=job["max_model_len"],
        max_num_seqs=job["max_num_seqs"],
        max_num_batched_tokens=job["max_num_batched_tokens"],
        enable_prefix_caching=False,
        **settings,
    )
    vocabulary = llm.llm_engine.model_config.get_vocab_size()

    def generate(text: str, tokens: int | None = None) -> tuple[int, float]:
        requests = load_of(text).requests(vocabulary)
        prompts = [{"prompt_token_ids": list(one.prompt_ids)} for one in requests]
        params = [
            SamplingParams(
                temperature=1.0,
                max_tokens=tokens or one.output_len,
                ignore_eos=True,
                detokenize=False,
            )
            for one in requests
        ]
        began = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - began
        return sum(len(one.outputs[0].token_ids) for one in outputs), seconds

    with open(sys.argv[2], "a", encoding="utf-8") as answers:
        for text in job["loads"]:
            count, rest = text.split(":", 1)
            generate(f"{min(int(count), 8)}:{rest}", 4)
            tokens, seconds = generate(text)
            document = {"load": text, "seconds": seconds, "output_tokens": tokens}
            answers.write(json.dumps(document) + "\n")
            answers.flush()


if __name__ == "__main__":
    main()
