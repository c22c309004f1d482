"""The peak of vLLM's profile run: a step of `max_num_batched_tokens` tokens, then the sampler.

The formulas list the tensors that torch's memory history showed alive at the peak of real start-ups
(`live_at_peak` in benchmarks/data/vllm_gpu_rows.jsonl), in the code of vLLM 0.25.1 that makes them.
M is max_num_batched_tokens, N max_num_seqs, H the hidden size, Q and KV the features of the rank's
query and KV heads, I its share of the inner size, V the padded vocabulary, b bytes of an element.
"""

from tightfit.model.blocks.mlp import MoE
from tightfit.model.spec import Layer
from tightfit.planner.engines.vllm_setting import Setting, quantized
from tightfit.planner.plan import Component
from tightfit.units import MiB, cdiv

CUBLAS_WORKSPACE = 32 * MiB
"""torch gives cuBLAS this much per stream on Hopper (`CUDABlas.cpp`), and never takes it back."""
CUBLASLT_WORKSPACE = MiB
"""A linear layer with a bias goes through cuBLASLt."""

Stages = dict[str, int]


def step_components(setting: Setting) -> list[Component]:
    """`activations`, `logits_and_sampler` and `moe_workspace`, whose sum is the peak."""
    workspace = moe_workspace(setting)
    kept = CUBLAS_WORKSPACE
    if any(layer.attention.qkv_bias for layer in setting.layers):
        kept += CUBLASLT_WORKSPACE
    name, largest = _largest(_layer_stages(setting, kept))
    compile_name, compiling = _largest(_compile_stages(setting))
    if compiling > largest + workspace:
        name, largest = compile_name, compiling - workspace
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
    if setting.last_stage:
        name, sampling = _largest(_sampler_stages(setting))
        sampling += kept
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
        moe = next(layer for layer in setting.layers if isinstance(layer.mlp, MoE))
        assert isinstance(moe.mlp, MoE)
        components.append(
            Component(
                name="moe_workspace",
                planned_bytes=workspace,
                origin="derived",
                formula=f"M x top_k x (max(I, H) + max(2I, H)) x b = "
                f"{setting.max_num_batched_tokens} x {moe.mlp.top_k} x "
                f"(max({setting.inner(moe)}, {setting.spec.hidden_size}) + "
                f"max({2 * setting.inner(moe)}, {setting.spec.hidden_size})) x "
                f"{setting.element_bytes}, kept from the profile run on",
            )
        )
    return components


def moe_workspace(setting: Setting) -> int:
    """`layers/fused_moe/modular_kernel.py`: two buffers for all chosen experts of all tokens."""
    found = 0
    for layer in set(setting.layers):
        if isinstance(layer.mlp, MoE):
            hidden, inner = setting.spec.hidden_size, setting.inner(layer)
            rows = setting.max_num_batched_tokens * layer.mlp.top_k
            pair = rows * (max(inner, hidden) + max(2 * inner, hidden))
            found = max(found, pair * setting.element_bytes)
    return found


def step_bytes(setting: Setting) -> tuple[int, int]:
    """What a full step leaves in the allocator's cache, and the largest single tensor of it."""
    stages = [_layer_peak(setting, layer) for layer in set(setting.layers)]
    return max(max(s.values()) for s in stages), max(
        _largest_tensor(setting, layer) for layer in set(setting.layers)
    )


def _largest_tensor(setting: Setting, layer: Layer) -> int:
    q, kv = setting.heads(layer)
    width = q + 2 * kv
    if not isinstance(layer.mlp, MoE):
        width = max(width, 2 * setting.inner(layer))
    return setting.max_num_batched_tokens * width * setting.element_bytes


def _layer_stages(setting: Setting, kept: int) -> Stages:
    """The largest moments of a layer, with what cuBLAS keeps."""
    stages: Stages = {}
    l2 = 0 if setting.eager or quantized(setting.spec) else setting.chip["l2_bytes"]
    for layer in set(setting.layers):
        for name, size in _layer_peak(setting, layer).items():
            # Inductor times its kernels in the first run, and flushes the L2 cache with a buffer.
            flush = l2 if name.startswith("MLP") else 0
            label = f"{name} + cuBLAS's workspace"
            label += " + a buffer as large as the L2 cache, used to time kernels" if flush else ""
            stages[label] = max(stages.get(label, 0), size + kept + flush)
    return stages


def _layer_peak(setting: Setting, layer: Layer) -> Stages:
    """The residual stream, the output of attention and one more tensor live through the MLP."""
    tokens, b = setting.max_num_batched_tokens, setting.element_bytes
    hidden = setting.hidden_bytes
    q, kv = setting.heads(layer)
    around = 2 * hidden + tokens * q * b
    stages = {
        f"attention (3H + 3Q + 3KV) x M x b with Q = {q}, KV = {kv}": around
        + hidden
        + tokens * (2 * q + 3 * kv) * b
    }
    if isinstance(layer.mlp, MoE):
        return stages
    inner = setting.inner(layer)
    if quantized(setting.spec):
        # Activations are quantized as they are made, with one float32 scale for 128 of them.
        size = around + tokens * (2 * inner * b + inner + cdiv(inner, 128) * 4)
        return {**stages, f"MLP (2H + Q + 2I) x M x b + I x M with I = {inner}": size}
    size = around + 3 * tokens * inner * b
    return {**stages, f"MLP (2H + Q + 3I) x M x b with I = {inner}": size}


def _compile_stages(setting: Setting) -> Stages:
    """`torch.compile` times the fused kernels on tensors of its own before anything is run.

    That happens when the compile cache is cold; the largest is the kernel that reads the embedding.
    """
    if setting.eager or not setting.first_stage:
        return {"nothing": 0}
    b = setting.element_bytes
    rows = setting.vocab // setting.tensor_parallel_size
    table = rows * setting.spec.hidden_size * b
    written = setting.hidden_bytes
    written += setting.hidden_bytes // (b if quantized(setting.spec) else 1)
    name = f"compiling the embedding's kernel, a second table {rows} x H x b and what it writes"
    return {name: table + written}


def _sampler_stages(setting: Setting) -> Stages:
    """What is alive while a token is drawn for each of N sequences."""
    n, v, b = setting.rows, setting.vocab, setting.element_bytes
    chosen = n * setting.spec.hidden_size * b
    base = setting.hidden_bytes + chosen + n * v * b
    if setting.runner == "v1":
        top = min(n, setting.chip["multiprocessors"]) * v * 4
        name = f"hidden states, logits, 3 float32 copies, {top // v // 4} rows for top-k and top-p"
        return {name: base + chosen + 3 * n * v * 4 + top}
    noise = n * cdiv(v, 1024) * 12
    stages = {"hidden states and logits": base + noise}
    if setting.tensor_parallel_size > 1:
        share = n * v // setting.tensor_parallel_size * b
        stages["hidden states, logits and the rank's share of them"] = base + share
    if setting.rules.v2_profile_copies_logits:
        stages["hidden states, logits and a float32 copy"] = base + n * v * 4 + noise
    return stages


def _largest(stages: Stages) -> tuple[str, int]:
    return max(stages.items(), key=lambda item: item[1])
