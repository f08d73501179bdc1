"""Kernels of the mixed cell, installed as `darts_fast.kernels`.

Empty for now: the fused mixed cell and its kernels come behind the interface that will stand here.
Until then every search runs on the reference cell (`darts_fast/reference.py`).
"""
