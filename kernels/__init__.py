"""Kernels of the mixed cell, installed as `darts_fast.kernels`.

cell.py       a cell as data, lowered to the calls of its four sweeps
plan.py       the buffers of these calls, placed in memory
network.py    the autograd function through which a network calls its sweeps
single.py     single calls as autograd functions, for derived networks
normalize.py  batch norm with affine parameters, of stems and of derived networks
first_derivative.py    which derivatives a pass asks for, and the refusal of those that there are not
types.py      what a backend is: its functions and their arguments
aten/  native/  triton/    the backends, a package each with the same functions in the same files
backends.py   which of them computes what
processors.py    how many processors this process may use
"""

from darts_fast.kernels.backends import backend, used
from darts_fast.kernels.network import Plan, cells
from darts_fast.kernels.normalize import normalize
from darts_fast.kernels.plan import Blocks
from darts_fast.kernels.processors import threads
from darts_fast.kernels.single import pool, sepconv

__all__ = ["Blocks", "Plan", "backend", "cells", "normalize", "pool", "sepconv", "threads", "used"]
