"""What arithmetic a run uses, in one place.

With `--amp` the activations of the cells, and what is differentiated through them, are of a 2-byte type. In 4
bytes stay: weights, their gradients and virtual weights, v, the optimizers, alphas, the statistics of batch
norm and every sum within a kernel, the stem, the classifiers and the loss.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

TYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
DEFAULT = "float16"  # its exact product is nearer than bfloat16's: docs/differences.md

# float16 ends at 65504; the figures of docs/differences.md are of this scale.
FIRST_LOSS_SCALE = 2.0**12


def activations(amp: bool, amp_dtype: str | None, device: torch.device) -> torch.dtype | None:
    """The 2-byte type of the activations, or None: they are of the weights' type.

    On a CPU `amp` alone changes nothing, as 2-byte arithmetic is slower there; a type asked for is taken.
    """
    if amp_dtype is None and (not amp or device.type == "cpu"):
        return None
    return TYPES[amp_dtype or DEFAULT]


def in_words(amp: bool, found: torch.dtype | None) -> str:
    """What `activations` gave for `amp`, for the log."""
    if found is not None:
        return f"{type_name(found)} activations in the cells, all else float32"
    return "float32" + (" (half precision is slower on a CPU; --amp_dtype forces it)" * amp)


def type_name(dtype: torch.dtype) -> str:
    """float16 of torch.float16."""
    return str(dtype).removeprefix("torch.")


class LossScale:
    """What a loss computed in float16 is multiplied by before it is differentiated: float16 has no numbers
    below 6e-8. Halved, on the device, whenever what was found is not finite; the optimizer then skips its
    step, for which it is given the flag `found_inf` (as by `torch.amp.GradScaler`).
    """

    def __init__(self, device: torch.device):
        self.value = torch.tensor(FIRST_LOSS_SCALE, device=device)

    def check(self, optimizer: torch.optim.Optimizer) -> None:
        """Before a step of a fused optimizer: looks at its gradients."""
        gradients = [tensor.grad for group in optimizer.param_groups for tensor in group["params"]]
        # What torch.amp.GradScaler calls: one launch for many gradients, which it multiplies by 1.
        one, found_inf = torch.ones_like(self.value), torch.zeros_like(self.value)
        torch._amp_foreach_non_finite_check_and_unscale_(gradients, found_inf, one)
        self.value.mul_(1.0 - 0.5 * found_inf)
        optimizer.found_inf = found_inf  # type: ignore[attr-defined]  # an attribute that a fused step looks for


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
