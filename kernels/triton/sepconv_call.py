"""What the kernels of separable halves share: the arguments of a call, and the pointwise product."""

from collections.abc import Sequence
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from darts_fast.kernels.triton.launch import ACCUMULATORS, affines_of, norms_of
from darts_fast.kernels.triton.launch_table import Case, dot_channel_block
from darts_fast.kernels.types import Source, Task, Weights, accumulator, row_stride

# The interpreter multiplies the bit patterns of bfloat16; in float32 the products are the same and exact.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def dot(b_x, b_y, ACC: tl.constexpr):
    """Tensor cores for 2-byte types; float32 as it is, without TF32."""
    if INTERPRETED:
        b_x, b_y = b_x.to(ACC), b_y.to(ACC)
    return tl.dot(b_x, b_y, input_precision="ieee", out_dtype=ACC)


class Call(NamedTuple):
    """The arguments that the functions share, as the kernels take them."""

    sources: tuple[Tensor, ...]
    means: tuple[Tensor, ...]  # of the sources
    rs: tuple[Tensor, ...]
    norms: tuple[int, ...]
    gammas: tuple[Tensor, ...]
    betas: tuple[Tensor, ...]
    affine: bool  # whether the sources have these: all or none
    tasks: tuple[Task, ...]
    has_depthwise: tuple[int, ...]
    out_shape: tuple[int, int, int, int]  # of a task

    @classmethod
    def of(cls, sources: Sequence[Source], tasks: Sequence[Task]) -> "Call":
        x, pointwise = sources[0].x, [task.weights.pointwise for task in tasks]
        if (
            len({(source.x.shape, source.x.dtype) for source in sources}) > 1
            or len({p.shape for p in pointwise}) > 1
            or len({task.stride for task in tasks}) > 1
        ):
            raise ValueError("the sources, outputs and strides of one Triton launch must be alike")
        gammas, betas, affines = affines_of(sources)
        if len(set(affines)) > 1:
            raise ValueError("either all sources of one Triton launch have gamma and beta, or none has")
        n, _, height, width = x.shape
        stride, k = tasks[0].stride, pointwise[0].shape[0]
        return cls(
            tuple(source.x for source in sources),
            *norms_of(sources),
            gammas,
            betas,
            any(affines),
            tuple(tasks),
            tuple(int(task.weights.depthwise is not None) for task in tasks),
            (n, k, -(-height // stride), -(-width // stride)),
        )

    def of_tasks(self, values: Sequence) -> tuple:
        """Returns the value of each task's source."""
        return tuple(values[task.source] for task in self.tasks)

    def weights(
        self, tangents: Sequence[Weights] | None = None
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Returns the depthwise and the pointwise weights, or their tangents. Where a task has no depthwise
        weights, a tensor that is not read stands in."""
        weights = tangents or [task.weights for task in self.tasks]
        depthwise = tuple(w.pointwise if w.depthwise is None else w.depthwise for w in weights)
        return depthwise, tuple(w.pointwise for w in weights)

    def geometry(self) -> dict:
        """Returns the constants that say how each task walks its source."""
        kernels = self.kernels()
        return {
            "KERNELS": kernels,
            "DILATIONS": tuple(task.dilation for task in self.tasks),
            "SHIFTS": tuple(
                task.offset - task.dilation * (k // 2) for task, k in zip(self.tasks, kernels, strict=True)
            ),
            "HAS_D": self.has_depthwise,
        }

    def kernels(self) -> tuple[int, ...]:
        depthwise = [task.weights.depthwise for task in self.tasks]
        return tuple(1 if d is None else d.shape[-1] for d in depthwise)

    def direct(self) -> bool:
        """Returns whether the tasks are 1x1 convolutions of one source each: its adjoint is [h > 0] P' Y."""
        plain = all(task == Task(i, task.weights) for i, task in enumerate(self.tasks))
        return (
            plain
            and len(self.tasks) == len(self.sources)
            and not any(self.has_depthwise)
            and not any(self.norms)
        )

    def case(self) -> Case:
        x = self.sources[0]
        return Case(
            x.dtype,
            x.shape[1],
            self.out_shape[1],
            self.tasks[0].stride,
            any(self.has_depthwise),
            any(self.norms),
            self.direct(),
        )

    def sizes(self) -> dict:
        x = self.sources[0]
        _, c, height, width = x.shape
        return {
            "H": height,
            "W": width,
            "HO": self.out_shape[2],
            "WO": self.out_shape[3],
            "C": c,
            "STRIDE": self.tasks[0].stride,
            "BLOCK_C": dot_channel_block(c, x.dtype),
            "ACC": ACCUMULATORS[accumulator(x.dtype)],
        }

    def positions(self) -> int:
        n, _, height, width = self.out_shape
        return n * height * width

    def pixels(self) -> int:
        n, _, height, width = self.sources[0].shape
        return n * height * width


def of_terms(terms: Sequence[Sequence[Tensor]] | None, stand_in: Tensor) -> tuple[tuple[Tensor, ...], dict]:
    """Returns the terms that are added to the adjoints of sources, and the constants that say to which."""
    flat = [(number, term) for number, its in enumerate(terms or ()) for term in its]
    constants = {
        "TERM_SOURCES": tuple(number for number, _ in flat),
        "TERM_ROWS": tuple(row_stride(term) for _, term in flat),
    }
    return tuple(term for _, term in flat) or (stand_in,), constants
