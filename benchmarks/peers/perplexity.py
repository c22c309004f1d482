"""How far checkpoints are from the original, by transformers, which decodes every producer's alike.

usage: perplexity.py TEXT WINDOWS ORIGINAL MODEL...

Runs where transformers and compressed-tensors are installed. Windows have 512 tokens, spread over
the text, and each begins anew; activations are quantized as the checkpoint says. All computes in
float32; weights are decoded to it, or to bfloat16 where compressed-tensors can do nothing else
(fp4 and MX). Prints one line of JSON for each model, the original first: of every window the mean
loss, and the mean divergence of its predictions from the original's, both in nats.
"""

import gc
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

LENGTH = 512
_EVERY = 4
"""Divergences are those of every fourth prediction: vocabularies are large."""


def windows(model: str, text: str, count: int) -> list[Tensor]:
    tokenizer = AutoTokenizer.from_pretrained(model)
    # The models that need a mark at the beginning of every text have one of this name.
    first = [tokenizer.bos_token_id] if tokenizer.bos_token == "<bos>" else []
    step = LENGTH - len(first)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    apart = max(len(ids) // count, step)
    starts = range(0, len(ids) - step + 1, apart)
    return [torch.tensor([first + ids[start : start + step]]) for start in starts][:count]


def predictions(model: str, inputs: list[Tensor], dtype: torch.dtype) -> Iterator[Tensor]:
    """The logits of each window, float32 `[LENGTH - 1, vocabulary]`."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()
    with torch.inference_mode():
        loaded(inputs[0][:, :8])
        # Weights are decoded by now. The model's own method refuses to convert quantized ones.
        torch.nn.Module.float(loaded)
        for window in inputs:
            yield loaded(window, use_cache=False).logits[0, :-1].float()


def judge(
    model: str, inputs: list[Tensor], original: list[Tensor], dtype: torch.dtype
) -> tuple[list[float], list[float]]:
    """Losses and divergences; `original` is filled when it is empty."""
    losses, divergences, fill = [], [], not original
    for number, (window, logits) in enumerate(
        zip(inputs, predictions(model, inputs, dtype), strict=True)
    ):
        losses.append(cross_entropy(logits, window[0, 1:]).item())
        some = logits[::_EVERY].log_softmax(dim=-1)
        if fill:
            original.append(some)
        apart = original[number].exp() * (original[number] - some)
        divergences.append(apart.sum(dim=-1).mean().item())
    return losses, divergences


def main() -> None:
    text = Path(sys.argv[1]).read_text()
    inputs = windows(sys.argv[3], text, int(sys.argv[2]))
    original: list[Tensor] = []
    for model in sys.argv[3:]:
        answer: dict[str, object] = {"model": model}
        for dtype in (torch.float32, torch.bfloat16):
            try:
                losses, divergences = judge(model, inputs, original, dtype)
                answer |= {"losses": losses, "divergences": divergences, "error": None}
                answer["dtype"] = str(dtype).removeprefix("torch.")
                break
            except Exception as error:
                answer["error"] = f"{type(error).__name__}: {error}"[:300]
        gc.collect()
        print("RESULT", json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
