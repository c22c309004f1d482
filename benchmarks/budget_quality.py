"""What a mixed recipe of a size loses, with and without text to decide by, beside one scheme.

usage: budget_quality.py MODEL TEXT CALIBRATION [--shares 0.32,0.38,0.44] [--record]

MODEL is one that the built-in runtime executes and whose weights were never quantized
(`train_small.py`), TEXT what is predicted, and CALIBRATION another text. The loss is the mean
Kullback-Leibler divergence of what the quantized model predicts from what the original does, with
its standard error over windows of 256 tokens. All values are rounded to the nearest.
"""

import argparse
import sys
from collections.abc import Iterator
from math import sqrt
from pathlib import Path

import torch
from torch import Tensor

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "src"))

from tightfit.checkpoint.checkpoint import Checkpoint, open_checkpoint  # noqa: E402
from tightfit.model.quantization.written import Wish  # noqa: E402
from tightfit.quantize.budget import CANDIDATES, fit_budget  # noqa: E402
from tightfit.quantize.calibration.options import CalibrationOptions  # noqa: E402
from tightfit.quantize.calibration.samples import token_windows  # noqa: E402
from tightfit.quantize.dequantize import open_dequantized  # noqa: E402
from tightfit.quantize.job import prepare  # noqa: E402
from tightfit.runtime.layerwise import LayerwiseModel  # noqa: E402
from tightfit.units import MiB  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("calibration", type=Path)
    parser.add_argument("--shares", default="0.46,0.50,0.54", help="of the size of the tensors")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--record", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    checkpoint = open_checkpoint(arguments.model)
    lines = ["| recipe | size, MiB | divergence, nats a token |", "|---|---|---|"]
    print(*lines, sep="\n")
    for line in rows(checkpoint, arguments):
        print(line, flush=True)
        lines.append(line)
    if arguments.record:
        (HERE / "results" / "budget_quality.md").write_text("\n".join(lines) + "\n")


def rows(checkpoint: Checkpoint, arguments: argparse.Namespace) -> Iterator[str]:
    sample = CalibrationOptions(texts=(arguments.text,), samples=arguments.windows, length=256)
    tokens = token_windows(checkpoint, sample)
    before = predictions(checkpoint, tokens)
    total = nbytes(checkpoint)

    def row(name: str, wish: Wish) -> str:
        virtual = prepare(checkpoint, wish).virtual
        return (
            f"| {name} | {nbytes(virtual) / MiB:.1f} ({nbytes(virtual) / total:.0%}) | "
            f"{divergence(before, predictions(open_dequantized(virtual), tokens))} |"
        )

    for choice in (*CANDIDATES[1:], CANDIDATES[0]):
        yield row(choice.label, Wish(default=choice))
    text = CalibrationOptions(texts=(arguments.calibration,), samples=32, length=256)
    for share in map(float, arguments.shares.split(",")):
        budget = int(total * share)
        for name, calibration in (("without text", None), ("with text", text)):
            found = fit_budget(checkpoint, budget, calibration=calibration)
            yield row(f"--budget {budget / MiB:.1f}MiB, {name}", found.wish)


@torch.no_grad()
def predictions(checkpoint: Checkpoint, tokens: Tensor) -> Tensor:
    """Log probabilities, float32 `[windows, tokens, vocabulary]`."""
    model = LayerwiseModel(checkpoint)
    hidden = model.embed(tokens)
    for index in range(model.num_layers):
        hidden = model.layer(index)(hidden)
    return model.logits(hidden).log_softmax(dim=-1)


def divergence(before: Tensor, after: Tensor) -> str:
    """The mean over windows, and its standard error."""
    found = (before.exp() * (before - after)).sum(dim=-1).mean(dim=1)
    return f"{float(found.mean()):.4f} ± {float(found.std()) / sqrt(len(found)):.4f}"


def nbytes(checkpoint: Checkpoint) -> int:
    return sum(info.nbytes for info in checkpoint.tensors().values())


if __name__ == "__main__":
    main()
