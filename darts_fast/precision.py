"""What arithmetic a run uses, in one place."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def strict_float32() -> Iterator[None]:
    """Within, float32 means float32: no TF32 (cuDNN's convolutions default to it), no autocast of the
    caller's. cuDNN takes deterministic algorithms, without timing them first.
    """
    matmul = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with ExitStack() as within:
            within.enter_context(
                torch.backends.cudnn.flags(
                    enabled=True, benchmark=False, deterministic=True, allow_tf32=False
                )
            )
            for device in ("cpu", "cuda"):
                within.enter_context(torch.autocast(device, enabled=False))
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = matmul
