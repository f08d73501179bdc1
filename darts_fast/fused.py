"""The cells of a supernet, its stem and the operations of a derived cell on `darts_fast.kernels`: the same
sums as the modules' own of `reference`, shared and fused; their launches counted, and compiled ahead.

Parameters, buffers and names are the reference's, so a checkpoint of one is read by the other.
"""

from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from darts_fast import kernels
from darts_fast.kernels import aten, cell
from darts_fast.kernels.aten.batch_norm import statistics_of
from darts_fast.kernels.backends import collected
from darts_fast.kernels.cell import Cell, Convolution, Edge, Half, Identity, Operation, Parameter, Pool
from darts_fast.kernels.single import Geometry
from darts_fast.kernels.types import launches
from darts_fast.reference import FactorizedReduce, MixedCell
from darts_fast.space import CANDIDATES, EDGES, INPUTS, NODES
from darts_fast.traffic import Count, Traffic


def counted(step: Callable[[], object], device: torch.device, dtype: torch.dtype) -> Count:
    """Takes the step, on `device` with activations of `dtype` in the cells; its launches and bytes."""
    with Traffic() as traffic, collected() as calls:
        step()
    backend = kernels.backend(device, dtype)
    if backend is aten:  # its operations were counted as they are
        return traffic.total
    found = list(launches(backend, calls))
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
    a machine, as they stay in Triton's cache. Launched, they would be compiled one after the other: the 442
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


