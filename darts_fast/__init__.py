"""darts_fast: exact, fast differentiable architecture search (DARTS, arXiv 1806.09055).

from darts_fast import SearchConfig, search
result = search(SearchConfig(dataset="digits"))
print(result.genotype)
"""

from importlib.metadata import version

from darts_fast.config import ProtocolConfig, SearchConfig, TrainConfig
from darts_fast.derived import load_network, network
from darts_fast.errors import InputError, RunError
from darts_fast.genotype import Genotype
from darts_fast.notation import load_genotype
from darts_fast.search import SearchResult, resume_search, search
from darts_fast.train import TrainResult, evaluate, resume_training, train

__version__ = version("darts_fast")

__all__ = [
    "Genotype",
    "InputError",
    "ProtocolConfig",
    "RunError",
    "SearchConfig",
    "SearchResult",
    "TrainConfig",
    "TrainResult",
    "evaluate",
    "load_genotype",
    "load_network",
    "network",
    "resume_search",
    "resume_training",
    "search",
    "train",
]
