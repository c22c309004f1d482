"""Which of some GPUs serve a model, the smallest first, in Python.

Run: python examples/smallest_gpu.py path/to/config.json [max_model_len]
"""

import sys

import tightfit
from tightfit.errors import TightfitError

GPUS = ("l4", "rtx4090", "l40s", "a100-80gb", "h100", "h200")


def main() -> None:
    """Print one line per GPU."""
    if len(sys.argv) < 2:
        sys.exit("usage: smallest_gpu.py path/to/config.json [max_model_len]")
    model = sys.argv[1]
    length = sys.argv[2] if len(sys.argv) > 2 else "8k"
    for gpu in GPUS:
        try:
            plan = tightfit.plan(model, gpu=gpu, max_model_len=length)
        except TightfitError as error:
            sys.exit(f"{error.message} ({error.hint})")
        sequences = plan.kv_cache.max_concurrency or 0
        verdict = f"{sequences:.1f} sequences at once" if plan.verdict.fits else "does not fit"
        print(f"{gpu:10} {verdict}")


if __name__ == "__main__":
    main()
