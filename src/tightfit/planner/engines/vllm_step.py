"""The peak of vLLM's profile run: a step of `max_num_batched_tokens` tokens, then the sampler.

The formulas list the tensors that torch's memory history showed alive at the peak of real start-ups
(`live_at_peak` in benchmarks/data/vllm_gpu_rows.jsonl), in the code of vLLM 0.25.1 that makes them.
M is max_num_batched_tokens, N max_num_seqs, H the hidden size, Q and KV the features of the rank's
query and KV heads, I its share of the inner size, V the padded vocabulary, b bytes of an element.
"""

from collections.abc import Iterator

from tightfit.model.blocks.attention import Attention
from tightfit.model.blocks.compressed_attention import CompressedAttention
from tightfit.model.blocks.latent_attention import LatentAttention
from tightfit.model.blocks.mlp import MoE
from tightfit.model.spec import Layer
from tightfit.planner.engines.vllm_setting import Setting, arithmetic, mixer_widths
from tightfit.planner.engines.vllm_sparse import (
    compressed_stage,
    indexer_keys,
    indexer_stage,
    sparse_workspaces,
)
from tightfit.planner.plan import Component
from tightfit.units import MiB, cdiv

CUBLAS_WORKSPACE = 32 * MiB
"""torch gives cuBLAS this much per stream from Hopper on (`CUDABlas.cpp`), and never takes it
back; before, it was a quarter."""
CUBLASLT_WORKSPACE = MiB
"""A linear layer with a bias goes through cuBLASLt."""

Stages = dict[str, int]


def step_components(setting: Setting) -> list[Component]:
    """`activations`, `logits_and_sampler` and `moe_workspace`, whose sum is the peak."""
    needed = moe_workspace(setting)
    workspace = needed if setting.rules.keeps_workspace else 0
    kept = _cublas(setting)
    stages = _layer_stages(setting, kept)
    if needed and not workspace:
        stages["experts (2H + both buffers)"] = kept + 2 * setting.hidden_bytes + needed
    name, largest = _largest(stages)
    # Before the first experts run, their workspace is not there.
    for early in (_layer_stages(setting, kept, early=True), _compile_stages(setting)):
        early_name, size = _largest(early)
        if size > largest + workspace:
            name, largest = early_name, size - workspace
    sizes = (
        f"M = {setting.max_num_batched_tokens}, H = {setting.spec.hidden_size}, "
        f"b = {setting.element_bytes}"
    )
    components = [
        Component(
            name="activations",
            planned_bytes=largest,
            origin="derived",
            formula=f"{sizes}; the largest moment of the profile run, {name}: {largest}",
            detail={"resident_bytes": kept},
        )
    ]
    if setting.samples:
        name, sampling = _largest(_sampler_stages(setting))
        # The logits are computed by cuBLAS, whatever the layers use.
        sampling += max(kept, _cublas_workspace(setting))
        components.append(
            Component(
                name="logits_and_sampler",
                planned_bytes=max(0, sampling - largest),
                origin="derived",
                formula=f"N = {setting.rows}, V = {setting.vocab}, {sizes}; {name}, with cuBLAS's "
                f"workspace: {sampling}, less the activations, which are freed before: {largest}",
                detail={"alone_bytes": sampling, "resident_bytes": 0},
            )
        )
    if workspace:
        components.append(_workspace_component(setting))
    return components


def _cublas(setting: Setting) -> int:
    """What the libraries of the layers' products keep; quantized ones have kernels of their own."""
    if arithmetic(setting.spec) not in ("plain", "fp8_block"):
        return 0
    kept = _cublas_workspace(setting)
    if any(isinstance(mixer, Attention) and mixer.qkv_bias for mixer in setting.mixers):
        kept += CUBLASLT_WORKSPACE
    return kept


def _cublas_workspace(setting: Setting) -> int:
    return CUBLAS_WORKSPACE if setting.is_recent else CUBLAS_WORKSPACE // 4


def _workspace_component(setting: Setting) -> Component:
    size, formula = max(_workspaces(setting))
    return Component(
        name="moe_workspace",
        planned_bytes=size,
        origin="derived",
        formula=f"{formula}, kept from the profile run on",
    )


def moe_workspace(setting: Setting) -> int:
    """Bytes of the buffers that experts and sparse attention work in, in turn."""
    return max((size for size, _ in _workspaces(setting)), default=0)


def _workspaces(setting: Setting) -> Iterator[tuple[int, str]]:
    """`layers/fused_moe/modular_kernel.py`: two buffers for all chosen experts of all tokens.

    Data parallel replicas gather their tokens first, whether experts are dealt whole or not.
    Own kernels (gpt-oss's: `experts/gpt_oss_triton_kernels_moe.py`) need none.
    """
    if setting.rules.keeps_workspace:
        yield from sparse_workspaces(setting)
    tokens, b = setting.expert_tokens, setting.element_bytes
    for layer in setting.kinds:
        if isinstance(layer.mlp, MoE) and not layer.mlp.own_kernels:
            width, inner = layer.mlp.latent_size or setting.spec.hidden_size, setting.inner(layer)
            times = 2 if layer.mlp.gated else 1
            columns = max(inner, width) + max(times * inner, width)
            yield (
                tokens * layer.mlp.top_k * columns * b,
                f"tokens x top_k x (max(I, H) + max({times}I, H)) x b = {tokens} x "
                f"{layer.mlp.top_k} x (max({inner}, {width}) + max({times * inner}, {width})) x "
                f"{b}",
            )


