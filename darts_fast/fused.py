"""The mixed cell on `darts_fast.kernels`, the same sums as `reference.MixedCell`, shared and fused; and the
operations of a derived cell.

Parameters, buffers and names are the reference's, so a checkpoint of one is read by the other.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from darts_fast import kernels
from darts_fast.kernels import Task
from darts_fast.reference import FactorizedReduce, MixedCell
from darts_fast.space import CANDIDATES, EDGES, INPUTS, NODES

POOLS = ("max_pool_3x3", "avg_pool_3x3")
CONVOLUTIONS = tuple(name for name, p in CANDIDATES.items() if p.kind in ("sep_conv", "dil_conv"))


class Candidate(NamedTuple):
    """A candidate's output before its batch norm, the statistics [3, C] it is to be normalised by, if any,
    and whether `kernels.spread` hands it out, or by which link `kernels.sepconv` does."""

    y: Tensor
    statistics: Tensor | None
    spread: bool | kernels.Link = False


def kernels_on(like: Tensor) -> str:
    """The kernels that compute on activations of the device and dtype of `like`, in a few words."""
    return kernels.used(like)


class FusedCell(MixedCell):
    """`reference.MixedCell` with everything that edges from one state share computed once: ReLU, both pools
    and their batch norms, the identity. `none` adds nothing to a node; its alpha has its gradient through
    the softmax. States are channels-last.

    Running statistics are updated as by `nn.BatchNorm2d`, once a forward pass, where a module is training
    and tracks them; in evaluation mode every edge is normalised by its own.
    """

    def forward(self, before_previous: Tensor, previous: Tensor, probabilities: Tensor) -> Tensor:
        """As the reference's; the output is channels-last. Twice differentiable as far as `kernels` are."""
        self._observed: list[tuple[nn.BatchNorm2d, Tensor, int]] = []
        states = [
            self._preprocess(self.preprocess0, before_previous),
            self._preprocess(self.preprocess1, previous),
        ]
        # `none`, the first column, adds nothing. One split: a slice a node was a copy and two launches back.
        counts = [sum(target == node for _, target in EDGES) * (len(CANDIDATES) - 1) for node in range(NODES)]
        weights = probabilities[:, 1:].reshape(-1).split(counts)  # by node, whose edges are neighbours
        outputs = []
        candidates: dict[int, list[Candidate]] = {}  # by edge, in the order of CANDIDATES without `none`
        for source in range(INPUTS + NODES):
            if source >= INPUTS:
                states.append(self._node(source - INPUTS, candidates, weights[source - INPUTS]))
            edges = [edge for edge, (state, _) in enumerate(EDGES) if state == source]
            # What is not used of a state's readers has no adjoint, and costs nothing.
            output, *readers = kernels.share(states[source], 3 + len(edges))
            if edges:
                candidates |= self._candidates(readers, edges, probabilities)
            if source >= INPUTS:
                outputs.append(output)
        if self._observed:
            _update_running_statistics(self._observed)
            self._observed = []
        return kernels.concatenate(outputs)

    def _node(self, node: int, candidates: dict[int, list[Candidate]], weights: Tensor) -> Tensor:
        """Equation 1: the sum over the node's edges of equation 2."""
        edges = [edge for edge, (_, target) in enumerate(EDGES) if target == node]
        tensors, statistics, spread = zip(*(c for edge in edges for c in candidates[edge]), strict=True)
        return kernels.mix(tensors, statistics, weights, self.training, spread)

    def _candidates(
        self, readers: list[Tensor], edges: list[int], probabilities: Tensor
    ) -> dict[int, list[Candidate]]:
        """Every candidate of the edges that leave a state, `readers` of which are to be read."""
        for_convolutions, for_pools, *for_skips = readers
        stride = 2 if self.reduction and EDGES[edges[0]][0] < INPUTS else 1
        if self.training and kernels.second_backward_in_one(for_pools):
            skips = [] if stride == 2 else for_skips[:1]
            found = self._spread_pools(for_pools, skips, edges, stride, probabilities)
        else:
            found = self._pools(for_pools, edges, stride)
            if stride == 1:
                for edge, skip in zip(edges, for_skips, strict=True):
                    found[edge].append(Candidate(skip, None))
        if stride == 2:
            for edge, skip in zip(edges, for_skips, strict=True):
                found[edge].append(self._factorized_reduce(self.edges[edge]["skip_connect"], skip))
        convolutions = self._convolutions(for_convolutions, edges, stride)
        return {edge: [*found[edge], *convolutions[edge]] for edge in edges}

    def _spread_pools(
        self, x: Tensor, skips: list[Tensor], edges: list[int], stride: int, probabilities: Tensor
    ) -> dict[int, list[Candidate]]:
        """The pools, and the skip if it is the identity: the first columns after that of `none`."""
        *pools, statistics = kernels.pool(x, stride)
        for edge in edges:
            for name, y, found in zip(POOLS, pools, statistics, strict=True):
                self._statistics(self.edges[edge][name][1], y, found)
        tensors, given = [*pools, *skips], [*statistics, *[None] * len(skips)]
        places = [[edge * len(CANDIDATES) + 1 + i for i in range(len(tensors))] for edge in edges]
        handed = kernels.spread(tensors, given, probabilities, places)
        return {
            edge: [Candidate(y, s, True) for y, s in zip(row, given, strict=True)]
            for edge, row in zip(edges, handed, strict=True)
        }

    def _pools(self, x: Tensor, edges: list[int], stride: int) -> dict[int, list[Candidate]]:
        *pools, statistics = kernels.pool(x, stride)
        norms = {edge: [self.edges[edge][name][1] for name in POOLS] for edge in edges}
        found = {
            edge: [self._statistics(*args) for args in zip(norms[edge], pools, statistics, strict=True)]
            for edge in edges
        }
        # In evaluation each edge has its own running statistics; in training all have the same, and it is for
        # the kernels to say what is faster: one batch norm for all edges, or one on load for each.
        if not (self.training and kernels.pools_normalized_once(x)):
            return {
                edge: [Candidate(y, s) for y, s in zip(pools, found[edge], strict=True)] for edge in edges
            }
        one = statistics.new_ones(1)
        normalized = [kernels.mix([y], [s], one) for y, s in zip(pools, statistics, strict=True)]
        shared = [kernels.share(y, len(edges)) for y in normalized]
        return {
            edge: [Candidate(y, None) for y in pair]
            for edge, pair in zip(edges, zip(*shared, strict=True), strict=True)
        }

    def _convolutions(self, x: Tensor, edges: list[int], stride: int) -> dict[int, list[Candidate]]:
        """The first half of every convolution in one call, then the second half of the separable ones."""
        keys = [(edge, name) for edge in edges for name in CONVOLUTIONS]
        modules = {key: list(self.edges[key[0]][key[1]]) for key in keys}
        tasks = [Task(0, stride, CANDIDATES[name].dilation) for _, name in keys]
        # A node's adjoint takes the batch norm of a convolution where that loads it, if the kernels can.
        linked = self.training and kernels.second_backward_in_one(x)
        links = [
            kernels.Link() if linked and CANDIDATES[name].kind == "dil_conv" else None for _, name in keys
        ]
        first = self._halves([x], None, tasks, [m[:4] for m in modules.values()], links if linked else [])
        found = dict(zip(keys, first, strict=True))
        twice = [key for key in keys if CANDIDATES[key[1]].kind == "sep_conv"]
        second = self._halves(
            [found[key].y for key in twice],
            [found[key].statistics for key in twice],
            [Task(source, 1, CANDIDATES[name].dilation) for source, (_, name) in enumerate(twice)],
            [modules[key][4:] for key in twice],
            [kernels.Link() for _ in twice] if linked else [],
        )
        found |= zip(twice, second, strict=True)
        return {edge: [found[edge, name] for name in CONVOLUTIONS] for edge in edges}

    def _halves(
        self,
        sources: list[Tensor],
        statistics: list[Tensor] | None,
        tasks: list[Task],
        modules: list[list[nn.Module]],
        links: list[kernels.Link | None],
    ) -> list[Candidate]:
        """Modules are ReLU, depthwise, pointwise, batch norm."""
        outputs, found = kernels.sepconv(
            sources,
            tasks,
            [m[1].weight for m in modules],
            [m[2].weight for m in modules],
            statistics,
            self.training,
            links,
        )
        return [
            Candidate(y, self._statistics(m[3], y, s), link or False)
            for y, s, m, link in zip(outputs, found, modules, links or [None] * len(modules), strict=True)
        ]

    def _factorized_reduce(self, module: FactorizedReduce, x: Tensor) -> Candidate:
        tasks = [Task(stride=2, offset=offset) for offset in (0, 1)]
        outputs, statistics = kernels.sepconv(
            [x], tasks, [None, None], [module.conv_1.weight, module.conv_2.weight]
        )
        y = kernels.concatenate(outputs)
        return Candidate(y, self._statistics(module.bn, y, torch.cat(list(statistics), dim=1)))

    def _preprocess(self, module: nn.Module, x: Tensor) -> Tensor:
        if isinstance(module, FactorizedReduce):
            y, statistics, _ = self._factorized_reduce(module, x)
        else:
            _, convolution, norm = module
            (y,), (found,) = kernels.sepconv([x], [Task()], [None], [convolution.weight])
            statistics = self._statistics(norm, y, found)
        return kernels.mix([y], [statistics], statistics.new_ones(1), self.training)

    # Statistics

    def _statistics(self, norm: nn.BatchNorm2d, y: Tensor, batch: Tensor) -> Tensor:
        """What y is normalised by, [3, C]: in training the statistics of the batch, which are noted."""
        if not self.training:
            mean, variance = norm.running_mean, norm.running_var
            return torch.stack([mean, variance, (variance + norm.eps).rsqrt()])
        if norm.track_running_stats:
            self._observed.append((norm, batch, y.numel() // y.shape[1]))
        return batch


def fused_stem(module: nn.Sequential, images: Tensor) -> Tensor:
    """The supernet's stem, a convolution and its affine batch norm, in the images' memory layout.

    ATen's passes; the second derivative is what a Hessian-vector product needs of it, 5 ms where autograd's
    own took 23 (batch 16, 16 channels, 32x32, one CPU core).
    """
    convolution, norm = module
    y = convolution(images)
    return _batch_norm(norm, y, kernels.statistics_of([y.detach()])[0]) if norm.training else norm(y)


def operation_on_kernels(module: nn.Module, x: Tensor) -> Tensor:
    """What an operation of a derived cell (a module of `reference`, affine) gives for x, its 1x1, separable
    and dilated convolutions computed by the kernels. Differentiable once.

    Training, evaluation and running statistics as in the module's own forward. Pools, identities and the
    1x7 convolutions are the module's own: ATen's are as fast.
    """
    if isinstance(module, FactorizedReduce):
        tasks = [Task(stride=2, offset=offset) for offset in (0, 1)]
        weights = [module.conv_1.weight, module.conv_2.weight]
        outputs, statistics = kernels.sepconv([x], tasks, [None, None], weights)
        return _batch_norm(module.bn, torch.cat(outputs, dim=1), torch.cat(list(statistics), dim=1))
    parts = list(module.children())
    halves = [parts[i : i + 4] for i in range(0, len(parts), 4)] if len(parts) > 3 else [parts]
    for part in halves:
        convolutions = [layer for layer in part if isinstance(layer, nn.Conv2d)]
        if not convolutions or convolutions[-1].kernel_size != (1, 1):
            return module(x)
    for _, *convolutions, norm in halves:
        depthwise = convolutions[0] if len(convolutions) == 2 else None
        task = Task() if depthwise is None else Task(0, depthwise.stride[0], depthwise.dilation[0])
        (y,), (statistics,) = kernels.sepconv(
            [x], [task], [depthwise and depthwise.weight], [convolutions[-1].weight]
        )
        x = _batch_norm(norm, y, statistics)
    return x


def _batch_norm(norm: nn.BatchNorm2d, y: Tensor, statistics: Tensor) -> Tensor:
    """`norm` of y, whose statistics [3, C] are known."""
    if not norm.training:
        return norm(y)
    if norm.track_running_stats:
        _update_running_statistics([(norm, statistics, y.numel() // y.shape[1])])
    return kernels.normalize(y, statistics, norm.weight, norm.bias)


@torch.no_grad()
def _update_running_statistics(observed: list[tuple[nn.BatchNorm2d, Tensor, int]]) -> None:
    """As `nn.BatchNorm2d`: each by the statistics [3, C] of its batch, from so many values a channel; the
    variance that runs is the unbiased one."""
    norms, statistics, counts = zip(*observed, strict=True)
    means = [s[0] for s in statistics]
    variances = list(torch._foreach_mul([s[1] for s in statistics], [m / (m - 1) for m in counts]))
    running = [n.running_mean for n in norms] + [n.running_var for n in norms]
    torch._foreach_lerp_(running, means + variances, norms[0].momentum)
    torch._foreach_add_([n.num_batches_tracked for n in norms], 1)
