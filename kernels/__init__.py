"""Kernels of the mixed cell, installed as `darts_fast.kernels`.

cell.py       a cell as data, lowered to the calls of its four sweeps
plan.py       the buffers of these calls, placed in memory
network.py    the autograd functions through which a network calls its sweeps
normalize.py  batch norm with affine parameters, of a search's stem
first_derivative.py    which derivatives a pass asks for, and the refusal of those that there are not
types.py      what a backend is: its functions and their arguments
aten/  native/  triton/    the backends, a package each with the same functions in the same files (but for
                           aten/convolution.py and aten/partial.py, which are for all)
backends.py   which of them computes what
processors.py    how many processors this process may use
"""

from darts_fast.kernels.backends import backend, used
from darts_fast.kernels.network import Plan, cells, derived_cells
from darts_fast.kernels.normalize import normalize
from darts_fast.kernels.plan import Blocks
from darts_fast.kernels.processors import threads

__all__ = ["Blocks", "Plan", "backend", "cells", "derived_cells", "normalize", "threads", "used"]