def step_bytes(setting: Setting) -> tuple[int, int]:
    """What a full step leaves in the allocator's cache, and the largest single tensor of it."""
    stages = [_layer_peak(setting, layer) for layer in setting.kinds]
    return max(max(s.values()) for s in stages), max(
        _largest_tensor(setting, layer) for layer in setting.kinds
    )


def _largest_tensor(setting: Setting, layer: Layer) -> int:
    q, kv = setting.widths(layer)
    width = q + 2 * kv
    if not isinstance(layer.mlp, MoE):
        width = max(width, 2 * setting.inner(layer))
    return setting.max_num_batched_tokens * width * setting.element_bytes


def _layer_stages(setting: Setting, kept: int, *, early: bool = False) -> Stages:
    """The largest moments of a layer, with what cuBLAS keeps; `early` ones precede all experts."""
    stages: Stages = {"nothing": 0}
    block = arithmetic(setting.spec) == "fp8_block"
    l2 = setting.chip["l2_bytes"] if setting.times_kernels and not block else 0
    for layer in _before_experts(setting.layers, early):
        for name, size in _layer_peak(setting, layer).items():
            # Inductor times its kernels in the first run, and flushes the L2 cache with a buffer.
            flush = l2 if name.startswith("MLP") else 0
            label = f"{name} + what cuBLAS keeps"
            label += " + a buffer as large as the L2 cache, used to time kernels" if flush else ""
            stages[label] = max(stages.get(label, 0), size + kept + flush)
    return stages


def _before_experts(layers: tuple[Layer, ...], early: bool) -> dict[Layer, None]:
    """The kinds of layers before the first with experts, or from there on."""
    first = next((i for i, layer in enumerate(layers) if isinstance(layer.mlp, MoE)), 0)
    return dict.fromkeys(layers[:first] if early else layers[first:])


def _layer_peak(setting: Setting, layer: Layer) -> Stages:
    """The residual stream, the output of attention and one more tensor live through the MLP."""
    tokens, b = setting.max_num_batched_tokens, setting.element_bytes
    hidden = setting.hidden_bytes
    stages: Stages = {}
    q, _ = setting.widths(layer)
    for mixer in layer.mixers:
        if isinstance(mixer, LatentAttention):
            stages |= _latent_stage(setting, mixer)
            if indexer_keys(mixer, setting.rank):
                stages |= indexer_stage(setting, mixer)
        elif isinstance(mixer, CompressedAttention):
            stages |= compressed_stage(setting, layer, mixer)
        elif mixer.is_recurrent:
            made, given = mixer_widths(mixer, setting.rank)
            name = f"recurrence (3H + 2P + 2I) x M x b with P = {made}, I = {given}"
            stages[name] = 3 * hidden + 2 * tokens * (made + given) * b
        else:
            q, kv = mixer_widths(mixer, setting.rank)
            name = f"attention (3H + 3Q + 3KV) x M x b with Q = {q}, KV = {kv}"
            stages[name] = 3 * hidden + 3 * tokens * (q + kv) * b
    replicas = setting.rank.parallel.data_parallel_size
    if isinstance(layer.mlp, MoE) and replicas > 1:
        name = f"experts ({3 + replicas}H) x M x b, with the tokens of {replicas} replicas"
        stages[name] = (3 + replicas) * hidden
    if isinstance(layer.mlp, MoE) or layer.mlp is None:
        return stages or {"one layer's output H x M x b": hidden}
    recurrent = any(mixer.is_recurrent for mixer in layer.mixers)
    latent = any(isinstance(mixer, LatentAttention) for mixer in layer.mixers)
    around = 2 * hidden + (0 if recurrent or latent or not layer.mixers else tokens * q * b)
    if setting.eager and (setting.spec.towers or setting.spec.wraps_decoder):
        around += hidden
    inner = setting.inner(layer)
    kind = arithmetic(setting.spec)
    if kind in ("fp8", "fp8_block"):
        # Activations are quantized as they are made, by blocks with a float32 scale for 128.
        scales = cdiv(inner, 128) * 4 if kind == "fp8_block" else 0
        size = around + tokens * (2 * inner * b + inner + scales)
        return {**stages, f"MLP (2H + Q + 2I) x M x b + I x M with I = {inner}": size}
    made = 3 if layer.mlp.gated else 2
    size = around + made * tokens * inner * b
    if kind == "int8":
        size += tokens * inner
        return {**stages, f"MLP (2H + Q + {made}I) x M x b + I x M with I = {inner}": size}
    return {**stages, f"MLP (2H + Q + {made}I) x M x b with I = {inner}": size}


