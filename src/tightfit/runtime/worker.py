"""One rank: its weights, its share of the KV cache, and the execution of steps."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tightfit.model.layout import Rank
from tightfit.model.spec import ModelSpec, ropes
from tightfit.planner.engines.builtin_cuda import STAGED_STEPS
from tightfit.runtime.attention.base import AttentionBackend, AttentionLayer, attention_layers
from tightfit.runtime.attention.kv_cache import KVCache
from tightfit.runtime.attention.kv_scales import Scales, scaled
from tightfit.runtime.attention.sdpa import SdpaAttention
from tightfit.runtime.batch import Batch, Span, Step
from tightfit.runtime.graphs import DecodeGraphs
from tightfit.runtime.layers import Weights
from tightfit.runtime.loading.files import TORCH_DTYPES
from tightfit.runtime.memory.ledger import MemoryLedger
from tightfit.runtime.models.decoder import Decoder
from tightfit.runtime.models.hf import TransformersModel
from tightfit.runtime.options import EngineOptions, SamplingParams
from tightfit.runtime.ranks.world import World
from tightfit.runtime.rope import rope_table
from tightfit.runtime.sampling import Sampler, SampleRow, on_device
from tightfit.runtime.staging import CudaStaging, HostStaging, Staging
from tightfit.runtime.states import States
from tightfit.units import cdiv


class Sampled:
    """The tokens that a step samples, once it is through.

    On a GPU they are copied while the host goes on, and only `tokens` waits.
    """

    def __init__(self, tokens: Tensor, world: World) -> None:
        self._world = world
        self._done: torch.cuda.Event | None = None
        self._tokens = tokens
        if tokens.is_cuda:
            self._tokens = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
            self._tokens.copy_(tokens, non_blocking=True)
            self._done = torch.cuda.Event()
            self._done.record()

    def tokens(self) -> list[int]:
        """Wait for them: one for each of the step's samples.

        Raises:
            RankFailedError: another rank did not take part in time.
        """
        if self._done is not None:
            self._world.wait(self._done)
        found: list[int] = self._tokens.tolist()
        return found


class Worker:
    """Allocates everything that lives longer than a step, in the order of the ledger's phases.

    `depth` is how many steps may be under way before the first one's tokens are asked for.
    """

    def __init__(
        self,
        spec: ModelSpec,
        rank: Rank,
        options: EngineOptions,
        weights: Weights | TransformersModel,
        *,
        world: World,
        ledger: MemoryLedger,
        scales: Scales = (),
    ) -> None:
        # Blocks that are shared hold no states.
        caching = options.enable_prefix_caching and not spec.is_recurrent
        self.options = options = replace(options, enable_prefix_caching=caching)
        self.rank = rank
        self.world = world
        self.ledger = ledger
        device = world.device
        on_gpu = device.type == "cuda"
        self.depth = STAGED_STEPS - 1 if on_gpu else 1
        dtype = TORCH_DTYPES[options.dtype]
        with ledger.phase("layers"):
            if isinstance(weights, TransformersModel):
                self.decoder: Decoder | TransformersModel = weights
                layers = weights.layers
            else:
                tables = {
                    rope: rope_table(rope, options.max_model_len, dtype, device)
                    for rope in ropes(spec.layers)
                }
                self.decoder = Decoder(spec, weights, tables, rank, world)
                layers = attention_layers(spec, rank, weights.tensors)
            ledger.release()
        with ledger.phase("kv_cache"):
            self.cache = KVCache(
                spec,
                rank,
                num_blocks=options.num_blocks,
                block_size=options.block_size,
                dtype=TORCH_DTYPES[options.kv_cache_dtype or options.dtype],
                device=device,
            )
        with ledger.phase("persistent_buffers"):
            self.states: States | None = None
            if spec.is_recurrent:
                self.states = States(
                    spec,
                    rank,
                    max_num_seqs=options.max_num_seqs,
                    dtype=options.dtype,
                    device=device,
                )
            self.staging: Staging = (
                CudaStaging(options, device) if on_gpu else HostStaging(options.block_size)
            )
            layers = scaled(layers, scales)
            self.attention = _attention(layers, self.cache, dtype, options)
            sizes = options.cudagraph_capture_sizes
            largest = max(sizes, default=0)
            hidden = torch.zeros(largest, spec.hidden_size, dtype=dtype, device=device)
        self.sampler = Sampler(self.decoder.vocabulary, world)
        self.graphs = DecodeGraphs(sizes, self._recorded, hidden)

    @torch.inference_mode()
    def submit(self, step: Step) -> Sampled:
        """Start a step that samples a token for each of `step.samples`."""
        size = self.graphs.size_of(step)
        batch = self.staging.place(step, size)
        hidden = self.advance(batch, size)
        # Where a step samples nothing, its end is waited for too: the inputs of the steps after it
        # take the places of its own, which are still being copied.
        tokens = hidden.new_empty(0, dtype=torch.int64)
        if step.samples:
            tokens = self.sample(hidden[batch.sample_rows], [row for _, row in step.samples])
            self.staging.keep(step, tokens)
        return Sampled(tokens, self.world)

    @torch.inference_mode()
    def advance(self, batch: Batch, size: int | None = None) -> Tensor:
        """Take a batch from the stage before, if any, through this one, and to the next.

        Args:
            batch: of a step.
            size: of the CUDA graph that it was placed for.

        Returns:
            This stage's output for all tokens, [tokens, hidden].
        """
        hidden = None
        if not self.rank.is_first_stage:
            buffer = self.graphs.hidden
            shape = len(batch.token_ids), buffer.shape[1]
            hidden = self.world.receive(buffer.new_empty(shape) if size is None else buffer[:size])
        hidden = self.forward(batch, hidden) if size is None else self.graphs.replay(size)
        if not self.rank.is_last_stage:
            self.world.send(hidden)
        return hidden

    def _recorded(self, batch: Batch) -> Tensor:
        """What a CUDA graph does, which receives and sends nothing."""
        first = self.rank.is_first_stage
        return self.forward(batch, None if first else self.graphs.hidden[: len(batch.token_ids)])

    @torch.inference_mode()
    def forward(self, batch: Batch, hidden: Tensor | None = None) -> Tensor:
        """The output of this stage's layers for all tokens, [tokens, hidden].

        `hidden` is what the stage before has made of them.
        """
        attend = self.attention.step(batch)
        recurrence = None if self.states is None else self.states.step(batch)
        ids = self.staging.resolved(batch)
        if hidden is None:
            return self.decoder.forward(ids, batch.positions, attend, recurrence)
        assert isinstance(self.decoder, Decoder)
        return self.decoder.forward(ids, batch.positions, attend, recurrence, hidden)

    @torch.inference_mode()
    def sample(self, hidden: Tensor, rows: Sequence[SampleRow]) -> Tensor:
        """The tokens that follow rows of the decoder's output: int64 [rows], on all ranks."""
        if self.rank.is_last_stage:
            described = on_device(rows, self.world.device)
            tokens = self.sampler(self.decoder.logits(hidden), described)
        else:
            tokens = torch.empty(len(rows), dtype=torch.int64, device=hidden.device)
        several = self.rank.parallel.pipeline_parallel_size > 1
        return self.world.from_last_stage(tokens) if several else tokens

    def warm_up(self) -> None:
        """Execute the worst step that the options allow, capture the graphs, and measure both.

        As many sequences of max_model_len as may run decode together, and a prompt takes the rest
        of the token budget. The blocks are used by several sequences at once, so the pool need not
        hold them all; the results are meaningless.
        """
        step = self._worst_step(self.options.max_num_batched_tokens)
        with self.ledger.phase("activations"):
            hidden = self.advance(self.staging.place(step))
        with self.ledger.phase("logits_and_sampler"):
            self.sample(hidden[: len(step.samples)], [row for _, row in step.samples])
            # What requests of other kinds need is compiled now, and not when the first one comes.
            for params in SamplingParams(temperature=0.0), SamplingParams(temperature=1.0):
                row = SampleRow(params=params, position=self.options.max_model_len)
                self.sample(hidden[:1], [row])
        del hidden
        if not isinstance(self.staging, CudaStaging):
            return
        self.ledger.release()
        with self.ledger.phase("cuda_graphs"):
            self._capture(self.staging)
        # Now that everything is there: once more, and as many decodes as there can be.
        with self.ledger.phase("worst_steps"):
            self.submit(step)
            self.submit(self._worst_step(self.options.max_num_seqs))

    @torch.inference_mode()
    def _capture(self, staging: CudaStaging) -> None:
        self.graphs.capture(staging.empty)
        self.world.before_closing(self.graphs.forget)

    def _worst_step(self, budget: int) -> Step:
        """All sequences at their longest, and so many tokens that nobody can have more."""
        options = self.options
        length = options.max_model_len
        blocks = [i % options.num_blocks for i in range(cdiv(length, options.block_size))]
        counts: list[int] = []
        for remaining in range(options.max_num_seqs, 0, -1):
            # What the sequences after this one need at least.
            counts.append(max(1, min(length, budget - (remaining - 1))))
            budget -= counts[-1]
        spans = tuple(
            Span(row=row, start=length - count, count=count, blocks=blocks)
            for row, count in enumerate(reversed(counts))
        )
        params = SamplingParams(temperature=1.0, top_k=50, top_p=0.9)
        return Step(
            spans=spans,
            token_ids=[0] * sum(counts),
            samples=tuple(
                (i, SampleRow(params=params, position=length)) for i in range(len(spans))
            ),
        )


def _attention(
    layers: tuple[AttentionLayer, ...], cache: KVCache, dtype: torch.dtype, options: EngineOptions
) -> AttentionBackend:
    """The backend of the device that the cache is on."""
    if not cache.layers[0][0].is_cuda:
        return SdpaAttention(layers, cache, dtype)
    from tightfit.runtime.attention.paged import PagedAttention

    return PagedAttention(
        layers,
        cache,
        dtype,
        max_num_seqs=options.max_num_seqs,
        max_model_len=options.max_model_len,
        backend=options.attention_backend,
    )
