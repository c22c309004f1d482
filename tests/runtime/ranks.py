"""What the tests of the runtime share, and a program that runs models on several ranks.

`python ranks.py OUT MODEL...` as a rank writes OUT/<model>.json with the tokens of every prompt,
and OUT/<model>.safetensors with the logits of the longest prompt, which is all after `--logits`.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tightfit.checkpoint.checkpoint import open_checkpoint
from tightfit.model.families import model_spec
from tightfit.runtime.batch import Span, make_batch
from tightfit.runtime.dist import World
from tightfit.runtime.options import EngineOptions, SamplingParams
from tightfit.runtime.session import RunReport, Session, run_rank, start

PROMPTS = (
    [5, 9, 200, 17, 33, 8, 150, 77, 12, 99, 4, 61, 18, 240, 7, 7, 31, 2, 90, 91, 45, 14, 203],
    [11],
    [100, 101, 102, 103, 104],
    [42, 7, 42, 7, 42, 7, 42, 7, 42],
)
MAX_TOKENS = 20


def options(**changes: Any) -> EngineOptions:
    values: dict[str, Any] = {
        "dtype": "F32",
        "max_model_len": 64,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 64,
        "num_blocks": 64,
        "block_size": 4,
    }
    return EngineOptions(**(values | changes))


def open_session(model: Path, world: World | None = None, **changes: Any) -> Session:
    checkpoint = open_checkpoint(str(model))
    spec = model_spec(checkpoint.config)
    world = world or World()
    files = rank_files(model, world)
    return start(checkpoint, spec, options(**changes), world=world, rank_files=files)


def rank_files(model: Path, world: World) -> list[Path] | None:
    """Those of `tightfit shard`, if the directory has such."""
    return sorted(model.glob(f"model-rank-{world.rank}-part-*.safetensors")) or None


def run(model: Path, world: World | None = None, **changes: Any) -> RunReport | None:
    checkpoint = open_checkpoint(str(model))
    world = world or World()
    return run_rank(
        checkpoint,
        model_spec(checkpoint.config),
        options(**changes),
        world=world,
        rank_files=rank_files(model, world),
        prompts=PROMPTS,
        sampling=SamplingParams(max_tokens=MAX_TOKENS, ignore_eos=True),
    )


def greedy(model: Path, world: World | None = None, **changes: Any) -> list[list[int]]:
    report = run(model, world, **changes)
    return [] if report is None else [c.token_ids for c in report.completions]


def all_logits(session: Session, token_ids: Sequence[int]) -> torch.Tensor | None:
    """Logits at every position of a prompt, which is computed in one step."""
    worker = session.engine.worker
    block_size = worker.options.block_size
    blocks = range(len(token_ids) // block_size + 1)
    batch = make_batch(
        [Span(start=0, count=len(token_ids), blocks=blocks)],
        token_ids,
        [],
        block_size=block_size,
        device=torch.device("cpu"),
    )
    with torch.inference_mode():
        return worker.decoder.logits(worker.forward(batch))


def main() -> None:
    only_logits = sys.argv[1] == "--logits"
    out, *models = map(Path, sys.argv[1 + only_logits :])
    world = World.from_environment()
    for model in models:
        logits = all_logits(open_session(model, world), PROMPTS[0])
        if logits is not None:
            save_file({"logits": logits}, out / f"{model.name}.safetensors")
        if only_logits:
            continue
        tokens = greedy(model, world, max_num_batched_tokens=7)
        if world.rank == 0:
            (out / f"{model.name}.json").write_text(json.dumps(tokens))
    world.close()


if __name__ == "__main__":
    main()
