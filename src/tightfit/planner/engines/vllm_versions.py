"""What differs between versions of vLLM, 0.8 to 0.33.

Read in the sources of the versions named below: `v1/worker/gpu_worker.py:
determine_available_memory`, `v1/worker/gpu/model_runner.py`, `config/vllm.py`,
`v1/kv_cache_interface.py`, `v1/core/kv_cache_utils.py` and `engine/arg_utils.py`. A version between
two of them is planned as the one before. The constants come from 0.25.1 (`vllm_calibration.json`);
for the others they are carried over.
"""

import re
from dataclasses import dataclass, replace
from enum import Enum

from tightfit.errors import UsageError
from tightfit.model.blocks.mlp import MoE
from tightfit.model.spec import ModelSpec

DEFAULT_VERSION = "0.32.0"
MEASURED_VERSION = "0.25.1"
"""The version that the constants of `vllm_calibration.json` were measured with."""


class Charge(Enum):
    """What the budget pays for besides the pool."""

    ABSOLUTE = "absolute"
    """Everything on the device: also the CUDA context, and other processes."""
    GROWTH = "growth"
    """Weights, the peak above them, and the growth outside torch; buffers made between loading and
    profiling escape."""
    FREE_MEMORY = "free memory"
    """Whatever has become less free since the first look, and the peak above it."""


class Captures(Enum):
    """The default list of captured sizes."""

    EIGHTS = "eights"
    """1, 2, 4, and multiples of 8 up to 512, whatever max_num_seqs is."""
    EIGHTS_OF_BATCH = "eights of the batch"
    """The same up to twice max_num_seqs."""
    SIXTEENS = "sixteens"
    """Multiples of 16 above 256, and never more than the tokens of a step."""
    WITH_LIMITS = "with limits"
    """Also the largest batches themselves."""


class CpuPool(Enum):
    """How large the pool of the CPU backend is unless the user says so."""

    FIXED = "fixed"
    """Some GiB, whatever the machine has."""
    HALF = "half"
    """Half of the memory."""
    BUDGET = "budget"
    """What the utilization leaves, as on GPUs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """How one version counts."""

    version: str
    utilization: float
    charge: Charge
    charges_nccl: bool
    """The first look at the device comes before NCCL is started."""
    graphs_in_budget: bool
    """The V1 runner captures graphs on trial and subtracts them."""
    v2_measures_graphs: bool
    """So does the V2 runner; a stub before 0.32."""
    v2_for: str
    """Which models the V2 runner serves: `none`, `qwen3`, `dense` or `all`."""
    v2_offloads: bool
    """It honours cpu_offload_gb; before, that is silently ignored."""
    v2_copies_logits: bool
    """The V2 sampler copies logits to float32 even when no request asks for processing."""
    v2_profiles_encoder: bool
    full_graphs: bool
    """Batches of decodes are captured whole, beside the piecewise graphs."""
    captures: Captures
    large_captures: bool
    """Data center Blackwells capture sizes up to 1024 by default, not 512."""
    times_kernels: bool
    """Compiling times fused kernels on tensors of its own: a second embedding table, and a buffer
    that flushes the L2 cache. In the logs from 0.20 on."""
    few_kernels: bool
    """Less is loaded outside torch: logs print 0.07 GiB on an H100, and 0.22 later."""
    keeps_workspace: bool
    """The experts' workspace stays allocated; before, it lived only while a layer ran."""
    gathers_less: bool
    """Sparse attention gathers fewer contexts at once where they are long."""
    copies_sparse_queries: bool
    """It keeps padded copies of queries and outputs."""
    plain_sparse_rows: bool
    """On data center Blackwells sparse attention keeps fp8 latents without scales of their own."""
    fp8_for_glm: bool
    """And GLM's cache is fp8 there."""
    pads_mxfp4: bool
    """The kernels of gpt-oss's experts want widths that are multiples of 256."""
    native_sampler: bool
    """The V1 sampler sorts all logits with torch where FlashInfer does not sample."""
    small_devices: tuple[str, ...]
    """Devices that get the batches of small ones, however much memory they have."""
    large_server_tokens: int
    """max_num_batched_tokens of the server on devices of 160 GiB and more."""
    async_scheduling: bool
    steps_in_flight: bool
    """A sliding window reserves room for all overlapping steps, not for one."""
    null_block: int
    """Blocks held back in the check that one sequence fits."""
    hybrid_groups: bool
    """Sliding layers have groups of their own; else they keep all tokens."""
    padding_ratio: float
    """See `kv_cache.kv_layout`."""
    packs_pages: bool
    """See `kv_packed`."""
    smallest_blocks: bool
    """Without a size from the user, blocks are the smallest that the backend takes."""
    latent_multiple: int
    """Beside recurrent layers, a block of latent attention is a multiple of so many tokens."""
    copies_absorbed: bool
    """Latent attention copies what it absorbs of kv_b_proj, also where a view would do."""
    tokens_from_concurrency: bool
    """The size that the log prints is concurrency times length."""
    hybrid_prefix_caching: bool
    """Prefix caching is on by default for models with recurrent layers."""
    short_longrope: bool
    """Without a length from the user, longrope models get the one that they began with (0.11.1)."""
    scales_yarn: bool
    """The longest context of yarn is the original one times its factor; else the config's."""
    modelopt_fp8_on_ampere: bool
    """ModelOpt's fp8 needs no Ada."""
    cuts_fused_blocks: bool
    """Shares of fused matrices may end within a block of fp8 scales (pull request 30836)."""
    fits_quantization: bool
    """Blocks of scales that the layout cuts are made smaller; before, it was refused."""
    cpu_pool: CpuPool
    cpu_block_size: int
    cpu_window_block_size: int
    """The least that the CPU backend takes for models with a sliding window."""
    cpu_whole_latent_prompts: bool
    """Without AMX, latent attention takes prompts whole, in small blocks."""

    @property
    def minor(self) -> tuple[int, int]:
        """Major and minor version, to compare."""
        major, minor, _ = self.version.split(".")
        return int(major), int(minor)

    @property
    def charges_buffers(self) -> bool:
        """The budget pays for what is made between loading and profiling."""
        return self.charge is not Charge.GROWTH

    @property
    def charges_context(self) -> bool:
        """The budget pays for the CUDA context."""
        return self.charge is Charge.ABSOLUTE


