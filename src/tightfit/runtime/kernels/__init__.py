"""Triton kernels, which are imported only where tensors are on a GPU."""

import os

# Products are added without rounding in between, as they were when the kernels were measured: the
# default until Triton 3.10, which says so from 3.9 on.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
