"""What arithmetic a run uses, in one place."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def strict_float32() -> Iterator[None]:
    """Within, float32 means float32 on CUDA too (cuDNN's convolutions default to TF32 there), and cuDNN takes
    deterministic algorithms without timing them first. No effect on CPU.
    """
    matmul = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = matmul