_0_8_5 = Rules(
    version="0.8.5",
    utilization=0.9,
    charge=Charge.ABSOLUTE,
    charges_nccl=True,
    graphs_in_budget=False,
    v2_measures_graphs=False,
    v2_for="none",
    v2_offloads=False,
    v2_copies_logits=True,
    v2_profiles_encoder=False,
    full_graphs=False,
    captures=Captures.EIGHTS,
    large_captures=False,
    times_kernels=False,
    few_kernels=True,
    keeps_workspace=False,
    gathers_less=False,
    copies_sparse_queries=False,
    plain_sparse_rows=False,
    fp8_for_glm=False,
    pads_mxfp4=True,
    native_sampler=True,
    small_devices=(),
    large_server_tokens=8192,
    async_scheduling=False,
    steps_in_flight=False,
    null_block=0,
    hybrid_groups=False,
    padding_ratio=1.0,
    packs_pages=False,
    smallest_blocks=False,
    latent_multiple=1,
    copies_absorbed=False,
    tokens_from_concurrency=False,
    hybrid_prefix_caching=False,
    short_longrope=False,
    scales_yarn=True,
    modelopt_fp8_on_ampere=False,
    cuts_fused_blocks=False,
    fits_quantization=False,
    cpu_pool=CpuPool.FIXED,
    cpu_block_size=16,
    cpu_window_block_size=1,
    cpu_whole_latent_prompts=False,
)
_0_10_2 = replace(
    _0_8_5,
    version="0.10.2",
    charge=Charge.GROWTH,
    captures=Captures.EIGHTS_OF_BATCH,
    small_devices=("a100",),
    hybrid_groups=True,
)
_0_12_0 = replace(
    _0_10_2,
    version="0.12.0",
    charges_nccl=False,
    short_longrope=True,
    full_graphs=True,
    captures=Captures.SIXTEENS,
    padding_ratio=1.25,
    cpu_block_size=128,
)
_0_15_1 = replace(
    _0_12_0,
    version="0.15.1",
    async_scheduling=True,
    cuts_fused_blocks=True,
    cpu_pool=CpuPool.HALF,
)
_0_19_1 = replace(
    _0_15_1,
    version="0.19.1",
    padding_ratio=1.5,
    smallest_blocks=True,
    native_sampler=False,
    keeps_workspace=True,
)
_0_20_2 = replace(
    _0_19_1,
    version="0.20.2",
    pads_mxfp4=False,
    times_kernels=True,
    few_kernels=False,
    utilization=0.92,
    graphs_in_budget=True,
    tokens_from_concurrency=True,
    cpu_pool=CpuPool.BUDGET,
)
_0_22_1 = replace(_0_20_2, version="0.22.1", v2_for="qwen3")
_0_25_1 = replace(_0_22_1, version="0.25.1", v2_for="dense", plain_sparse_rows=True)
_0_27_1 = replace(
    _0_25_1,
    version="0.27.1",
    charge=Charge.FREE_MEMORY,
    v2_profiles_encoder=True,
    v2_offloads=True,
    steps_in_flight=True,
    hybrid_prefix_caching=True,
)
_0_32_0 = replace(
    _0_27_1,
    version="0.32.0",
    fp8_for_glm=True,
    scales_yarn=False,
    modelopt_fp8_on_ampere=True,
    packs_pages=True,
    gathers_less=True,
    copies_sparse_queries=True,
    latent_multiple=128,
    copies_absorbed=True,
    v2_measures_graphs=True,
    v2_for="all",
    v2_copies_logits=False,
    captures=Captures.WITH_LIMITS,
    large_captures=True,
    large_server_tokens=16384,
    null_block=1,
    fits_quantization=True,
    cpu_window_block_size=32,
    cpu_whole_latent_prompts=True,
)
_0_33_0 = replace(_0_32_0, version="0.33.0", small_devices=("a100", "gb10"))

