"""What a process holds before it loads a model: libraries that have been used once."""

import gc
from dataclasses import replace

import torch

from tightfit.model.blocks.attention import Attention, Rope
from tightfit.model.blocks.mlp import DenseMLP
from tightfit.model.layout import Parallel, Rank
from tightfit.model.parameters import parameters
from tightfit.model.spec import Layer, ModelSpec
from tightfit.runtime.device_errors import building_kernels
from tightfit.runtime.layers import Weights
from tightfit.runtime.loading.files import TORCH_DTYPES
from tightfit.runtime.loading.loader import load_dummy
from tightfit.runtime.memory.ledger import CpuLedger
from tightfit.runtime.options import EngineOptions
from tightfit.runtime.ranks.world import World
from tightfit.runtime.worker import Worker


def exercise_gpu(dtype: torch.dtype, device: torch.device) -> None:
    """Multiply, so that cuBLAS and its workspace count as CUDA's, and see that Triton works."""
    x = torch.ones(256, 256, dtype=dtype, device=device)
    torch.mm(x, x).softmax(dim=-1)
    with building_kernels():
        from tightfit.runtime.kernels import norms

        norms.rms_norm(x, x[0], eps=1e-6, unit_offset=False)
    torch.cuda.synchronize(device)


def exercise_libraries(options: EngineOptions, world: World) -> None:
    """Run a toy model, so that code pages and the libraries' own buffers count as the process.

    It is just large enough for MKL and oneDNN to take the paths, and the packing buffers, that they
    take for large matrices.
    """
    attention = Attention(
        num_heads=2 * world.tp_size,
        num_kv_heads=world.tp_size,
        head_dim=64,
        rope=Rope(theta=1e4, rotary_dim=64, max_position_embeddings=64),
        scale=0.125,
    )
    mlp = DenseMLP(intermediate_size=2048 * world.tp_size, activation="silu")
    spec = ModelSpec(
        architecture="toy",
        model_type="toy",
        dtype=options.dtype,
        hidden_size=512,
        vocab_size=64 * world.tp_size,
        layers=(Layer(mixers=(attention,), mlp=mlp),),
        max_position_embeddings=64,
        norm_eps=1e-5,
    )
    toy = replace(
        options,
        max_model_len=256,
        max_num_seqs=4,
        max_num_batched_tokens=256,
        num_blocks=4,
        block_size=16,
    )
    parallel = Parallel(tensor_parallel_size=world.tp_size)
    rank: Rank = parallel.ranks()[world.tp_rank]
    dtype = TORCH_DTYPES[options.dtype]
    tensors = tuple(weight.rank_tensor(rank, spec.dtype) for weight in parameters(spec))
    weights = load_dummy(tensors, dtype=dtype, device=world.device, seed=0)
    Worker(spec, rank, toy, Weights(tensors=weights), world=world, ledger=CpuLedger()).warm_up()
    # A worker and its graphs know each other, so only the collector frees them.
    gc.collect()
