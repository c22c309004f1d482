"""What a run is asked to do. Plain data without torch, so that the command line can build it."""

from dataclasses import dataclass

from tightfit.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """The options that decide what an engine allocates; names and meaning are vLLM's.

    `dtype` is what weights and activations are computed in, in safetensors' spelling.
    """

    dtype: str
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    num_blocks: int
    block_size: int = 16
    kv_cache_dtype: str | None = None
    """What keys and values are stored in, in the same spelling; None is what is computed in."""
    enable_prefix_caching: bool = True
    """Whether sequences that begin alike share blocks."""
    cudagraph_capture_sizes: tuple[int, ...] = ()
    """Numbers of decoding sequences for which a GPU's work is recorded; none to run eagerly."""
    attention_backend: str = "auto"
    """Which kernels attend on a GPU; `auto` takes the fastest that are installed and right."""
    model_impl: str = "builtin"
    """Whose code executes the model: `builtin` or `transformers`."""
    cpu_offload_bytes: int = 0
    """Bytes of weights of the last layers that stay on the host; of transformers' code only."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "block_size"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} = {getattr(self, name)} is not at least 1")
        if self.num_blocks < 1:
            raise UsageError(
                "the plan leaves no memory for the KV cache: 0 blocks",
                hint="lower max_num_batched_tokens or max_model_len, or give more memory",
            )
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise UsageError(
                f"max_num_batched_tokens = {self.max_num_batched_tokens} is less than "
                f"max_num_seqs = {self.max_num_seqs}",
                hint="every running sequence needs one token per step: raise "
                "--max-num-batched-tokens or lower --max-num-seqs",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the next token is chosen; temperature 0 takes the likeliest.

    `top_k` 0 and `top_p` 1 switch those filters off. Without `max_tokens` a sequence may fill
    max_model_len.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    max_tokens: int | None = None
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UsageError(f"temperature = {self.temperature} is not a number of at least 0")
        if self.top_k < 0:
            raise UsageError(f"top_k = {self.top_k} is negative", hint="0 switches it off")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p = {self.top_p} is not in (0, 1]", hint="1 switches it off")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise UsageError(f"max_tokens = {self.max_tokens} is not at least 1")
