"""The mixed cell on `darts_fast.kernels`, the same sums as `reference.MixedCell`, shared and fused; and the
operations of a derived cell.

Parameters, buffers and names are the reference's, so a checkpoint of one is read by the other.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing, suppress
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from darts_fast import kernels
from darts_fast.kernels import Task, native
from darts_fast.kernels.backends import using
from darts_fast.reference import FactorizedReduce, MixedCell
from darts_fast.space import CANDIDATES, EDGES, INPUTS, NODES
from darts_fast.traffic import Count, Traffic

POOLS = ("max_pool_3x3", "avg_pool_3x3")
CONVOLUTIONS = tuple(name for name, p in CANDIDATES.items() if p.kind in ("sep_conv", "dil_conv"))


class Candidate(NamedTuple):
    """A candidate's output before its batch norm, the statistics [3, C] it is to be normalised by, if any,
    and by which link `kernels.sepconv` or `kernels.spread` hands it out, if by one."""

    y: Tensor
    statistics: Tensor | None
    link: kernels.Link | None = None


def counted(step: Callable[[], object], device: torch.device) -> Count:
    """Launches and bytes of a step on this device, which is taken."""
    with ExitStack() as within:
        traffic = within.enter_context(Traffic())
        if device.type == "cuda":
            from darts_fast.kernels import triton_launch

            within.enter_context(triton_launch.observed(traffic.launched))
        within.enter_context(native.observed(traffic.called))
        step()
    return traffic.total


def missing_on(device: torch.device) -> str | None:
    """What this machine lacks for the kernels of the device to be launched, in words; None: nothing."""
    if device.type != "cuda":
        return None
    from darts_fast.kernels import compilation

    return compilation.missing_for_launches()


def compile_kernels(
    rehearse: Callable[[], object], device: torch.device, say: Callable[[str], None], each: Callable[[], None]
) -> None:
    """Compiles the Triton kernels that `rehearse` launches, and their launchers, on all processors; once for
    a machine, as they stay in Triton's cache. Launched, they would be compiled one after the other: the 400
    different ones of the paper's search in minutes.

    Args:
        rehearse: run on PyTorch's meta device.
        device: of CUDA, for which they are compiled.
        say: is told, in a line, what is about to happen; or that it was given up, and why.
        each: called after each kernel, to break off.
    """
    from darts_fast.kernels import compilation, triton_backend, triton_launch

    launches: list[triton_launch.Launch] = []
    with using(triton_backend), triton_launch.observed(launches.append), torch.device("meta"):
        rehearse()
    launches = compilation.unique(launches)
    major, minor = torch.cuda.get_device_capability(device)
    arch, count = 10 * major + minor, min(len(launches), compilation.processes())
    note = compilation.note(launches, arch)
    if note.exists():
        return
    say(f"compiling {len(launches)} kernels for sm_{arch} in {count} processes, the first time only")
    jobs = compilation.compile_ahead(
        launches, [arch], count, lambda planned, arch, error: error, launchers=True
    )
    with closing(jobs), tqdm(total=len(launches), unit="kernel", disable=None, leave=False) as bar:
        for _ in launches:
            try:
                next(jobs)
            except (OSError, RuntimeError) as error:
                return say(f"each kernel is compiled when it is launched instead: {error}")
            bar.update()
            each()
    with suppress(OSError):  # else they are found in the cache one by one
        note.touch()


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

    def __init__(self, *args: Any, **kwargs: Any):
        """As the reference's."""
        super().__init__(*args, **kwargs)
        self.register_buffer("one", torch.ones(1), persistent=False)  # the weight of a mix of one candidate

    def forward(self, before_previous: Tensor, previous: Tensor, probabilities: Tensor) -> Tensor:
        """As the reference's; the output is channels-last. Twice differentiable as far as `kernels` are."""
        self._observed: list[Observed] = []
        states = [
            self._preprocess(self.preprocess0, before_previous),
            self._preprocess(self.preprocess1, previous),
        ]
        # `none`, the first column, adds nothing. One split: a slice a node was a copy and two launches back.
        counts = [sum(target == node for _, target in EDGES) * (len(CANDIDATES) - 1) for node in range(NODES)]
        weights = probabilities[:, 1:].reshape(-1).split(counts)  # by node, whose edges are neighbours
        slices = kernels.Slices(NODES) if kernels.second_backward_in_one(previous) else None
        outputs = []
        candidates: dict[int, list[Candidate]] = {}  # by edge, in the order of CANDIDATES without `none`
        for source in range(INPUTS + NODES):
            if source >= INPUTS:
                states.append(self._node(source - INPUTS, candidates, weights[source - INPUTS], slices))
            edges = [edge for edge, (state, _) in enumerate(EDGES) if state == source]
            output = states[source]
            if edges:
                output, found = self._candidates(output, edges)
                candidates |= found
            if source >= INPUTS:
                outputs.append(output)
        if self._observed:
            update_running_statistics(self._observed)
            self._observed = []
        return kernels.concatenate(outputs, slices)

    def _node(
        self,
        node: int,
        candidates: dict[int, list[Candidate]],
        weights: Tensor,
        slices: kernels.Slices | None,
    ) -> Tensor:
        """Equation 1: the sum over the node's edges of equation 2."""
        edges = [edge for edge, (_, target) in enumerate(EDGES) if target == node]
        tensors, statistics, links = zip(*(c for edge in edges for c in candidates[edge]), strict=True)
        read = any(source == INPUTS + node for source, _ in EDGES)  # by other nodes
        place = kernels.Place(slices, node, read) if slices else None
        return kernels.mix(tensors, statistics, weights, self.training, links, place)

    def _candidates(self, x: Tensor, edges: list[int]) -> tuple[Tensor, dict[int, list[Candidate]]]:
        """The state x for the cell's output, and every candidate of the edges that leave it."""
        stride = 2 if self.reduction and EDGES[edges[0]][0] < INPUTS else 1
        if self.training and kernels.second_backward_in_one(x):
            found, (output, for_convolutions, for_skips) = self._spread(x, edges, stride)
        else:
            # What is not used of a state's readers has no adjoint, and costs nothing.
            output, for_convolutions, for_pools, for_skips, *identities = kernels.share(x, 4 + len(edges))
            found = self._pools(for_pools, edges, stride)
            if stride == 1:
                for edge, skip in zip(edges, identities, strict=True):
                    found[edge].append(Candidate(skip, None))
        if stride == 2:
            modules = [self.edges[edge]["skip_connect"] for edge in edges]
            for edge, skip in zip(edges, self._factorized_reduces(modules, for_skips), strict=True):
                found[edge].append(skip)
        convolutions = self._convolutions(for_convolutions, edges, stride)
        return output, {edge: [*found[edge], *convolutions[edge]] for edge in edges}

    def _spread(
        self, x: Tensor, edges: list[int], stride: int
    ) -> tuple[dict[int, list[Candidate]], tuple[Tensor, ...]]:
        """The pools, and the skip if it is the identity: the first columns after that of `none`; and x for
        three others."""
        skips = [None] if stride == 1 else []
        links = [[kernels.Link() for _ in [*POOLS, *skips]] for _ in edges]
        handed, statistics, others = kernels.spread(x, stride, links, 3)
        for edge in edges:
            for name, y, found in zip(POOLS, handed[0], statistics, strict=False):
                self._statistics(self.edges[edge][name][1], y, found)
        given = [*statistics, *skips]
        return {
            edge: [Candidate(*of_one) for of_one in zip(row, given, by_tensor, strict=True)]
            for edge, row, by_tensor in zip(edges, handed, links, strict=True)
        }, others

    def _pools(self, x: Tensor, edges: list[int], stride: int) -> dict[int, list[Candidate]]:
        *pools, statistics = kernels.pool(x, stride)
        norms = {edge: [self.edges[edge][name][1] for name in POOLS] for edge in edges}
        found = {
            edge: [self._statistics(*args) for args in zip(norms[edge], pools, statistics, strict=True)]
            for edge in edges
        }
        # In evaluation each edge has its own running statistics; in training all have the same.
        if not self.training:
            return {
                edge: [Candidate(y, s) for y, s in zip(pools, found[edge], strict=True)] for edge in edges
            }
        normalized = [kernels.mix([y], [s], self.one) for y, s in zip(pools, statistics, strict=True)]
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
        first = self._halves([x], None, tasks, [m[:4] for m in modules.values()])
        found = dict(zip(keys, first, strict=True))
        twice = [key for key in keys if CANDIDATES[key[1]].kind == "sep_conv"]
        second = self._halves(
            [found[key].y for key in twice],
            [found[key].statistics for key in twice],
            [Task(source, 1, CANDIDATES[name].dilation) for source, (_, name) in enumerate(twice)],
            [modules[key][4:] for key in twice],
            [found[key].link for key in twice if found[key].link],
        )
        found |= zip(twice, second, strict=True)
        return {edge: [found[edge, name] for name in CONVOLUTIONS] for edge in edges}

    def _halves(
        self,
        sources: list[Tensor],
        statistics: list[Tensor] | None,
        tasks: list[Task],
        modules: list[list[nn.Module]],
        source_links: Sequence[kernels.Link] = (),
    ) -> list[Candidate]:
        """Modules are ReLU, depthwise, pointwise, batch norm."""
        links = self._links(sources[0], len(tasks))
        outputs, found = kernels.sepconv(
            sources,
            tasks,
            [m[1].weight for m in modules],
            [m[2].weight for m in modules],
            statistics,
            self.training,
            links,
            source_links=source_links,
        )
        return self._with_statistics(outputs, found, [m[3] for m in modules], links)

    def _factorized_reduces(self, modules: list[FactorizedReduce], x: Tensor) -> list[Candidate]:
        links = self._links(x, len(modules))
        tasks = [Task(stride=2, offset=offset) for _ in modules for offset in (0, 1)]
        weights = [c.weight for module in modules for c in (module.conv_1, module.conv_2)]
        outputs, found = kernels.sepconv([x], tasks, [None] * len(tasks), weights, links=links, join=2)
        return self._with_statistics(outputs, found, [module.bn for module in modules], links)

    def _preprocess(self, module: nn.Module, x: Tensor) -> Tensor:
        if isinstance(module, FactorizedReduce):
            (found,) = self._factorized_reduces([module], x)
        else:
            links, (_, convolution, norm) = self._links(x, 1), module
            y, statistics = kernels.sepconv([x], [Task()], [None], [convolution.weight], links=links)
            (found,) = self._with_statistics(y, statistics, [norm], links)
        return kernels.mix([found.y], [found.statistics], self.one, self.training, [found.link])

    def _links(self, x: Tensor, count: int) -> list[kernels.Link]:
        """So many, if a node's adjoint is to take the batch norm of a convolution where that loads it."""
        linked = self.training and kernels.second_backward_in_one(x)
        return [kernels.Link() for _ in range(count)] if linked else []

    # Statistics

    def _with_statistics(
        self,
        outputs: list[Tensor],
        statistics: Tensor,
        norms: list[nn.BatchNorm2d],
        links: list[kernels.Link],
    ) -> list[Candidate]:
        """What `kernels.sepconv` returned, as candidates that `norms` normalise."""
        return [
            Candidate(y, self._statistics(norm, y, found), link)
            for y, found, norm, link in zip(
                outputs, statistics, norms, links or [None] * len(norms), strict=True
            )
        ]

    def _statistics(self, norm: nn.BatchNorm2d, y: Tensor, batch: Tensor) -> Tensor:
        """What y is normalised by, [3, C]: in training the statistics of the batch, which are noted."""
        if not self.training:
            mean, variance = norm.running_mean, norm.running_var
            return torch.stack([mean, variance, (variance + norm.eps).rsqrt()])
        if norm.track_running_stats:
            self._observed.append(Observed(norm, batch, y.numel() // y.shape[1]))
        return batch


def fused_stem(module: nn.Sequential, images: Tensor) -> Tensor:
    """The supernet's stem, a convolution and its affine batch norm, computed in the images' memory layout;
    channels-last, once for the three 1x1 convolutions that read it.

    ATen's passes; the second derivative is what a Hessian-vector product needs of it, 3 ms where autograd's
    own took 19 (batch 16, 16 channels, 32x32, one CPU core).
    """
    convolution, norm = module
    y, observed = convolution(images), []
    if not norm.training:
        return norm(y).contiguous(memory_format=torch.channels_last)
    found = _batch_norm(norm, y, kernels.statistics_of([y.detach()])[0], observed)
    if observed:
        update_running_statistics(observed)
    return found.contiguous(memory_format=torch.channels_last)


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
        tasks = [Task(stride=2, offset=offset) for offset in (0, 1)]
        weights = [module.conv_1.weight, module.conv_2.weight]
        (y,), (statistics,) = kernels.sepconv([x], tasks, [None, None], weights, join=2)
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
        task = Task() if depthwise is None else Task(0, depthwise.stride[0], depthwise.dilation[0])
        (y,), (statistics,) = kernels.sepconv(
            [x], [task], [depthwise and depthwise.weight], [convolutions[-1].weight]
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


@torch.no_grad()
def update_running_statistics(observed: list[Observed]) -> None:
    """As `nn.BatchNorm2d`: each by the statistics of its batch; the variance that runs is unbiased."""
    norms, statistics, counts = zip(*observed, strict=True)
    means = [s[0] for s in statistics]
    variances = list(torch._foreach_mul([s[1] for s in statistics], [m / (m - 1) for m in counts]))
    running = [n.running_mean for n in norms] + [n.running_var for n in norms]
    torch._foreach_lerp_(running, means + variances, norms[0].momentum)
    torch._foreach_add_([n.num_batches_tracked for n in norms], 1)
