"""One rank: its weights, its share of the KV cache, and the execution of batches."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tightfit.model.layout import Rank
from tightfit.model.spec import ModelSpec, ropes
from tightfit.runtime.attention import AttentionBackend, SdpaAttention
from tightfit.runtime.batch import Batch, Span, make_batch
from tightfit.runtime.dist import World
from tightfit.runtime.files import TORCH_DTYPES
from tightfit.runtime.kv_cache import KVCache
from tightfit.runtime.layers import Weights
from tightfit.runtime.memory import MemoryLedger
from tightfit.runtime.models.decoder import Decoder
from tightfit.runtime.options import EngineOptions, SamplingParams
from tightfit.runtime.rope import rope_table
from tightfit.runtime.sampling import SampleRow, sample
from tightfit.units import cdiv


class Worker:
    """Allocates everything that lives longer than a step, in the order of the ledger's phases."""

    def __init__(
        self,
        spec: ModelSpec,
        rank: Rank,
        options: EngineOptions,
        weights: Weights,
        *,
        world: World,
        ledger: MemoryLedger,
    ) -> None:
        self.options = options
        self.world = world
        self.ledger = ledger
        dtype = TORCH_DTYPES[options.dtype]
        with ledger.phase("persistent_buffers"):
            tables = {
                rope: rope_table(rope, options.max_model_len, dtype, world.device)
                for rope in ropes(spec.layers)
            }
        with ledger.phase("kv_cache"):
            self.cache = KVCache(
                spec,
                rank,
                num_blocks=options.num_blocks,
                block_size=options.block_size,
                dtype=dtype,
                device=world.device,
            )
        self.decoder = Decoder(spec, weights, tables, rank, world)
        layers = tuple(layer.attention for layer in spec.layers)
        self.attention: AttentionBackend = SdpaAttention(layers, self.cache, dtype)

    @torch.inference_mode()
    def execute(self, batch: Batch, rows: Sequence[SampleRow]) -> list[int]:
        """Run a batch, and sample a token for each of `batch.sample_rows`.

        Every rank returns the tokens that rank 0 sampled.
        """
        hidden = self.forward(batch)
        return self.sample(hidden[batch.sample_rows], rows) if rows else []

    @torch.inference_mode()
    def forward(self, batch: Batch) -> Tensor:
        """The decoder's output for all tokens, [tokens, hidden]."""
        attend = self.attention.step(batch)
        return self.decoder.forward(batch.token_ids, batch.positions, attend)

    @torch.inference_mode()
    def sample(self, hidden: Tensor, rows: Sequence[SampleRow]) -> list[int]:
        """Choose the tokens that follow rows of the decoder's output."""
        logits = self.decoder.logits(hidden)
        if logits is None:
            tokens = torch.empty(len(rows), dtype=torch.int64, device=self.world.device)
        else:
            tokens = sample(logits, rows)
        return self.world.broadcast(tokens).tolist()

    def warm_up(self) -> None:
        """Execute the worst step that the options allow, and measure it.

        As many sequences of max_model_len as may run decode together, and a prompt takes the rest
        of the token budget. The blocks are used by several sequences at once, so the pool need not
        hold them all; the results are meaningless.
        """
        options = self.options
        length = options.max_model_len
        blocks = [i % options.num_blocks for i in range(cdiv(length, options.block_size))]
        spans: list[Span] = []
        budget = options.max_num_batched_tokens
        for remaining in range(options.max_num_seqs, 0, -1):
            # What the sequences after this one need at least.
            count = max(1, min(length, budget - (remaining - 1)))
            spans.append(Span(start=0, count=count, blocks=blocks))
            budget -= count
        spans = [
            Span(start=length - span.count, count=span.count, blocks=blocks)
            if span.count < length
            else span
            for span in reversed(spans)
        ]
        tokens = sum(span.count for span in spans)
        batch = make_batch(
            spans,
            [0] * tokens,
            range(len(spans)),
            block_size=options.block_size,
            device=self.world.device,
        )
        params = SamplingParams(temperature=1.0, top_k=50, top_p=0.9)
        rows = [SampleRow(params=params, request_id=i, position=length) for i in range(len(spans))]
        with self.ledger.phase("activations"):
            hidden = self.forward(batch)
        with self.ledger.phase("logits_and_sampler"):
            self.sample(hidden[: len(spans)], rows)