_LATENT_ROWS = 65_536
"""Tokens of context that prefill widens at a time (`mla_attention.py: determine_chunked_...`)."""


def _latent_stage(setting: Setting, mixer: LatentAttention) -> Stages:
    """The widened keys and values of a long context, allocated once at their worst.

    With the V1 runner more of the hidden states of earlier pieces are alive.
    """
    tokens, b = setting.max_num_batched_tokens, setting.element_bytes
    size = setting.kv.block_size
    rows = max(8 * setting.max_model_len, 4 * setting.max_num_seqs * size)
    rows = max(min(rows, _LATENT_ROWS), setting.max_num_seqs * size)
    wide = mixer.heads(mixer.qk_nope_head_dim + mixer.v_head_dim).span(setting.rank)[1]
    q = mixer.heads(mixer.qk_head_dim).span(setting.rank)[1]
    out = mixer.heads(mixer.v_head_dim).span(setting.rank)[1]
    small = tokens * (mixer.kv_lora_rank + mixer.qk_rope_head_dim) * b
    outs, hiddens = (2, 7) if setting.runner == "v1" else (1, 1)
    total = rows * wide * b + tokens * (q + outs * out) * b + hiddens * setting.hidden_bytes + small
    name = (
        f"latent attention: {rows} rows x {wide} x b + (Q + {outs} V + {hiddens} H + L) x M x b "
        f"with Q = {q}, V = {out}, L = {mixer.latent_size}"
    )
    return {name: total}


def _compile_stages(setting: Setting) -> Stages:
    """`torch.compile` times the fused kernels on tensors of its own before anything is run.

    That happens when the compile cache is cold; the largest are the kernel that reads the
    embedding, and where activations are quantized as a tensor, the MLP.
    """
    if not setting.times_kernels:
        return {"nothing": 0}
    b, tokens = setting.element_bytes, setting.max_num_batched_tokens
    kind = arithmetic(setting.spec)
    stages: Stages = {"nothing": 0}
    if kind == "fp8":
        inner = max((setting.inner(layer) for layer in setting.kinds), default=0)
        name = f"compiling the MLP's kernels (2H + 3I) x M x b + I x M with I = {inner}"
        stages[name] = 2 * setting.hidden_bytes + tokens * inner * (3 * b + 1)
    if setting.first_stage:
        rows = setting.vocab // setting.tensor_parallel_size
        table = rows * setting.spec.hidden_size * b
        # Where the first norm also quantizes, the L2 cache is flushed for the timing.
        beside = setting.chip["l2_bytes"] if kind == "fp8_block" else setting.hidden_bytes
        name = f"compiling the embedding's kernel, a second table {rows} x H x b and what it writes"
        stages[name] = table + setting.hidden_bytes + beside
    return stages


def _sampler_stages(setting: Setting) -> Stages:
    """What is alive while a token is drawn for each of N sequences."""
    n, v, b = setting.rows, setting.vocab, setting.element_bytes
    chosen = n * setting.spec.hidden_size * b
    base = setting.hidden_bytes + chosen + n * v * b
    if setting.runner == "v1":
        if setting.options.use_flashinfer_sampler:
            return {"hidden states, logits and 3 float32 copies": base + chosen + 3 * n * v * 4}
        if setting.rules.native_sampler:
            name = "hidden states, logits, float32 copies, and the sorted logits with their places"
            return {name: base + chosen + n * v * _SORTED_BYTES}
        top = min(n, setting.chip["multiprocessors"]) * v * 4
        base += _lingering(setting)
        name = f"hidden states, logits, 3 float32 copies, {top // v // 4} rows for top-k and top-p"
        return {name: base + chosen + 3 * n * v * 4 + top}
    noise = n * cdiv(v, 1024) * 12
    stages = {"hidden states and logits": base + noise}
    if setting.tensor_parallel_size > 1:
        share = n * v // setting.tensor_parallel_size * b
        stages["hidden states, logits and the rank's share of them"] = base + share
    if setting.rules.v2_copies_logits:
        stages["hidden states, logits and a float32 copy"] = base + n * v * 4 + noise
    return stages


def _lingering(setting: Setting) -> int:
    """With latent attention and the V1 runner, pieces of the last step are alive while sampling."""
    found = 0
    for mixer in setting.mixers:
        if isinstance(mixer, LatentAttention) and mixer.absorbed:
            q = mixer.heads(mixer.qk_head_dim + mixer.v_head_dim).span(setting.rank)[1]
            features = 2 * q + 6 * setting.spec.hidden_size + mixer.latent_size
            found = max(found, setting.max_num_batched_tokens * features * setting.element_bytes)
    return found


_SORTED_BYTES = 36
"""For each logit: float32 logits and their copy, sorted values and int64 places, probabilities and
their sums, and a mask (`v1/sample/ops/topk_topp_sampler.py: apply_top_k_top_p`)."""


def _largest(stages: Stages) -> tuple[str, int]:
    return max(stages.items(), key=lambda item: item[1])
