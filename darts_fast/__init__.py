"""darts_fast: exact, fast differentiable architecture search (DARTS, arXiv 1806.09055)."""

__version__ = "0.1.0"
