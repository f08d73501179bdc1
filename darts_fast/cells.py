"""What a search must know of the cells it searches: their network, how they are derived, read and drawn."""

from darts_fast import nasbench201, plot
from darts_fast.config import SearchConfig
from darts_fast.cost import Cost, cost
from darts_fast.data import Dataset
from darts_fast.flat import FlatNetwork
from darts_fast.genotype import Genotype, derive
from darts_fast.nasbench201 import Cell, SearchNetwork
from darts_fast.spaces import read_space, written_out
from darts_fast.supernet import Supernet


class DartsCells:
    """Normal and reduction cells, in the space that `spaces.read_space` reads from `space`. Raises what that
    does."""

    read = staticmethod(Genotype.from_json)
    picture = staticmethod(plot.genotype_png)

    def __init__(self, space: str):
        self.space = read_space(space)
        self.written_out = written_out(self.space)  # a resumed run needs no file
        self.names = self.space.names

    def network(self, config: SearchConfig, dataset: Dataset) -> Supernet:
        """A new supernet, on PyTorch's default device."""
        image_channels = dataset.images.shape[1]
        return Supernet(
            config.init_channels,
            dataset.classes,
            config.layers,
            image_channels,
            config.fused,
            self.space,
            config.partial_channels,
        )

    def cost(self, config: SearchConfig, dataset: Dataset) -> Cost:
        """The cost of what is derived from a supernet of these settings, at the supernet's own size."""
        image_channels, height, width = dataset.images.shape[1:]
        return cost(
            self.space,
            config.init_channels,
            config.layers,
            image_channels,
            dataset.classes,
            height,
            width,
        )

    def derive(self, network: FlatNetwork, rule: str) -> Genotype:
        assert isinstance(network, Supernet)
        normal, reduce = network.present(network.alphas()).values()
        return derive(normal, reduce, rule, self.space, network.edge_weights())


class NasBench201Cells:
    """The same of NAS-Bench-201, whose cells are all alike. (The rules of `derive` agree here: an edge keeps
    its strongest candidate.)"""

    written_out, names = nasbench201.NAME, nasbench201.NAMES
    read = staticmethod(Cell.from_json)
    picture = staticmethod(plot.cell_png)

    def network(self, config: SearchConfig, dataset: Dataset) -> SearchNetwork:
        return SearchNetwork(config.init_channels, dataset.classes, config.layers, dataset.images.shape[1])

    def cost(self, config: SearchConfig, dataset: Dataset) -> None:
        """None: the cost of these cells is not computed."""

    def derive(self, network: FlatNetwork, rule: str) -> Cell:
        return nasbench201.derive(network.alphas()["alphas_normal"])


def cells_of(space: str) -> DartsCells | NasBench201Cells:
    """The cells that the setting `space` names. Raises InputError where there is no such space."""
    return NasBench201Cells() if space == nasbench201.NAME else DartsCells(space)