_RULES: tuple[Rules, ...] = (
    _0_8_5,
    _0_10_2,
    _0_12_0,
    _0_15_1,
    _0_19_1,
    _0_20_2,
    _0_22_1,
    _0_25_1,
    _0_27_1,
    _0_32_0,
    _0_33_0,
)


def rules_of(version: str | None) -> Rules:
    """The rules of a version; of a version between two that are known, those of the earlier minor.

    Newer ones get the newest rules; see `is_newer`.

    Raises:
        UsageError: not a version, or older than 0.8.
    """
    text = version or DEFAULT_VERSION
    match = re.match(r"v?(\d{1,4})\.(\d{1,4})(?:\.(\d{1,4}))?", text)
    if match is None:
        raise UsageError(f"{text!r} is no version of vLLM", hint=f"write it as {DEFAULT_VERSION}")
    major, minor = int(match[1]), int(match[2])
    older = [rules for rules in _RULES if rules.minor <= (major, minor)]
    if not older:
        raise UsageError(
            f"vLLM {text} is not modelled", hint="modelled: 0.8 to 0.33; see docs/formulas.md"
        )
    return older[-1]


def is_newer(version: str) -> bool:
    """Whether a version came after the last one whose sources were read."""
    match = re.match(r"v?(\d{1,4})\.(\d{1,4})", version)
    return match is not None and (int(match[1]), int(match[2])) > _RULES[-1].minor


_V2_EXPERTS = {"DeepseekV2ForCausalLM", "Qwen2MoeForCausalLM", "GraniteMoeForCausalLM"}


def default_runner(rules: Rules, spec: ModelSpec) -> str:
    """The model runner that serves a model unless VLLM_USE_V2_MODEL_RUNNER says otherwise.

    (`config/vllm.py: use_v2_model_runner`.)
    """
    if rules.v2_for == "all":
        return "v2"
    if rules.v2_for == "qwen3":
        return "v2" if spec.architecture == "Qwen3ForCausalLM" else "v1"
    experts = any(isinstance(layer.mlp, MoE) for layer in spec.layers)
    if rules.v2_for == "none" or spec.is_recurrent or spec.encoder_tokens or spec.pooling:
        return "v1"
    return "v1" if experts and spec.architecture not in _V2_EXPERTS else "v2"
