"""transformers' generate under the same loads, padded into one batch of all requests."""

import json
import sys
import time
from pathlib import Path

import torch
from loads import load_of
from transformers import AutoConfig, AutoModelForCausalLM


@torch.inference_mode()
def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    dtype = getattr(torch, job["dtype"])
    if any(Path(job["model"]).glob("*.safetensors")):
        model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=dtype)
    else:
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(job["model"])).to(dtype)
    model = model.to(job["device"]).eval()
    with open(sys.argv[2], "a", encoding="utf-8") as answers:
        for text in job["loads"]:
            requests = load_of(text).requests(model.config.vocab_size)
            widest = max(len(one.prompt_ids) for one in requests)
            longest = max(one.output_len for one in requests)
            rows = [[0] * (widest - len(r.prompt_ids)) + list(r.prompt_ids) for r in requests]
            ids = torch.tensor(rows, device=job["device"])
            mask = torch.tensor(
                [[i >= widest - len(r.prompt_ids) for i in range(widest)] for r in requests],
                device=job["device"],
            ).long()

            def generate(tokens: int, ids: torch.Tensor = ids, mask: torch.Tensor = mask) -> None:
                model.generate(
                    ids,
                    attention_mask=mask,
                    max_new_tokens=tokens,
                    min_new_tokens=tokens,
                    do_sample=True,
                    pad_token_id=0,
                )

            generate(2)
            began = time.perf_counter()
            generate(longest)
            seconds = time.perf_counter() - began
            tokens = sum(one.output_len for one in requests)
            document = {"load": text, "seconds": seconds, "output_tokens": tokens}
            answers.write(json.dumps(document) + "\n")
            answers.flush()


if __name__ == "__main__":
    main()
