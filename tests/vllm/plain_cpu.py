"""Makes vLLM's CPU build compute the same on every CPU, and wait without spinning."""


def prepare():
    """Before vLLM chooses kernels."""
    import torch
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator

    # Kernels for AMX take fewer dtypes, and round inputs of int4 matrices.
    torch.cpu._is_amx_tile_supported = lambda: False
    # PyTorch's product of 8-bit floats is a plain loop on CPUs: minutes for 512 tokens.
    torch._scaled_mm = _multiplied_as_floats
    # vLLM's own collectives spin in shared memory: minutes where ranks outnumber the cores.
    CpuCommunicator._all_group_ranks_share_shm_group_name = lambda communicator: False


def _multiplied_as_floats(a, b, *, scale_a, scale_b, bias=None, out_dtype=None):
    product = (a.float() @ b.float()) * scale_a * scale_b
    return (product if bias is None else product + bias).to(out_dtype)
