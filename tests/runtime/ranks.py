"""What the tests of the runtime share, and a program that runs models on several ranks.

`python ranks.py OUT MODEL...` as a rank writes OUT/<model>.json with the tokens of every prompt,
OUT/<model>-sampled.json with others that are not the likeliest, and OUT/<model>.safetensors with
the logits of the longest prompt, which is all after `--logits`. `--stages=N` makes a pipeline.
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
from tightfit.runtime.batch import Span, Step
from tightfit.runtime.options import EngineOptions, SamplingParams
from tightfit.runtime.ranks.world import World
from tightfit.runtime.session import RunReport, Session, run_rank, start

PROMPTS = (
    [5, 9, 200, 17, 33, 8, 150, 77, 12, 99, 4, 61, 18, 240, 7, 7, 31, 2, 90, 91, 45, 14, 203],
    [11],
    [100, 101, 102, 103, 104],
    [42, 7, 42, 7, 42, 7, 42, 7, 42],
)
MAX_TOKENS = 20
ON_GPU: dict[str, Any] = {"block_size": 16, "cudagraph_capture_sizes": (1, 2, 4)}


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
    stage, rank = divmod(world.rank, world.tp_size)
    name = f"pp-{stage}-tp-{rank}" if world.stages > 1 else f"rank-{rank}"
    return sorted(model.glob(f"model-{name}-part-*.safetensors")) or None


def run(
    model: Path, world: World | None = None, temperature: float = 0.0, **changes: Any
) -> RunReport | None:
    checkpoint = open_checkpoint(str(model))
    world = world or World()
    return run_rank(
        checkpoint,
        model_spec(checkpoint.config),
        options(**changes),
        world=world,
        rank_files=rank_files(model, world),
        prompts=PROMPTS,
        sampling=SamplingParams(
            temperature=temperature, top_p=0.9, seed=5, max_tokens=MAX_TOKENS, ignore_eos=True
        ),
    )


def greedy(model: Path, world: World | None = None, **changes: Any) -> list[list[int]]:
    report = run(model, world, **changes)
    return [] if report is None else [c.token_ids for c in report.completions]


def sampled(model: Path, world: World | None = None, **changes: Any) -> list[list[int]]:
    return greedy(model, world, temperature=0.9, **changes)


def all_logits(session: Session, token_ids: Sequence[int]) -> torch.Tensor | None:
    """Logits at every position of a prompt, which is computed in one step, on the last stage."""
    return _logits(session, token_ids, 0)


def decoded_logits(session: Session, token_ids: Sequence[int]) -> torch.Tensor | None:
    """Logits after the last token, [1, vocab_size], which follows the others in a step of its own.

    That step is a decode.
    """
    all_logits(session, token_ids[:-1])
    return _logits(session, token_ids, len(token_ids) - 1)


def _logits(session: Session, token_ids: Sequence[int], start: int) -> torch.Tensor | None:
    worker = session.engine.worker
    blocks = range(len(token_ids) // worker.options.block_size + 1)
    new = token_ids[start:]
    span = Span(start=start, count=len(new), blocks=blocks)
    batch = worker.staging.place(Step(spans=(span,), token_ids=new, samples=()))
    with torch.inference_mode():
        hidden = worker.advance(batch)
        if not worker.rank.is_last_stage:
            return None
        return worker.sampler.whole(worker.decoder.logits(hidden))


def fresh(world: World) -> World:
    """The same world for another session, whose phases are measured anew."""
    if world.device.type == "cuda":
        from tightfit.runtime.memory.cuda import CudaLedger

        world.ledger = CudaLedger(world.device.index)
    return world


def main() -> None:
    flags = [flag for flag in sys.argv[1:] if flag.startswith("--")]
    out, *models = map(Path, sys.argv[1 + len(flags) :])
    stages = [int(flag.partition("=")[2]) for flag in flags if flag.startswith("--stages=")]
    device = "cuda" if "--cuda" in flags else "cpu"
    changes: dict[str, Any] = ON_GPU if device == "cuda" else {}
    world = World.from_environment(device, stages=stages[0] if stages else 1)
    for model in models:
        logits = all_logits(open_session(model, fresh(world), **changes), PROMPTS[0])
        if world.rank == world.size - 1:
            assert logits is not None
            save_file({"logits": logits.cpu()}, out / f"{model.name}.safetensors")
        if "--logits" in flags:
            continue
        for way, suffix in ((greedy, ""), (sampled, "-sampled")):
            tokens = way(model, fresh(world), max_num_batched_tokens=7, **changes)
            if world.rank == 0:
                (out / f"{model.name}{suffix}.json").write_text(json.dumps(tokens))
    world.close()


if __name__ == "__main__":
    main()
