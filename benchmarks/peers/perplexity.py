"""Perplexity of checkpoints by transformers, which decodes every producer's the same way.

usage: perplexity.py TEXT WINDOWS MODEL...

Runs where transformers and compressed-tensors are installed. Windows have 512 tokens, spread over
the text, and each begins anew; activations are quantized as the checkpoint says. All computes in
float32; weights are decoded to it, or to bfloat16 where compressed-tensors can do nothing else
(fp4 and MX). Prints one line of JSON for each model: the loss of every window.
"""

import gc
import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

LENGTH = 512


def losses(model: str, text: str, windows: int, dtype: torch.dtype) -> list[float]:
    """Mean negative log-likelihood of each window, in nats for a token."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    # The models that need a mark at the beginning of every text have one of this name.
    first = [tokenizer.bos_token_id] if tokenizer.bos_token == "<bos>" else []
    step = LENGTH - len(first)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    # Spread over the text, which goes from topic to topic.
    apart = max(len(ids) // windows, step)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()
    found = []
    with torch.inference_mode():
        loaded(torch.tensor([ids[:8]]))
        # Weights are decoded by now. The model's own method refuses to convert quantized ones.
        torch.nn.Module.float(loaded)
        for start in range(0, len(ids) - step + 1, apart):
            window = torch.tensor([first + ids[start : start + step]])
            logits = loaded(window, use_cache=False).logits[0, :-1].float()
            loss = torch.nn.functional.cross_entropy(logits, window[0, 1:])
            found.append(loss.item())
    return found[:windows]


def main() -> None:
    text = Path(sys.argv[1]).read_text()
    for model in sys.argv[3:]:
        answer = {"model": model, "dtype": "", "losses": [], "error": None}
        for dtype in (torch.float32, torch.bfloat16):
            try:
                found = losses(model, text, int(sys.argv[2]), dtype)
                answer |= {"dtype": str(dtype).removeprefix("torch."), "losses": found}
                answer["error"] = None
                break
            except Exception as error:
                answer["error"] = f"{type(error).__name__}: {error}"[:300]
        gc.collect()
        print("RESULT", json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