class FusedCells:
    """The cells of a supernet, `reference.MixedCell`s, computed by `darts_fast.kernels`: the same sums,
    shared and fused. Parameters, buffers and names are the modules' own.

    Running statistics are updated as by `nn.BatchNorm2d`, once a forward pass in training.
    """

    def __init__(self, modules: Sequence[MixedCell]):
        self._norms: list[nn.BatchNorm2d] = []
        self._size = 0  # numbers in all weights
        self.cells = [self._cell(module) for module in modules]
        self._running, self._batches = self._joined_statistics()
        self.tracking = True  # whether a forward pass in training updates the running statistics
        self._plans: dict[tuple, kernels.Plan] = {}
        self._blocks: dict[torch.device, kernels.Blocks] = {}  # which all plans of a device share

    def __getstate__(self) -> dict[str, Any]:
        """Without plans, which hold memory and are made again."""
        return self.__dict__ | {"_plans": {}, "_blocks": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._running, self._batches = self._joined_statistics()  # a copy's may be copied one by one

    def __call__(
        self, x: Tensor, weights: Tensor, probabilities: Sequence[Tensor], dtype: torch.dtype
    ) -> Tensor:
        """The last cell's output, [N, NODES * C, H', W'] in `dtype`, channels-last, valid as its graph is.

        In training differentiable as `kernels.cells` is; in evaluation not at all.

        Args:
            x: the stem's output [N, C, H, W].
            weights: those of all cells in a row, in the order of the modules' parameters.
            probabilities: the softmaxed alphas of normal and of reduction cells, [14, 8] each.
            dtype: of the activations.
        """
        training = self._norms[0].training
        # `none`, the first column, adds nothing. Its alpha has its gradient through the softmax.
        p = {kind: of_kind[:, 1:] for kind, of_kind in enumerate(probabilities)}
        plan = self.plan(x.shape, dtype, x.device, training)
        if not training:
            return kernels.cells(plan, x, weights, p, self._constants())[0]
        output, statistics = kernels.cells(plan, x, weights, p)
        if self.tracking:
            self._running.lerp_(statistics(), self._norms[0].momentum)
            self._batches += 1
        return output

    def plan(
        self, shape: Sequence[int], dtype: torch.dtype, device: torch.device, training: bool
    ) -> kernels.Plan:
        """The plan for x of this shape and activations of this type; made once."""
        backend = kernels.backend(device, dtype)
        key = (*shape, dtype, device, training, backend)
        if key not in self._plans:
            norms = [norm.num_features for norm in self._norms]
            blocks = self._blocks.setdefault(device, kernels.Blocks(device))
            self._plans[key] = kernels.Plan(
                self.cells, shape, dtype, self._size, norms, training, blocks, backend
            )
        return self._plans[key]

    # The modules as data

    def _cell(self, module: MixedCell) -> Cell:
        edges = []
        # The order of the parameters is that of the modules: preprocessing, then the edges.
        preprocessing = self._operation(module.preprocess0), self._operation(module.preprocess1)
        for (source, node), mixed in zip(EDGES, module.edges, strict=True):
            stride = 2 if module.reduction and source < INPUTS else 1
            operations = [self._operation(mixed[name]) for name in CANDIDATES if name != "none"]
            edges.append(Edge(source, node, stride, tuple(operations)))
        channels = module.preprocess1[1].out_channels
        return Cell(channels, preprocessing, tuple(edges), NODES, kind=int(module.reduction))

    def _operation(self, module: nn.Module) -> Operation:
        if isinstance(module, nn.Identity):
            return Identity()
        if isinstance(module, FactorizedReduce):
            pointwise = self._parameter(module.conv_1.weight), self._parameter(module.conv_2.weight)
            return cell.FactorizedReduce(pointwise, self._norm(module.bn))
        layers = list(module)
        if isinstance(layers[0], (nn.MaxPool2d, nn.AvgPool2d)):
            return Pool(int(isinstance(layers[0], nn.AvgPool2d)), self._norm(layers[1]))
        ends = [i + 1 for i, layer in enumerate(layers) if isinstance(layer, nn.BatchNorm2d)]
        return Convolution(tuple(self._half(layers[a:b]) for a, b in zip([0, *ends], ends, strict=False)))

    def _half(self, layers: list[nn.Module]) -> Half:
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

    def _norm(self, norm: nn.BatchNorm2d) -> int:
        self._norms.append(norm)
        return len(self._norms) - 1

    # Statistics

    def _joined_statistics(self) -> tuple[Tensor, Tensor]:
        """The running means and variances [2, channels of all batch norms], and the numbers of batches, of
        which the modules' own are views from here on: an update is a few operations, and not hundreds."""
        norms = self._norms
        means, variances = [n.running_mean for n in norms], [n.running_var for n in norms]
        running = torch.stack([torch.cat(means), torch.cat(variances)])
        batches = torch.stack([norm.num_batches_tracked for norm in norms])
        sizes = [norm.num_features for norm in norms]
        for norm, mean, variance, count in zip(
            norms, *(row.split(sizes) for row in running), batches, strict=True
        ):
            norm.running_mean, norm.running_var, norm.num_batches_tracked = mean, variance, count
        return running, batches

    def _constants(self) -> Tensor:
        """What the batch norms normalise by in evaluation, [3, all their channels]."""
        mean, variance = self._running
        return torch.stack([mean, variance, (variance + self._norms[0].eps).rsqrt()])


def fused_stem(module: nn.Sequential, images: Tensor) -> Tensor:
    """The supernet's stem, a convolution and its affine batch norm, in the images' memory layout.

    ATen's passes; the second derivative is what a Hessian-vector product needs of it, 3 ms where autograd's
    own took 19 (batch 16, 16 channels, 32x32, one CPU core).
    """
    convolution, norm = module
    y, observed = convolution(images), []
    found = _batch_norm(norm, y, statistics_of(y.detach()), observed) if norm.training else norm(y)
    if observed:
        update_running_statistics(observed)
    return found


class Observed(NamedTuple):
    """A batch norm, the statistics [3, C] of a batch that its running ones are to take up, and from how many
    values a channel they are."""

    norm: nn.BatchNorm2d
    statistics: Tensor
    count: int


def operation_on_kernels(module: nn.Module, x: Tensor, observed: list[Observed]) -> Tensor:
    """What an operation of a derived cell (a module of `reference`, affine) gives for x, its 1x1, separable
    and dilated convolutions and its pools computed by the kernels. Differentiable once.

    Training and evaluation as in the module's own forward, but that running statistics are left to
    `update_running_statistics` of what is added to `observed`. Affine batch norms and the 1x7 convolutions
    are ATen's. With 2-byte x, the module's parameters are float32 and the result is of x's type.
    """
    if isinstance(module, FactorizedReduce):
        tasks = [Geometry(stride=2, offset=offset) for offset in (0, 1)]
        weights = [module.conv_1.weight, module.conv_2.weight]
        y, statistics = kernels.sepconv(x, tasks, [None, None], weights)
        return _batch_norm(module.bn, y, statistics, observed)
    parts = list(module) if isinstance(module, nn.Sequential) else [module]
    if isinstance(parts[0], (nn.MaxPool2d, nn.AvgPool2d)):
        *pools, statistics = kernels.pool(x, parts[0].stride)
        which = int(isinstance(parts[0], nn.AvgPool2d))
        y = pools[which]
        return _batch_norm(parts[1], y, statistics[which], observed) if parts[1:] else y
    halves = [parts[i : i + 4] for i in range(0, len(parts), 4)] if len(parts) > 3 else [parts]
    for part in halves:
        convolutions = [layer for layer in part if isinstance(layer, nn.Conv2d)]
        if not convolutions or convolutions[-1].kernel_size != (1, 1):
            return _by_aten(parts, x)
    for _, *convolutions, norm in halves:
        depthwise = convolutions[0] if len(convolutions) == 2 else None
        task = Geometry() if depthwise is None else Geometry(depthwise.stride[0], depthwise.dilation[0])
        y, statistics = kernels.sepconv(
            x, [task], [depthwise and depthwise.weight], [convolutions[-1].weight]
        )
        x = _batch_norm(norm, y, statistics, observed)
    return x


def _by_aten(layers: list[nn.Module], x: Tensor) -> Tensor:
    for layer in layers:
        if isinstance(layer, nn.Conv2d):  # which takes no weights of another type
            x = F.conv2d(x, layer.weight.to(x.dtype), None, layer.stride, layer.padding)
        else:
            x = layer(x)
    return x


def _batch_norm(norm: nn.BatchNorm2d, y: Tensor, statistics: Tensor, observed: list[Observed]) -> Tensor:
    """`norm` of y, whose statistics [3, C] are known."""
    if not norm.training:
        return norm(y)
    if norm.track_running_stats:
        observed.append(Observed(norm, statistics, y.numel() // y.shape[1]))
    return kernels.normalize(y, statistics, norm.weight, norm.bias)


def update_running_statistics(observed: list[Observed]) -> None:
    """As `nn.BatchNorm2d`: each by the statistics of its batch."""
    norms, statistics, counts = zip(*observed, strict=True)
    running = [n.running_mean for n in norms] + [n.running_var for n in norms]
    means = [s[0] for s in statistics]
    with torch.no_grad():
        variances = torch._foreach_mul([s[1] for s in statistics], [m / (m - 1) for m in counts])
        torch._foreach_lerp_(running, means + list(variances), norms[0].momentum)
        torch._foreach_add_([n.num_batches_tracked for n in norms], 1)
