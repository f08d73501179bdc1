"""The cells of a supernet and those of a genotype on `darts_fast.kernels`, and a supernet's stem: the same
sums as the modules' own, shared and fused; their launches counted, and compiled ahead.

Parameters, buffers and names are the reference's, so a checkpoint of one is read by the other.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from itertools import chain
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from darts_fast import kernels, reference
from darts_fast.kernels import aten, cell
from darts_fast.kernels.aten.batch_norm import statistics_of
from darts_fast.kernels.aten.launch import AtenLaunch
from darts_fast.kernels.backends import collected
from darts_fast.kernels.cell import (
    Cell,
    Convolution,
    Edge,
    FactorizedConvolution,
    Half,
    Identity,
    Noise,
    Norm,
    Operation,
    Parameter,
    Pool,
)
from darts_fast.kernels.types import launches
from darts_fast.reference import FactorizedReduce, MixedCell
from darts_fast.space import INPUTS
from darts_fast.traffic import Count, Traffic


def counted(step: Callable[[], object], device: torch.device, dtype: torch.dtype) -> Count:
    """Takes the step, on `device` with activations of `dtype` in the cells; its launches and bytes."""
    with Traffic() as traffic, collected() as calls:
        step()
    backend = kernels.backend(device, dtype)
    if backend is aten:  # its operations were counted as they are
        return traffic.total
    found = [one for one in launches(backend, calls) if not isinstance(one, AtenLaunch)]
    return traffic.total.plus(len(found), sum(launch.bytes for launch in found))


def missing_on(device: torch.device) -> str | None:
    """What this machine lacks for the kernels of the device to be launched, in words; None: nothing."""
    if device.type != "cuda":
        return None
    from darts_fast.kernels.triton import compilation

    return compilation.missing_for_launches()


def compile_kernels(
    rehearse: Callable[[], object], device: torch.device, say: Callable[[str], None], each: Callable[[], None]
) -> None:
    """Compiles the Triton kernels that `rehearse` launches, and their launchers, on all processors; once for
    a machine, as they stay in Triton's cache. Launched, they would be compiled one after the other: the 439
    different ones of the paper's search in minutes.

    Args:
        rehearse: run on PyTorch's meta device.
        device: of CUDA, for which they are compiled.
        say: is told, in a line, what is about to happen; or that it was given up, and why.
        each: called after each kernel; it may raise, to break off.
    """
    from darts_fast.kernels import triton
    from darts_fast.kernels.triton import compilation

    with collected() as calls, torch.device("meta"):
        rehearse()
    found = compilation.unique(launches(triton, calls))
    major, minor = torch.cuda.get_device_capability(device)
    arch, count = 10 * major + minor, min(len(found), compilation.processes())
    note = compilation.note(found, arch)
    if note.exists():
        return
    say(f"compiling {len(found)} kernels for sm_{arch} in {count} processes, the first time only")
    jobs = compilation.compile_ahead(found, [arch], count, lambda planned, arch, error: error, launchers=True)
    with closing(jobs), tqdm(total=len(found), unit="kernel", disable=None, leave=False) as bar:
        for _ in found:
            try:
                next(jobs)
            except (OSError, RuntimeError) as error:
                return say(f"each kernel is compiled when it is launched instead: {error}")
            bar.update()
            each()
    with suppress(OSError):  # else they are found in the cache one by one
        note.touch()


def allowed_threads() -> int:
    """PyTorch's threads, but no more than a container's quota is worth."""
    return kernels.threads()


def kernels_on(device: torch.device, dtype: torch.dtype) -> str:
    """The kernels that compute on activations of this device and type, in a few words."""
    return kernels.used(device, dtype)


class FusedCells(ABC):
    """The cells of a network, modules, computed by `darts_fast.kernels`: the same sums, shared and fused.
    Parameters, buffers and names are the modules' own.

    Running statistics are updated as by `nn.BatchNorm2d`, once a forward pass in training.
    """

    def __init__(self, modules: Sequence[nn.Module]):
        self._norms: list[nn.BatchNorm2d] = []  # in the order of their parameters
        self._size = 0  # numbers in all weights
        self.cells = [self._cell(module) for module in modules]
        self._join_statistics()
        self.tracking = True  # whether a forward pass in training updates the running statistics
        self._plans: dict[tuple, kernels.Plan] = {}
        self._blocks: dict[torch.device, kernels.Blocks] = {}  # which all plans of a device share

    def __getstate__(self) -> dict[str, Any]:
        """Without plans, which hold memory and are made again."""
        return self.__dict__ | {"_plans": {}, "_blocks": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._join_statistics()  # a copy's may be copied one by one

    @property
    def training(self) -> bool:
        """Raises RuntimeError where some batch norms are in training mode and others are not."""
        (training, *others) = set(map(attrgetter("training"), self._norms))
        if others:
            raise RuntimeError(
                "the batch norms of fused cells must all be in training mode or all in evaluation mode; "
                "without fused, some may differ"
            )
        return training

    def plan(
        self,
        shapes: Sequence[Sequence[int]],
        dtype: torch.dtype,
        device: torch.device,
        derivatives: int,
        drop_path: bool = False,
        outputs: Sequence[int] | None = None,
    ) -> kernels.Plan:
        """The plan for what the first cell reads, of these shapes; made once. See `kernels.Plan`."""
        backend = kernels.backend(device, dtype)
        key = (tuple(map(tuple, shapes)), dtype, device, derivatives, drop_path, outputs, backend)
        if key not in self._plans:
            norms = [norm.num_features for norm in self._norms]
            blocks = self._blocks.setdefault(device, kernels.Blocks(device))
            self._plans[key] = kernels.Plan(
                self.cells, shapes, dtype, self._size, norms, derivatives, blocks, backend, drop_path, outputs
            )
        return self._plans[key]

    # The modules as data (`Any`: what PyTorch says of a module's attributes is that they are modules or
    # tensors)

    @abstractmethod
    def _cell(self, module: Any) -> Cell: ...

    def _preprocessing(self, module: Any) -> tuple[Any, Any]:
        return self._operation(module.preprocess0), self._operation(module.preprocess1)

    def _operation(self, module: Any) -> Operation:
        if isinstance(module, nn.Identity):
            return Identity()
        if isinstance(module, reference.Noise):
            return Noise()
        if isinstance(module, FactorizedReduce):
            pointwise = self._parameter(module.conv_1.weight), self._parameter(module.conv_2.weight)
            return cell.FactorizedReduce(pointwise, self._norm(module.bn))
        layers: list[Any] = list(module) if isinstance(module, nn.Sequential) else [module]
        if isinstance(layers[0], (nn.MaxPool2d, nn.AvgPool2d)):
            return self._pool(*layers)
        if len(layers) > 1 and layers[1].kernel_size[0] != layers[1].kernel_size[1]:
            _, first, second, norm = layers
            weights = self._parameter(first.weight), self._parameter(second.weight)
            return FactorizedConvolution(weights, self._norm(norm), second.stride[0])
        ends = [i + 1 for i, layer in enumerate(layers) if isinstance(layer, nn.BatchNorm2d)]
        return Convolution(tuple(self._half(layers[a:b]) for a, b in zip([0, *ends], ends, strict=False)))

    def _pool(self, pool: nn.Module, norm: nn.BatchNorm2d | None = None) -> Pool:
        return Pool(int(isinstance(pool, nn.AvgPool2d)), None if norm is None else self._norm(norm))

    def _half(self, layers: list[Any]) -> Half:
        _, *convolutions, norm = layers  # ReLU first
        if convolutions[-1].kernel_size != (1, 1):
            raise TypeError(f"the kernels have no such convolution: {convolutions[-1]}")
        if len(convolutions) == 1:
            return Half(None, self._parameter(convolutions[0].weight), self._norm(norm))
        d, p = convolutions
        depthwise, pointwise = self._parameter(d.weight), self._parameter(p.weight)
        return Half(depthwise, pointwise, self._norm(norm), d.stride[0], d.dilation[0])

    def _parameter(self, weight: Tensor) -> Parameter:
        start, self._size = self._size, self._size + weight.numel()
        return Parameter(start, tuple(weight.shape))

    def _norm(self, norm: nn.BatchNorm2d) -> Norm:
        self._norms.append(norm)
        affine = None
        if norm.affine:  # neighbours in the order of parameters
            affine = Parameter(self._parameter(norm.weight).offset, (2, norm.num_features))
            self._parameter(norm.bias)
        return Norm(len(self._norms) - 1, affine)

    # Statistics

    @torch.inference_mode(False)  # what is made in that mode could not be trained
    def _join_statistics(self) -> None:
        """Makes the running means and variances one tensor [2, channels of all batch norms], and the numbers
        of batches one, of which the modules' own are views from here on: an update is a few operations, and
        not hundreds."""
        norms: list[Any] = self._norms
        means, variances = [n.running_mean for n in norms], [n.running_var for n in norms]
        self._running = torch.stack([torch.cat(means), torch.cat(variances)])
        self._batches = torch.stack([norm.num_batches_tracked for norm in norms])
        sizes = [norm.num_features for norm in norms]
        self._views = list(
            zip(*(row.split(sizes) for row in self._running), self._batches.unbind(), strict=True)
        )
        for norm, (mean, variance, count) in zip(norms, self._views, strict=True):
            norm.running_mean, norm.running_var, norm.num_batches_tracked = mean, variance, count
        self._buffers = [norm._buffers for norm in norms]

    def check_statistics(self) -> None:
        """Joins them again where the modules' buffers have been replaced: copied, moved or loaded. (By
        loops in C, because there are hundreds, and this is done in every forward pass.)"""
        own = chain.from_iterable(map(dict.values, self._buffers))
        if not all(map(is_, own, chain.from_iterable(self._views))):
            self._join_statistics()

    def _update_statistics(self, of_batch: Tensor) -> None:
        """By the means and the unbiased variances of a batch, [2, channels of all batch norms]."""
        momentum = self._norms[0].momentum
        assert momentum is not None  # PyTorch's way to say: the mean over all batches
        self._running.lerp_(of_batch.to(self._running.dtype), momentum)
        self._batches += 1

    def _constants(self) -> Tensor:
        """What the batch norms normalise by in evaluation, [3, all their channels]."""
        mean, variance = self._running
        return torch.stack([mean, variance, (variance + self._norms[0].eps).rsqrt()])


class FusedMixedCells(FusedCells):
    """The cells of a search, `reference.MixedCell`s of one space."""

    def __init__(self, modules: Sequence[MixedCell]):
        super().__init__(modules)
        names, present = modules[0].space.candidates, modules[0].space.present()
        # Which of the softmaxed alphas of a kind of cells the kernels take: columns, if every edge has all
        # candidates; else int64, their numbers
        self._weighed: list[slice | Tensor] = []
        for of_kind in present:
            if all(map(all, of_kind)):
                self._weighed.append(slice(int(names[0] == "none"), None))
            else:
                flat = [(row[k] and name != "none") for row in of_kind for k, name in enumerate(names)]
                self._weighed.append(torch.tensor([i for i, kept in enumerate(flat) if kept]))

    def __call__(
        self,
        x: Tensor,
        weights: Tensor,
        probabilities: Sequence[Tensor],
        edge_weights: Sequence[Tensor | None],
        dtype: torch.dtype,
        noise: Tensor | None = None,
    ) -> Tensor:
        """The last cell's output, [N, nodes * C, H', W'] in `dtype`, channels-last, valid as its graph is.

        In training differentiable as `kernels.cells` is; in evaluation not at all.

        Args:
            x: the stem's output [N, C, H, W].
            weights: those of all cells in a row, in the order of the modules' parameters.
            probabilities: the softmaxed alphas of normal and of reduction cells, [edges, candidates] each.
            edge_weights: with partial channels, what their edges are weighed by, [edges] each; else None.
            dtype: of the activations.
            noise: what `reference.CellNoise` drew for the batch.
        """
        self.check_statistics()
        p = {kind: self._weights(kind, probabilities[kind], edge_weights[kind]) for kind in (0, 1)}
        plan = self.plan([x.shape], dtype, x.device, 2 if self.training else 0)
        if not self.training:
            return kernels.cells(plan, x, weights, p, self._constants(), noise)[0]
        output, statistics = kernels.cells(plan, x, weights, p, noise=noise)
        if self.tracking and statistics is not None:
            self._update_statistics(statistics())
        return output

    def _weights(self, kind: int, probabilities: Tensor, of_edges: Tensor | None) -> Tensor:
        """Those of what the kernels compute, p of a `Cell`. `none` adds nothing; its alpha has its gradient
        through the softmax."""
        if of_edges is not None:
            probabilities = of_edges[:, None] * probabilities
        weighed = self._weighed[kind]
        if isinstance(weighed, slice):
            p = probabilities[:, weighed]
        else:
            weighed = self._weighed[kind] = weighed.to(probabilities.device)
            p = probabilities.flatten().index_select(0, weighed)
        return p if of_edges is None else torch.cat([p.flatten(), of_edges])

    def _cell(self, module: Any) -> Cell:
        edges, space = [], module.space
        # The order of the parameters is that of the modules: preprocessing, then the edges.
        preprocessing = self._preprocessing(module)
        for (source, node), mixed in zip(space.edges, module.edges, strict=True):
            stride = 2 if module.reduction and source < INPUTS else 1
            operations = [self._operation(operation) for name, operation in mixed.items() if name != "none"]
            edges.append(Edge(source, node, stride, tuple(operations)))
        channels = module.preprocess1[1].out_channels
        kind = int(module.reduction)
        return Cell(channels, preprocessing, tuple(edges), tuple(space.concat), kind, module.partial_channels)


class FusedDerivedCells(FusedCells):
    """The cells of a genotype, `derived.DerivedCell`s."""

    def __init__(self, modules: Sequence[nn.Module]):
        # Which of all modules' edges are the cells' first, second, ... edges: int64
        self._order = torch.empty(0, dtype=torch.int64)
        super().__init__(modules)

    def __call__(
        self,
        inputs: Sequence[Tensor],
        weights: Tensor,
        dtype: torch.dtype,
        path_weights: Tensor | None,
        outputs: Sequence[int],
        noise: Tensor | None = None,
    ) -> list[Tensor]:
        """The outputs of the cells of these numbers, [N, C', H', W'] in `dtype`, channels-last, valid as
        their graph is. In training differentiable once, in evaluation not at all.

        Args:
            inputs: what the first cell reads, one [N, C, H, W] or two.
            weights: those of all cells in a row, in the order of the modules' parameters.
            dtype: of the activations.
            path_weights: with drop path, [edges of all modules, N], see `kernels.derived_cells`.
            noise: what `reference.CellNoise` drew for the batch.
        """
        shapes, drop_path = [x.shape for x in inputs], path_weights is not None
        device, derivatives = weights.device, int(self.training)
        plan = self.plan(shapes, dtype, device, derivatives, drop_path, tuple(outputs))
        if path_weights is not None:
            self._order = self._order.to(device)
            path_weights = path_weights[self._order]
        if not self.training:
            return kernels.derived_cells(plan, inputs, weights, self._constants(), path_weights, noise)[0]
        found, statistics = kernels.derived_cells(
            plan, inputs, weights, path_weights=path_weights, noise=noise
        )
        if self.tracking and statistics is not None:
            self._update_statistics(statistics())
        return found

    def _cell(self, module: Any) -> Cell:
        preprocessing = self._preprocessing(module)
        pairs = [(node, source) for node, sources in enumerate(module.sources) for source in sources]
        edges = []
        for (node, source), operation in zip(pairs, module.edges, strict=True):
            stride = 2 if module.reduction and source < INPUTS else 1
            edges.append(Edge(source, node, stride, (self._operation(operation),)))

        def key(number: int) -> tuple[int, bool]:
            """A node's normalised operations come first: sums are taken of these alone."""
            (operation,) = edges[number].operations
            plain = isinstance(operation, (Identity, Noise)) or (
                isinstance(operation, Pool) and not operation.norm
            )
            return edges[number].node, plain

        order = sorted(range(len(edges)), key=key)
        self._order = torch.cat([self._order, len(self._order) + torch.tensor(order)])
        channels = module.preprocess1[1].out_channels
        return Cell(channels, preprocessing, tuple(edges[number] for number in order), tuple(module.concat))


def fused_stem(module: nn.Sequential, images: Tensor) -> Tensor:
    """The supernet's stem, a convolution and its affine batch norm, in the images' memory layout.

    ATen's passes; the second derivative is what a Hessian-vector product needs of it, 3 ms where autograd's
    own took 19 (batch 16, 16 channels, 32x32, one CPU core).
    """
    convolution: Any
    norm: Any
    convolution, norm = module
    y = convolution(images)
    if not norm.training:
        return norm(y)
    statistics = statistics_of(y.detach())
    if norm.track_running_stats:
        values = y.numel() // y.shape[1]
        with torch.no_grad():
            of_batch = [statistics[0], statistics[1] * (values / (values - 1))]
            torch._foreach_lerp_([norm.running_mean, norm.running_var], of_batch, norm.momentum)
            norm.num_batches_tracked += 1
    return kernels.normalize(y, statistics, norm.weight, norm.bias)
