"""What a step of the runtime costs in Python, without a model.

256 sequences decode, with as many tokens as fill tables of 2048 blocks; two steps are in flight, as
on a GPU. The device is a mock that knows all tokens at once. The numbers are microseconds for one
step: of CPU time, median and least over many steps.
"""

import argparse
import gc
import statistics
import time
from dataclasses import dataclass
from typing import cast

from tightfit.runtime.batch import Step
from tightfit.runtime.engine import Engine
from tightfit.runtime.options import EngineOptions, SamplingParams
from tightfit.runtime.worker import Worker

BLOCKS = 2048
BLOCK_SIZE = 16
STEPS = 2000


@dataclass(frozen=True, slots=True)
class Sampled:
    count: int

    def tokens(self) -> list[int]:
        return [7] * self.count


class MockWorker:
    depth = 2

    def __init__(self, options: EngineOptions) -> None:
        self.options = options

    def submit(self, step: Step) -> Sampled:
        return Sampled(len(step.samples))


def make(num_seqs: int) -> Engine:
    length = BLOCKS * BLOCK_SIZE
    options = EngineOptions(
        dtype="BF16",
        max_model_len=length,
        max_num_seqs=num_seqs,
        max_num_batched_tokens=8192,
        num_blocks=num_seqs * BLOCKS,
        block_size=BLOCK_SIZE,
    )
    engine = Engine(cast(Worker, MockWorker(options)))
    for i in range(num_seqs):
        prompt = [(i * 7919 + j) % 50000 for j in range(length - STEPS - 16 - i)]
        engine.add(i, prompt, SamplingParams(), frozenset({1, 2}))
    return engine


def measure(num_seqs: int) -> None:
    engine = make(num_seqs)
    started = time.process_time()
    prefills = 0
    while engine.num_waiting:
        engine.step()
        prefills += 1
    prefill = (time.process_time() - started) / prefills
    for _ in range(20):
        engine.step()
    assert engine.num_running == num_seqs
    gc.collect()
    gc.freeze()
    took = []
    for _ in range(STEPS // 2):
        before = time.process_time_ns()
        outputs = engine.step()
        took.append((time.process_time_ns() - before) / 1000)
        assert len(outputs) == num_seqs
    print(
        f"{num_seqs:4d} decodes: {statistics.median(took):6.0f} us ({min(took):.0f} at least, "
        f"{statistics.mean(took):.0f} on average); 8192 prompt tokens: {prefill * 1e6:.0f} us"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("num_seqs", type=int, nargs="*", default=[1, 32, 256])
    for num_seqs in parser.parse_args().num_seqs:
        measure(num_seqs)


if __name__ == "__main__":
    main()
