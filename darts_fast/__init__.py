"""darts_fast: exact, fast differentiable architecture search (DARTS, arXiv 1806.09055).

from darts_fast import SearchConfig, search
result = search(SearchConfig(dataset="digits"))
print(result.genotype)
"""

from importlib.metadata import version

from darts_fast.config import SearchConfig
from darts_fast.errors import InputError, RunError
from darts_fast.genotype import Genotype
from darts_fast.notation import load_genotype
from darts_fast.search import SearchResult, resume_search, search

__version__ = version("darts_fast")

__all__ = [
    "Genotype",
    "InputError",
    "RunError",
    "SearchConfig",
    "SearchResult",
    "load_genotype",
    "resume_search",
    "search",
]
