"""The functions of a backend on made-up tensors, against their equations, which autograd differentiates.

`check(backend, dtype, case)` runs one of `CASES` on a backend, a module that types.Backend describes.
"""

import inspect
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from conftest import relative_error

from darts_fast.kernels import types
from darts_fast.kernels.types import Call, Reader, SecondReader, Source, Task, Weights

# Relative norms against float64. 2-byte types round every activation that is read or written, to 2^-9
# (bfloat16) or 2^-12 (float16), and Triton's also both factors of a pointwise product.
BOUNDS = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


# The equations


def normalised(y, statistics=None):
    """Returns the batch norm by the statistics of the batch, or by other statistics."""
    if statistics is None:
        mean, variance = y.mean((0, 2, 3)), y.var((0, 2, 3), correction=0)
    else:
        mean, variance, _ = statistics
    return (y - mean[:, None, None]) / (variance[:, None, None] + 1e-5).sqrt()


def half(h, task, d, p):
    a = F.relu(h)
    if d is None:
        z = a[:, :, task.offset :: task.stride, task.offset :: task.stride]
    else:
        padding = task.dilation * (d.shape[-1] // 2)
        z = F.conv2d(a, d, None, task.stride, padding, task.dilation, groups=a.shape[1])
    return F.conv2d(z, p)


def statistics_of(y):
    mean, variance = y.mean((0, 2, 3)), y.var((0, 2, 3), correction=0)
    return torch.stack([mean, variance, (variance + 1e-5).rsqrt()])


def sums(*products):
    """Returns the sum of each product over images and pixels: [products, C]."""
    return torch.stack([product.sum((0, 2, 3)) for product in products])


def of_tangent(y, h, g):
    """Returns yd, yd h and yd G."""
    return y.tangent, y.tangent * h, y.tangent * g


# Automatic differentiation


class Sweeps(NamedTuple):
    """What the four sweeps compute of one tensor t."""

    value: torch.Tensor
    adjoint: torch.Tensor  # dL/dt
    tangent: torch.Tensor  # the derivative of t along v
    second: torch.Tensor  # the derivative of dL/dt along v


class Graph:
    """A scalar L of some leaves, and a direction v of the leaves, which give the four sweeps of every tensor.

    `sweeps` is the double backward pass that the exact architecture gradient takes: the gradient of
    <dL/d leaves, v>. A tensor t inside the graph is read as t + delta, where delta is a leaf of zeros, whose
    derivatives are those of t; and L has the term <u, t> with u = 0, so that dL/du is t, and its derivative
    along v is the tangent of t.
    """

    def __init__(self, seed, device):
        self.generator, self.device = torch.Generator().manual_seed(seed), device
        self.loss, self.leaves, self.directions, self.inner = 0, {}, {}, {}

    def random(self, *shape, scale=1.0, shift=0.0):
        """Returns float64 values that every dtype can hold, so that all backends read the same."""
        values = scale * torch.randn(shape, generator=self.generator) + shift
        return values.bfloat16().double().to(self.device)

    def leaf(self, name, value, direction=None):
        self.leaves[name] = value.requires_grad_()
        self.directions[name] = torch.zeros_like(value) if direction is None else direction
        return value

    def watched(self, name, t):
        delta, u = (torch.zeros_like(t, requires_grad=True) for _ in range(2))
        self.inner[name] = t, delta, u
        self.loss = self.loss + (u * t).sum()
        return t + delta

    def adjoint(self, name, t, factor=1.0):
        """Adds factor <G, t> to L, with a leaf G that moves along v."""
        g = self.leaf(name, self.random(*t.shape, shift=0.25), self.random(*t.shape, shift=-0.25))
        self.loss = self.loss + factor * (g * t).sum()

    def sweeps(self):
        inputs = [*self.leaves.values(), *(i for _, delta, u in self.inner.values() for i in (delta, u))]
        first = torch.autograd.grad(self.loss, inputs, create_graph=True)
        slope = sum((g * v).sum() for g, v in zip(first, self.directions.values(), strict=False))
        second = torch.autograd.grad(slope, inputs, materialize_grads=True)
        first, second = ([t.detach() for t in group] for group in (first, second))
        of = {
            name: Sweeps(leaf.detach(), g, self.directions[name], h)
            for (name, leaf), g, h in zip(self.leaves.items(), first, second, strict=False)
        }
        for i, (name, (t, _, _)) in enumerate(self.inner.items()):
            delta = len(self.leaves) + 2 * i
            of[name] = Sweeps(t.detach(), first[delta], second[delta + 1], second[delta])
        return of


# Calls


def mapped(tree, change):
    """Returns the same nested sequences and structures, with changed tensors."""
    if isinstance(tree, torch.Tensor):
        return change(tree)
    if isinstance(tree, dict):
        return {name: mapped(value, change) for name, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        changed = [mapped(value, change) for value in tree]
        return type(tree)(*changed) if hasattr(tree, "_fields") else type(tree)(changed)
    return tree


def on_meta(tree):
    """Returns the same with tensors without contents; tensors in the same place become one tensor."""
    copies = {}

    def change(t):
        key = t.data_ptr(), t.dtype, t.shape, t.stride()
        return copies.setdefault(key, torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta"))

    return mapped(tree, change)


def poison(t):
    return t.fill_(float("nan") if t.is_floating_point() else 99)


def same_bits(a, b):
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


class Runner:
    """Calls the functions of one backend with activations of one dtype, and compares what they write."""

    def __init__(self, backend, dtype, device):
        self.backend, self.dtype, self.device = backend, dtype, device
        self.wide = types.accumulator(dtype)
        self.written = []  # by all calls, in order

    # Tensors that are read

    def image(self, value):
        """Returns an activation, channels-last."""
        return self.images([value])[0]

    def images(self, values):
        """Returns activations one behind the other."""
        images = types.images(len(values), values[0].shape, self.dtype, self.device)
        return images.copy_(torch.stack(list(values)))

    def slice(self, value):
        """Returns an activation that is a slice of the channels of a larger one, the rest of which is NaN."""
        return self._between_others(value.shape).copy_(value)

    def numbers(self, value):
        """Returns weights, sums or statistics, at an address that is no multiple of 16 bytes."""
        flat = torch.full((value.numel() + 1,), float("nan"), dtype=self.wide, device=self.device)
        return flat[1:].view(value.shape).copy_(value)

    def weights(self, weights):
        return Weights(*(None if w is None else self.numbers(w) for w in weights))

    def constants(self, value):
        """Returns statistics [3, C] that lie among those of other batch norms."""
        c = value.shape[1]
        whole = torch.full((3, c + 9), float("nan"), dtype=self.wide, device=self.device)
        return whole[:, 5 : 5 + c].copy_(value)

    def entries(self, values, entries):
        """Returns [rows, entries, C] with a value [rows, C] at some entries, and NaN at the others."""
        rows, c = next(iter(values.values())).shape
        whole = torch.full((rows, entries, c), float("nan"), dtype=self.wide, device=self.device)
        for entry, value in values.items():
            whole[:, entry] = value
        return whole

    # Tensors that are written

    def _between_others(self, shape):
        n, c, height, width = shape
        return poison(types.images(1, (n, c + 7, height, width), self.dtype, self.device)[0])[:, 3 : 3 + c]

    def empty_images(self, entries, shape):
        return poison(types.images(entries, shape, self.dtype, self.device))

    def empty_image(self, shape):
        return self.empty_images(1, shape)[0]

    def empty_slice(self, shape):
        return self._between_others(shape)

    def empty_entry(self, rows, c):
        """Returns [rows, C] that lies among those of other entries."""
        return self.empty(rows, 3, c)[:, 1]

    def empty(self, *shape):
        return poison(torch.empty(shape, dtype=self.wide, device=self.device))

    # Calls

    def __call__(self, function, *reads, **writes):
        """Runs the call twice: the results must be the same bits, and what it reads must not change."""
        names = list(signature(function))
        call = Call(function, dict(zip(names, reads, strict=False)), writes)
        assert [*call.reads, *writes] == names
        self._assert_same_launches(call)
        before = [t.clone() for t in types.tensors(reads)]
        # Where the call writes a slice, the whole tensor is watched.
        targets = [t if t._base is None else t._base for t in types.tensors(writes)]
        program, results = self.backend.program([call]), []
        for _ in range(2):
            for t in targets:
                poison(t)
            program()
            results.append([t.clone() for t in targets])
        assert all(same_bits(a, b) for a, b in zip(*results, strict=True)), f"{function}: another result"
        assert all(same_bits(a, b) for a, b in zip(types.tensors(reads), before, strict=True)), (
            f"{function} changed what it reads"
        )
        for t, whole in zip(types.tensors(writes), targets, strict=True):
            if whole.dim() == 4 and whole.shape[1] != t.shape[1]:
                assert whole[:, :3].isnan().all() and whole[:, 3 + t.shape[1] :].isnan().all(), (
                    f"{function} wrote beside its slice"
                )
        self.written += [t.clone() for t in types.tensors(writes)]

    def _assert_same_launches(self, call):
        """A plan counts launches on tensors without contents: they must be those on real tensors."""
        function = getattr(self.backend, call.function)
        of_real, of_meta = (
            [(launch.name, launch.bytes) for launch in function(**tree[0], **tree[1])]
            for tree in ((call.reads, call.writes), on_meta((call.reads, call.writes)))
        )
        assert of_real and of_real == of_meta
        assert all(size > 0 for _, size in of_real)

    def compare(self, what, result, expected):
        """Bounds the relative error of the norm; where zero is expected, the result has to be zero."""
        assert result.shape == expected.shape, what
        if expected.any():
            error = relative_error(result.cpu(), expected.cpu())
            assert error <= BOUNDS[self.dtype], (what, error)
        else:
            assert not result.any(), what

    def compare_sums(self, what, results, products):
        """Bounds the error of each sum over images and pixels, relative to that of the absolute values: what
        is summed has been rounded, and may cancel."""
        for result, product in zip(results, products, strict=True):
            error = (result.cpu().double() - product.sum((0, 2, 3)).cpu()).norm()
            size = product.abs().sum((0, 2, 3)).norm().cpu()
            assert error <= BOUNDS[self.dtype] * size, (f"sums of {what}", error / size)

    def compare_each(self, what, results, expected):
        """Compares each row of sums or statistics by itself: the rows differ in size."""
        assert len(results) == len(expected), what
        for i, (f, e) in enumerate(zip(results, expected, strict=True)):
            self.compare(f"{what} {i}", f, e)


def signature(function):
    """Returns the parameters of a function of the protocol, by their names."""
    parameters = dict(inspect.signature(getattr(types.Backend, function)).parameters)
    del parameters["self"]
    return parameters


# Cases


class Kind(NamedTuple):
    """A task of a case."""

    kernel: int = 3  # 0: no depthwise convolution
    dilation: int = 1
    source: int = 0
    offset: int = 0


class Sepconv(NamedTuple):
    shape: tuple[int, int, int, int]
    kinds: tuple[Kind, ...]
    stride: int = 1
    outputs: int | None = None  # channels of a task; None: as many as come in
    joined: int = 1  # neighbouring tasks that write one output
    norm: str | None = None  # how sources are read: as they are, "batch", or by a "constant" (forward alone)
    shift: float = 0.0  # of the sources
    in_mix: bool = True  # what reads y is a mix, with weights p; or a second half
    read_as_it_is: bool = False  # what reads y does not normalise it: the adjoint is of y
    sliced: bool = False  # the adjoints that the reader hands back are slices of channels
    gradients: bool = True  # of the weights, which are wanted

    def tasks(self, r, weights):
        return [
            Task(kind.source, r.weights(w), self.stride, kind.dilation, kind.offset)
            for kind, w in zip(self.kinds, weights, strict=True)
        ]

    def graph(self, device):
        g, (_, c, *_) = Graph(1, device), self.shape
        count = 1 + max(kind.source for kind in self.kinds)
        k = self.outputs or c
        inputs, outputs = [], []
        for i in range(count):
            x = g.random(*self.shape, scale=1.5, shift=self.shift)
            x = g.leaf(f"x{i}", x, g.random(*self.shape, shift=0.5))
            constant = statistics_of(2 * x.detach() - 1) if self.norm == "constant" else None
            inputs.append(g.watched(f"h{i}", normalised(x, constant) if self.norm else x))
        for i, (kernel, dilation, source, offset) in enumerate(self.kinds):
            shapes = ([c, 1, kernel, kernel] if kernel else None), [k, c, 1, 1]
            d, p = (
                g.leaf(f"{name}{i}", g.random(*shape, scale=0.4), g.random(*shape, scale=0.4))
                if shape
                else None
                for name, shape in zip("dp", shapes, strict=True)
            )
            task = Task(source, Weights(d, p), self.stride, dilation, offset)
            outputs.append(half(inputs[source], task, d, p))
        for i in range(len(self.kinds) // self.joined):
            y = g.watched(f"y{i}", torch.cat(outputs[i * self.joined : (i + 1) * self.joined], dim=1))
            m = g.watched(f"m{i}", y if self.read_as_it_is else normalised(y))
            g.adjoint(f"g{i}", m, self.p[i] if self.in_mix else 1.0)
        return g.sweeps()

    @property
    def p(self):
        return [0.5 + i / 8 for i in range(len(self.kinds) // self.joined)]

    def check(self, r, of):
        sources, count = [name for name in of if name[0] == "x"], len(self.kinds) // self.joined
        x, h = ([of[f"{name}{i}"] for i in range(len(sources))] for name in "xh")
        y = [of[f"y{i}"] for i in range(count)]
        w = [Weights(of.get(f"d{i}"), of[f"p{i}"]) for i in range(len(self.kinds))]
        weights, tangents, expected_gradients = (
            [Weights(*(None if t is None else getattr(t, field) for t in pair)) for pair in w]
            for field in ("value", "tangent", "adjoint")
        )
        read = r.images([t.value for t in x])
        statistics = [None] * len(x)
        if self.norm == "constant":
            statistics = [r.constants(statistics_of(2 * t.value - 1)) for t in x]
        elif self.norm:
            statistics = [r.numbers(statistics_of(t.value)) for t in x]
        sources = [Source(*pair) for pair in zip(read, statistics, strict=True)]
        tasks = self.tasks(r, weights)

        out = r.empty_images(count, y[0].value.shape)
        out_statistics = None if self.norm == "constant" else r.empty(count, 3, out.shape[2])
        r("sepconv_forward", sources, tasks, y=out, statistics=out_statistics)
        r.compare("y", out, torch.stack([t.value for t in y]))
        if self.norm == "constant":
            return
        expected = torch.stack([statistics_of(t.value) for t in y])
        r.compare_each("statistics", out_statistics.transpose(0, 1), expected.transpose(0, 1))

        readers, generator = self.readers(r, of), torch.Generator().manual_seed(7)
        random = lambda: torch.randn(self.shape, generator=generator).bfloat16().double().to(r.device)  # noqa: E731
        adjoint = r.empty_images(len(x), self.shape)
        out_sums = r.empty(2, len(x), self.shape[1]) if self.norm else None
        k, c = w[0].pointwise.value.shape[:2]
        taps = max(kind.kernel**2 for kind in self.kinds)
        gradients = r.empty(len(tasks), c * (k + taps)) if self.gradients else None
        terms = [[] if self.norm else [r.slice(random()), r.image(random())][: i + 1] for i in range(len(x))]
        added = torch.stack([sum((t.double() for t in its), torch.zeros_like(x[0].value)) for its in terms])
        r("sepconv_backward", sources, tasks, [second.first for second in readers], terms,
          adjoint=adjoint, sums=out_sums, gradients=gradients)  # fmt: skip
        r.compare("H", adjoint, added + torch.stack([t.adjoint for t in h]))
        if self.norm:
            expected = torch.stack([sums(t.adjoint, t.adjoint * t.value) for t in h], dim=1)
            r.compare_each("sums of H, H h", out_sums, expected)
        for i, (d, p) in enumerate(expected_gradients if self.gradients else ()):
            r.compare(f"dP {i}", gradients[i, : k * c], p.flatten())
            if d is not None:
                r.compare(f"dD {i}", gradients[i, k * c : k * c + d.numel()], d.flatten())

        out, source_sums = r.empty_images(count, y[0].value.shape), None
        if self.norm:
            products = [sums(*of_tangent(t, i.value, i.adjoint)) for t, i in zip(x, h, strict=True)]
            source_sums = r.numbers(torch.stack(products, dim=1))
        moved, of_readers = [r.weights(t) for t in tangents], [second.first for second in readers]
        out_sums = [r.empty_entry(3, out.shape[2]) for _ in readers]
        r("sepconv_tangent", sources, tasks, list(r.images([t.tangent for t in x])), source_sums, moved,
          of_readers, y=out, sums=out_sums)  # fmt: skip
        r.compare("yd", out, torch.stack([t.tangent for t in y]))
        for i, found in enumerate(out_sums):
            read = y[i] if self.read_as_it_is else of[f"m{i}"]
            r.compare_sums(f"yd, yd h, yd G {i}", found, of_tangent(y[i], read.value, of[f"g{i}"].value))

        adjoint = r.empty_images(len(x), self.shape)
        out_sums = r.empty(2, len(x), c) if self.norm else None
        r("sepconv_second", sources, tasks, moved, readers, terms, adjoint=adjoint, sums=out_sums)
        r.compare("Hd", adjoint, added + torch.stack([t.second for t in h]))
        if self.norm:
            expected = torch.stack([sums(t.second, t.second * t.value) for t in h], dim=1)
            r.compare_each("sums of Hd, Hd h", out_sums, expected)

    def readers(self, r, of):
        """Returns the reader of each output."""
        count = len(self.kinds) // self.joined
        return readers(
            r,
            [(of[f"y{i}"], of[f"m{i}"], of[f"g{i}"]) for i in range(count)],
            [not self.read_as_it_is] * count,
            self.p if self.in_mix else None,
            self.sliced,
        )


def readers(r, candidates, normalised, p, sliced):
    """Returns a SecondReader for each candidate, which is the sweeps of y, h and G.

    The readers belong to two mixes by turns, each of which has sums and p for other entries, too.
    """
    count = len(candidates)
    entries, result = count + 2, [None] * count
    as_read = r.slice if sliced else r.image
    shared = r.images([y.value for y, _, _ in candidates])
    for mix in range(2):
        of_mix = [i for i in range(count) if i % 2 == mix]
        if not of_mix:
            continue
        entry = {i: count + 1 - i for i in of_mix}
        first, tangent, second = {}, {}, {}
        for i in of_mix:
            (y, h, g), nothing = candidates[i], torch.full((3, candidates[i][0].value.shape[1]), float("nan"))
            if normalised[i]:
                first[entry[i]] = sums(g.value, g.value * h.value)
                tangent[entry[i]] = sums(*of_tangent(y, h.value, g.value))
                second[entry[i]] = sums(g.tangent, g.tangent * h.value)
            else:  # they are not read
                first[entry[i]], tangent[entry[i]], second[entry[i]] = nothing[:2], nothing, nothing[:2]
        first, tangent, second = (r.entries(s, entries) for s in (first, tangent, second))
        weights = None
        if p is not None:
            weights = torch.full((entries,), float("nan"), dtype=torch.float64)
            for i in of_mix:
                weights[entry[i]] = p[i]
            weights = r.numbers(weights)
        for i in of_mix:
            y, _, g = candidates[i]
            without = not normalised[i] and mix == 0
            statistics = r.numbers(statistics_of(y.value)) if normalised[i] else None
            reader = Reader(
                shared[i], statistics, entry[i], as_read(g.value), None if without else first, weights
            )
            result[i] = SecondReader(
                reader,
                r.image(y.tangent),
                None if without else tangent,
                as_read(g.tangent),
                None if without else second,
            )
    return result


class Mix(NamedTuple):
    shape: tuple[int, int, int, int]
    normalised: tuple[bool, ...]  # of each candidate
    outs: str = "image"  # and slices of channels: a letter each, "i" or "s"
    constant: bool = False  # statistics; forward alone

    def graph(self, device):
        g, total = Graph(2, device), 0
        p = g.leaf(
            "p", torch.rand(len(self.normalised), generator=g.generator).bfloat16().double().to(device)
        )
        for k, normed in enumerate(self.normalised):
            y = g.random(*self.shape, scale=1 + k / 4, shift=k / 2)
            y = g.leaf(f"y{k}", y, g.random(*self.shape, shift=0.5))
            constant = self.constants(y.detach()) if self.constant else None
            h = g.watched(f"h{k}", normalised(y, constant) if normed else y)
            total = total + p[k] * h
        g.adjoint("g", g.watched("o", total))
        return g.sweeps()

    def constants(self, y):
        return statistics_of(2 * y - 1)

    def check(self, r, of):
        y, h = ([of[f"{name}{k}"] for k in range(len(self.normalised))] for name in "yh")
        p, o, g, count, c = of["p"], of["o"], of["g"], len(y), self.shape[1]
        candidates = [
            Source(
                x,
                None
                if not normed
                else r.constants(self.constants(t.value))
                if self.constant
                else r.numbers(statistics_of(t.value)),
            )
            for x, t, normed in zip(r.images([t.value for t in y]), y, self.normalised, strict=True)
        ]
        weights = r.numbers(p.value)

        def empty_outs():
            return [r.empty_slice(self.shape) if kind == "s" else r.empty_image(self.shape) for kind in kinds]

        kinds = {"image": "i"}.get(self.outs, self.outs)
        outs = empty_outs()
        r("mix_forward", candidates, weights, outs=outs)
        for out in outs:
            r.compare("o", out, o.value)
        if self.constant:
            return

        as_read = r.slice if "s" in kinds else r.image
        out_sums, gradient = r.empty(2, count, c), r.empty(count)
        r("mix_backward", candidates, None, as_read(g.value), sums=out_sums, weight_gradient=gradient)
        first = torch.stack([sums(g.value, g.value * t.value) for t in h], dim=1)
        r.compare_each("sums of G, G h", out_sums, first)
        r.compare("dL/dp", gradient, p.adjoint)

        outs, products, tangents = empty_outs(), r.empty(count, c), list(r.images([t.tangent for t in y]))
        of_y = {
            k: sums(*of_tangent(t, i.value, g.value))
            for k, (t, i, normed) in enumerate(zip(y, h, self.normalised, strict=True))
            if normed
        }
        of_y = r.entries(of_y, count) if of_y else None
        r("mix_tangent", candidates, weights, tangents, of_y, as_read(g.value),
          outs=outs, products=products)  # fmt: skip
        for out in outs:
            r.compare("od", out, o.tangent)
        for k, normed in enumerate(self.normalised):
            if normed:
                assert products[k].isnan().all(), "a product was written that nobody reads"
            else:
                r.compare_sums(f"yd G {k}", products[k : k + 1], [y[k].tangent * g.value])

        out_sums, gradient = r.empty(2, count, c), r.empty(count)
        r("mix_second", candidates, as_read(g.tangent), r.numbers(first), of_y, products,
          sums=out_sums, weight_gradient=gradient)  # fmt: skip
        expected = torch.stack([sums(g.tangent, g.tangent * t.value) for t in h], dim=1)
        r.compare_each("sums of Gd, Gd h", out_sums, expected)
        r.compare("second adjoint of p", gradient, p.second)


class Norm(NamedTuple):
    shape: tuple[int, int, int, int]
    sources: int
    constant: bool = False  # statistics; forward alone

    def graph(self, device):
        g = Graph(3, device)
        for i in range(self.sources):
            x = g.random(*self.shape, scale=2, shift=i)
            x = g.leaf(f"x{i}", x, g.random(*self.shape, shift=0.5))
            constant = statistics_of(2 * x.detach() - 1) if self.constant else None
            g.adjoint(f"g{i}", g.watched(f"h{i}", normalised(x, constant)))
        return g.sweeps()

    def check(self, r, of):
        x, h, g = ([of[f"{name}{i}"] for i in range(self.sources)] for name in "xhg")
        sources = [
            Source(
                read,
                r.constants(statistics_of(2 * t.value - 1))
                if self.constant
                else r.numbers(statistics_of(t.value)),
            )
            for read, t in zip(r.images([t.value for t in x]), x, strict=True)
        ]
        out = r.empty_images(self.sources, self.shape)
        r("norm_forward", sources, out=out)
        r.compare("h", out, torch.stack([t.value for t in h]))
        if self.constant:
            return
        for field in ("value", "tangent"):  # G, and Gd
            out_sums = r.empty(2, self.sources, self.shape[1])
            adjoints = [getattr(t, field) for t in g]
            r("norm_backward", sources, [r.image(t) for t in adjoints], sums=out_sums)
            expected = [sums(a, a * t.value) for a, t in zip(adjoints, h, strict=True)]
            r.compare_each("sums of G, G h", out_sums, torch.stack(expected, dim=1))
        of_x = [sums(*of_tangent(t, i.value, a.value)) for t, i, a in zip(x, h, g, strict=True)]
        out, of_x = r.empty_images(self.sources, self.shape), r.numbers(torch.stack(of_x, dim=1))
        r("norm_tangent", sources, [r.image(t.tangent) for t in x], of_x, out=out)
        r.compare("hd", out, torch.stack([t.tangent for t in h]))


class FanOut(NamedTuple):
    shape: tuple[int, int, int, int]
    readers: tuple[int, ...]  # of each source
    normalised: tuple[bool, ...]
    weighed: bool = True  # readers are mixes
    sliced: bool = False  # adjoints are slices of channels

    @property
    def p(self):
        return [0.5 + i / 8 for i in range(max(self.readers))]

    def graph(self, device):
        g = Graph(4, device)
        for i, (count, normed) in enumerate(zip(self.readers, self.normalised, strict=True)):
            x = g.random(*self.shape, scale=2, shift=i)
            x = g.watched(f"x{i}", g.leaf(f"leaf{i}", x, g.random(*self.shape, shift=0.5)))
            g.loss = g.loss + 0 * x.sum()  # it may have no reader
            for j in range(count):
                h = g.watched(f"h{i} {j}", normalised(x) if normed else x)
                g.adjoint(f"g{i} {j}", h, self.p[j] if self.weighed else 1.0)
        return g.sweeps()

    def check(self, r, of):
        count = len(self.readers)
        x = [of[f"x{i}"] for i in range(count)]
        read = r.images([t.value for t in x])
        sources, seconds = [], []
        for i, (n, normed) in enumerate(zip(self.readers, self.normalised, strict=True)):
            sources.append(Source(read[i], r.numbers(statistics_of(x[i].value)) if normed else None))
            its = []
            if n:
                candidates = [(x[i], of[f"h{i} {j}"], of[f"g{i} {j}"]) for j in range(n)]
                its = readers(r, candidates, [normed] * n, self.p if self.weighed else None, self.sliced)
            # All read the same tensors.
            tangent = r.image(x[i].tangent)
            seconds.append(
                [
                    s._replace(
                        first=s.first._replace(y=read[i], statistics=sources[i].statistics), tangent=tangent
                    )
                    for s in its
                ]
            )
        out = r.empty_images(count, self.shape)
        r("fan_out_backward", sources, [[s.first for s in its] for its in seconds], out=out)
        for i, (result, t) in enumerate(zip(out, x, strict=True)):
            r.compare(f"the adjoint of source {i}", result, t.adjoint)
        out = r.empty_images(count, self.shape)
        r("fan_out_second", sources, seconds, out=out)
        for i, (result, t) in enumerate(zip(out, x, strict=True)):
            r.compare(f"the second adjoint of source {i}", result, t.second)


class Genotype(NamedTuple):
    """The first two sweeps of a node of a genotype: halves of two sources with gamma and beta, whose outputs,
    with gamma and beta, the node sums with a state as it is; and a tensor that two nodes read."""

    shape: tuple[int, int, int, int]
    kinds: tuple[Kind, ...]
    stride: int = 1
    outputs: int | None = None  # channels of a task; None: as many as come in
    drop_path: bool = True  # each output has a weight for each image

    def graph(self, device):
        g, (n, c, *_) = Graph(8, device), self.shape
        k = self.outputs or c
        values = {}

        def leaf(name, *shape, scale=1.0, shift=0.0):
            values[name] = g.random(*shape, scale=scale, shift=shift).requires_grad_()
            return values[name]

        def affine(name, y):
            gamma_beta = leaf(f"affine {name}", 2, y.shape[1])
            gamma_beta.data[0, 0] = 0.0  # of a channel that is off
            return normalised(y) * gamma_beta[0, :, None, None] + gamma_beta[1, :, None, None]

        def weighed(name, h):
            values[f"w {name}"] = g.random(n, shift=1.0) if self.drop_path else torch.ones_like(h[:, 0, 0, 0])
            return h * values[f"w {name}"][:, None, None, None]

        def inner(name, t):
            values[name] = t
            t.retain_grad()
            return t

        h = [inner(f"h{i}", affine(f"x{i}", leaf(f"x{i}", *self.shape, scale=1.5, shift=i))) for i in (0, 1)]
        total = 0
        for i, (kernel, dilation, source, offset) in enumerate(self.kinds):
            d, p = leaf(f"d{i}", c, 1, kernel, kernel, scale=0.4), leaf(f"p{i}", k, c, 1, 1, scale=0.4)
            y = inner(
                f"y{i}", half(h[source], Task(source, Weights(d, p), self.stride, dilation, offset), d, p)
            )
            total = total + weighed(f"y{i}", affine(f"y{i}", y))
        z, shared = leaf("z", *y.shape), leaf("shared", *y.shape, scale=2, shift=1)
        values["o"] = total + z
        values["g"] = g.random(*y.shape, shift=0.25)
        loss = (values["o"] * values["g"]).sum()
        for j in (0, 1):
            values[f"g{j}"] = g.random(*y.shape, shift=0.25)
            loss = loss + (weighed(f"reader {j}", affine(f"reader {j}", shared)) * values[f"g{j}"]).sum()
        loss.backward()
        return {
            name: Sweeps(t.detach(), t.grad if t.retains_grad or t.is_leaf else None, None, None)
            for name, t in values.items()
        }

    def check(self, r, of):
        value = {name: t.value for name, t in of.items()}
        gradient = {name: t.adjoint for name, t in of.items()}
        c, count = self.shape[1], len(self.kinds)
        y = [value[f"y{i}"] for i in range(count)]
        k, drop_path = y[0].shape[1], self.drop_path

        def affine(name):
            return r.numbers(value[f"affine {name}"])

        def sources_of(names):
            images = r.images([value[name] for name in names])
            return [
                Source(x, r.numbers(statistics_of(value[name])), affine(name))
                for x, name in zip(images, names, strict=True)
            ]

        def weights(names):
            """Of other entries, too, which are NaN."""
            found = torch.full((len(names) + 1, self.shape[0]), float("nan"), dtype=torch.float64)
            for i, name in enumerate(names):
                found[i] = value[f"w {name}"]
            return r.numbers(found)

        sources = sources_of(["x0", "x1"])
        out = r.empty_images(2, self.shape)
        r("norm_forward", sources, out=out)
        r.compare("h", out, torch.stack([value["h0"], value["h1"]]))

        pairs = [Weights(value[f"d{i}"], value[f"p{i}"]) for i in range(count)]
        tasks = [
            Task(kind.source, r.weights(w), self.stride, kind.dilation, kind.offset)
            for kind, w in zip(self.kinds, pairs, strict=True)
        ]
        out, statistics = r.empty_images(count, y[0].shape), r.empty(count, 3, k)
        r("sepconv_forward", sources, tasks, y=out, statistics=statistics)
        r.compare("y", out, torch.stack(y))

        names = [f"y{i}" for i in range(count)]
        candidates, of_paths = sources_of(names), weights(names) if drop_path else None
        if drop_path:
            of_paths[count] = 1.0
        out = r.empty_slice(y[0].shape)
        r("mix_forward", [*candidates, Source(r.image(value["z"]))], of_paths, outs=[out])
        r.compare("o", out, value["o"])

        out_sums, g = r.empty(2, count, k), r.slice(value["g"])
        by_image = of_paths[:count] if drop_path else None
        r("mix_backward", candidates, by_image, g, sums=out_sums, weight_gradient=None)
        expected = torch.stack([gradient[f"affine {name}"].flip(0) for name in names], dim=1)
        r.compare_each("the gradients of beta, gamma of y", out_sums, expected)

        sums_of_y = r.numbers(expected)
        of_outputs = [
            Reader(s.x, s.statistics, i, g, sums_of_y, of_paths, s.affine[0])
            for i, s in enumerate(candidates)
        ]
        adjoint, out_sums = r.empty_images(2, self.shape), r.empty(2, 2, c)
        taps = max(kind.kernel**2 for kind in self.kinds)
        gradients = r.empty(count, c * (k + taps))
        r("sepconv_backward", sources, tasks, of_outputs, [(), ()],
          adjoint=adjoint, sums=out_sums, gradients=gradients)  # fmt: skip
        # H is dL/dh before the ReLU, so it is 0 where h is not positive, as in what autograd has.
        r.compare("H", adjoint, torch.stack([gradient["h0"], gradient["h1"]]))
        expected = torch.stack([gradient[f"affine x{i}"].flip(0) for i in (0, 1)], dim=1)
        r.compare_each("the gradients of beta, gamma of x", out_sums, expected)
        for i, w in enumerate(pairs):
            r.compare(f"dP {i}", gradients[i, : k * c], gradient[f"p{i}"].flatten())
            found = gradients[i, k * c : k * c + w.depthwise.numel()]
            r.compare(f"dD {i}", found, gradient[f"d{i}"].flatten())

        names = ["reader 0", "reader 1"]
        expected = torch.stack([gradient[f"affine {name}"].flip(0) for name in names], dim=1)
        shared, of_paths = r.image(value["shared"]), weights(names) if drop_path else None
        statistics, out_sums = r.numbers(statistics_of(value["shared"])), r.numbers(expected)
        its = [
            Reader(shared, statistics, j, r.slice(value[f"g{j}"]), out_sums, of_paths, affine(name)[0])
            for j, name in enumerate(names)
        ]
        out = r.empty_images(1, shared.shape)
        r("fan_out_backward", [Source(shared, statistics)], [its], out=out)
        r.compare("the adjoint of what two nodes read", out[0], gradient["shared"])


class Factorized(NamedTuple):
    """A 1 x k convolution and a k x 1 one, which stride over columns and rows."""

    shape: tuple[int, int, int, int]
    stride: int

    def graph(self, device):
        g, c = Graph(9, device), self.shape[1]
        x = g.random(*self.shape).requires_grad_()
        first, second = (g.random(c, c, *kernel, scale=0.3).requires_grad_() for kernel in ((1, 5), (5, 1)))
        middle = F.conv2d(x.relu(), first, None, (1, self.stride), (0, 2))
        y = F.conv2d(middle, second, None, (self.stride, 1), (2, 0))
        adjoint, p = g.random(*y.shape, shift=0.25), 0.75
        (normalised(y) * adjoint).sum().mul(p).backward()
        found = {"x": x, "first": first, "second": second, "middle": middle, "y": y, "g": adjoint}
        return {
            name: Sweeps(t.detach(), t.grad if t.is_leaf else None, None, None) for name, t in found.items()
        }

    def check(self, r, of):
        value = {name: t.value for name, t in of.items()}
        x, pair = r.image(value["x"]), (r.numbers(value["first"]), r.numbers(value["second"]))
        middle, y = r.empty_image(value["middle"].shape), r.empty_image(value["y"].shape)
        statistics = r.empty(3, self.shape[1])
        r("convolution_forward", x, pair, self.stride, middle=middle, y=y, statistics=statistics)
        r.compare("middle", middle, value["middle"])
        r.compare("y", y, value["y"])
        r.compare("statistics", statistics, statistics_of(value["y"]))
        h, g = normalised(value["y"]), value["g"]
        of_y = r.numbers(torch.stack([sums(g, g * h)], dim=1))
        read = Reader(r.image(value["y"]), r.numbers(statistics_of(value["y"])), 0, r.slice(g), of_y,
                      r.numbers(torch.tensor([0.75], dtype=torch.float64)))  # fmt: skip
        adjoint, gradients = r.empty_image(self.shape), [torch.empty_like(w) for w in pair]
        r("convolution_backward", x, pair, self.stride, r.image(value["middle"]), read,
          adjoint=adjoint, gradients=tuple(gradients))  # fmt: skip
        r.compare("dL/dx", adjoint, of["x"].adjoint)
        for name, gradient in zip(("first", "second"), gradients, strict=True):
            r.compare(f"the gradient of the {name} weight", gradient, of[name].adjoint)


class Pool(NamedTuple):
    shape: tuple[int, int, int, int]
    stride: int
    terms: int = 0
    readers: tuple[int, int] = (2, 2)  # of each pool, in the tangent sweep
    read_as_it_is: bool = False  # they do not normalise it

    def graph(self, device):
        g = Graph(5, device)
        x = g.random(*self.shape).mul(2).round().div(2).relu()  # many windows have several maxima
        x = g.leaf("x", x, g.random(*self.shape, shift=0.5))
        pools = (
            F.max_pool2d(x, 3, self.stride, 1),
            F.avg_pool2d(x, 3, self.stride, 1, count_include_pad=False),
        )
        for name, pool in zip(("maximum", "average"), pools, strict=True):
            g.adjoint(f"of {name}", g.watched(name, pool))
        for i in range(self.terms):
            g.adjoint(f"term{i}", x)
        return g.sweeps()

    def position(self, x):
        """Returns the number in its window of the first maximum, in row-major order."""
        n, c, height, width = x.shape
        windows = F.unfold(F.pad(x, [1] * 4, value=-torch.inf), 3, stride=self.stride).view(n, c, 9, -1)
        order = torch.arange(9, 0, -1, device=x.device)[:, None]
        first = ((windows == windows.amax(2, keepdim=True)) * order).argmax(2)
        return first.view(n, c, -(-height // self.stride), -(-width // self.stride))

    def check(self, r, of):
        x, pools = of["x"], [of["maximum"], of["average"]]
        shape = pools[0].value.shape
        expected = self.position(x.value)
        position = poison(types.images(1, shape, torch.uint8, r.device)[0])
        out, out_statistics = r.empty_images(2, shape), r.empty(2, 3, shape[1])
        r(
            "pool_forward",
            r.image(x.value),
            self.stride,
            pools=out,
            position=position,
            statistics=out_statistics,
        )
        assert torch.equal(position.long(), expected)
        r.compare("pools", out, torch.stack([t.value for t in pools]))
        statistics = torch.stack([statistics_of(t.value) for t in pools])
        r.compare_each("statistics", out_statistics.transpose(0, 1), statistics.transpose(0, 1))
        position = types.images(1, shape, torch.uint8, r.device)[0].copy_(expected)
        for field, result in (("value", x.adjoint), ("tangent", x.second)):  # adjoints, and the second ones
            adjoints = r.images([getattr(of[f"of {name}"], field) for name in ("maximum", "average")])
            terms = [getattr(of[f"term{i}"], field) for i in range(self.terms)]
            terms = [r.slice(t) if i % 2 else r.image(t) for i, t in enumerate(terms)]
            out = r.empty_image(self.shape)
            r("pool_backward", position, self.stride, adjoints, terms, out=out)
            r.compare(f"the adjoint of x, from each {field}", out, result)
        self.check_tangent(r, r.image(x.tangent), position, pools)
        # Evaluation
        out, position = r.empty_images(2, shape), types.images(1, shape, torch.uint8, r.device)[0]
        r("pool_forward", r.image(x.value), self.stride, pools=out, position=position, statistics=None)
        r.compare("pools without statistics", out, torch.stack([t.value for t in pools]))

    def check_tangent(self, r, tangent, position, pools):
        """Also for what reads the pools, of which some hand back slices of channels."""
        shape, generator = pools[0].value.shape, torch.Generator().manual_seed(7)
        random = lambda: torch.randn(shape, generator=generator).bfloat16().double().to(r.device)  # noqa: E731
        adjoints = [[random() for _ in range(count)] for count in self.readers]
        of_readers, read = [], r.images([t.value for t in pools])
        for pool, y, of_pool in zip(pools, read, adjoints, strict=True):
            statistics = None if self.read_as_it_is else r.numbers(statistics_of(pool.value))
            given = [r.slice(g) if i % 2 else r.image(g) for i, g in enumerate(of_pool)]
            of_readers.append([Reader(y, statistics, i, g, None, None) for i, g in enumerate(given)])
        out, out_sums = (
            r.empty_images(2, shape),
            [[r.empty_entry(3, shape[1]) for _ in of] for of in adjoints],
        )
        r("pool_tangent", tangent, position, self.stride, of_readers, pools=out, sums=out_sums)
        r.compare("tangents", out, torch.stack([t.tangent for t in pools]))
        for pool, of_pool, found in zip(pools, adjoints, out_sums, strict=True):
            for g, of_reader in zip(of_pool, found, strict=True):
                h = pool.value if self.read_as_it_is else normalised(pool.value)
                r.compare_sums("yd, yd h, yd G", of_reader, of_tangent(pool, h, g))


class MaxPool2x2(NamedTuple):
    shape: tuple[int, int, int, int]

    def graph(self, device):
        g = Graph(8, device)
        x = g.random(*self.shape).mul(2).round().div(2).relu()  # many windows have several maxima
        x = g.leaf("x", x, g.random(*self.shape, shift=0.5))
        g.adjoint("g", g.watched("y", F.max_pool2d(x, 2)))
        return g.sweeps()

    def check(self, r, of):
        x, y, g = of["x"], of["y"], of["g"]
        n, c, height, width = self.shape
        windows = F.unfold(x.value, 2, stride=2).view(n, c, 4, height // 2, width // 2)
        order = torch.arange(4, 0, -1, device=x.value.device)[:, None, None]
        expected = ((windows == windows.amax(2, keepdim=True)) * order).argmax(2)  # the first maximum
        position = poison(types.images(1, y.value.shape, torch.uint8, r.device)[0])
        out = r.empty_image(y.value.shape)
        r("max_pool_2x2_forward", r.image(x.value), y=out, position=position)
        assert torch.equal(position.long(), expected)
        r.compare("y", out, y.value)
        position = types.images(1, y.value.shape, torch.uint8, r.device)[0].copy_(expected)
        for adjoint, result in ((g.value, x.adjoint), (g.tangent, x.second)):
            out = r.empty_image(self.shape)
            r("max_pool_2x2_backward", position, r.image(adjoint), out=out)
            r.compare("the adjoint of x", out, result)
        out = r.empty_image(y.value.shape)
        r("max_pool_2x2_tangent", r.image(x.tangent), position, y=out)
        r.compare("yd", out, y.tangent)


class Shuffle(NamedTuple):
    shape: tuple[int, int, int, int]
    groups: int
    first: int  # channels of the first of the two tensors that are side by side
    terms: int = 1  # whole tensors, which are added in the adjoint

    def graph(self, device):
        g, (n, c, height, width) = Graph(9, device), self.shape
        x = [
            g.leaf(name, *(g.random(n, k, height, width) for _ in range(2)))
            for name, k in (("x0", self.first), ("x1", c - self.first))
        ]
        y = g.watched("y", F.channel_shuffle(torch.cat(x, dim=1), self.groups))
        for i, piece in enumerate((y[:, : self.first], y[:, self.first :])):
            g.adjoint(f"g{i}", piece)
        for i in range(self.terms):
            g.adjoint(f"term{i}", y)
        return g.sweeps()

    def check(self, r, of):
        x, y = [of["x0"], of["x1"]], of["y"]
        pieces, terms = [of["g0"], of["g1"]], [of[f"term{i}"] for i in range(self.terms)]
        for parts, expected in (
            ([t.value for t in x], y.value),
            ([t.tangent for t in x], y.tangent),
        ):
            outs = [r.empty_image(t.value.shape) for t in pieces]
            whole = r.empty_slice(self.shape)
            r("shuffle", [[r.image(t) for t in parts]], self.groups, outs=[outs, [whole]])
            r.compare("the pieces of y", torch.cat(outs, dim=1), expected)
            r.compare("y", whole, expected)
        for field, result in (("value", "adjoint"), ("tangent", "second")):
            read = [[r.slice(getattr(t, field))] for t in terms]
            read.append([r.image(getattr(t, field)) for t in pieces])
            outs = [r.empty_image(t.value.shape) for t in x]
            r("shuffle", read, self.shape[1] // self.groups, outs=[outs])
            for i, (out, t) in enumerate(zip(outs, x, strict=True)):
                r.compare(f"the {result} of x{i}", out, getattr(t, result))


class Add(NamedTuple):
    shape: tuple[int, int, int, int]
    terms: int

    def graph(self, device):
        g = Graph(6, device)
        return [g.random(*self.shape) for _ in range(self.terms)]

    def check(self, r, of):
        out = r.empty_image(self.shape)
        r("add", [r.slice(t) if i % 2 else r.image(t) for i, t in enumerate(of)], out=out)
        r.compare("sum", out, sum(of))


ALL_KINDS = Kind(3), Kind(5), Kind(3, 2), Kind(5, 2)
TWO_SOURCES = *ALL_KINDS, *(kind._replace(source=1) for kind in ALL_KINDS)
PAIR = Kind(0), Kind(0, offset=1)

# These cases run every function, and are small enough for the interpreter of Triton.
CASES = {
    "first halves": Sepconv((2, 4, 7, 6), ALL_KINDS),
    "first halves, stride 2, odd": Sepconv((1, 5, 7, 9), ALL_KINDS, stride=2, outputs=6, sliced=True),
    "second halves": Sepconv(
        (2, 6, 6, 5), (Kind(3), Kind(5, source=1), Kind(5, 2, 2)), norm="batch", shift=1.0, sliced=True
    ),
    "several tasks of several sources": Sepconv(
        (1, 5, 5, 6), (Kind(3), Kind(5), Kind(3, 2, 1), Kind(3, 1, 1)), outputs=3, norm="batch", in_mix=False
    ),
    "halves in evaluation": Sepconv((2, 6, 4, 5), (Kind(3), Kind(5, 1, 1)), norm="constant"),
    "1x1": Sepconv((2, 7, 3, 5), (Kind(0),), outputs=4, in_mix=False),
    "1x1 of two states": Sepconv((1, 12, 4, 3), (Kind(0), Kind(0, source=1)), outputs=3, in_mix=False),
    "factorized reduces": Sepconv((2, 6, 6, 4), PAIR * 2, stride=2, outputs=3, joined=2, sliced=True),
    "factorized reduce of a state": Sepconv((1, 5, 4, 6), PAIR, stride=2, outputs=4, joined=2, in_mix=False),
    "read as they are": Sepconv(
        (2, 4, 6, 5), (Kind(3), Kind(5)), norm="batch", sliced=True, read_as_it_is=True
    ),
    "read as they are, joined": Sepconv(
        (1, 5, 7, 6), (Kind(3), Kind(5, 2)), 2, joined=2, in_mix=False, read_as_it_is=True
    ),
    "without weight gradients": Sepconv((1, 4, 5, 4), (Kind(3),), norm="batch", gradients=False),
    "mix": Mix((2, 5, 5, 7), (True, False, True, True)),
    "mix into slices": Mix((1, 20, 4, 3), (False, True, True), outs="is"),
    "mix of one": Mix((2, 3, 3, 4), (True,), outs="s"),
    "mix in evaluation": Mix((2, 5, 4, 4), (True, False, True), outs="s", constant=True),
    "norm": Norm((2, 5, 4, 7), 2),
    "norm in evaluation": Norm((2, 5, 4, 4), 1, constant=True),
    "fan out": FanOut((2, 5, 4, 6), (3, 1, 2), (True, True, False)),
    "fan out, some unread": FanOut((1, 20, 5, 3), (2, 0), (True, True), sliced=True),
    "fan out, not weighed": FanOut((1, 3, 4, 4), (2, 1), (True, False), weighed=False),
    "pools": Pool((2, 3, 5, 7), 1, terms=2),
    "pools, stride 2, odd": Pool((1, 5, 7, 5), 2, terms=3, readers=(4, 1)),
    "pools, stride 2": Pool((2, 20, 4, 6), 2, readers=(0, 3)),
    "pools that nobody reads": Pool((1, 3, 4, 5), 1, readers=(0, 0)),
    "pools, read as they are": Pool((1, 3, 4, 5), 2, readers=(1, 2), read_as_it_is=True),
    "genotype": Genotype((3, 4, 5, 6), (Kind(3), Kind(5, 2), Kind(3, source=1))),
    "genotype, stride 2, no drop path": Genotype(
        (2, 5, 7, 6), (Kind(3), Kind(5, source=1)), 2, outputs=6, drop_path=False
    ),
    "factorized convolution": Factorized((2, 3, 6, 7), 1),
    "factorized convolution, stride 2": Factorized((2, 3, 6, 8), 2),
    "mix of what passes": Mix((2, 5, 3, 4), (False, False)),
    "2x2 max pool": MaxPool2x2((2, 3, 6, 8)),
    "shuffle": Shuffle((2, 12, 3, 5), 4, 3),
    "shuffle of the last node": Shuffle((1, 6, 4, 3), 2, 3, terms=2),
    "split": Shuffle((2, 8, 3, 4), 1, 2, terms=0),
    "add": Add((2, 5, 3, 4), 3),
    "add two": Add((1, 20, 4, 4), 2),
}

SHAPES = [
    (2, 16, 9, 11),
    (3, 32, 7, 6),
    (2, 1, 6, 5),
    (2, 3, 7, 9),
    (2, 17, 6, 7),
    (1, 24, 8, 3),
    (1, 40, 2, 20),
    (35, 4, 3, 3),
]

# These have more sizes, for backends that are not interpreted: channels and pixels that fill no register.
MORE_CASES = (
    {
        # With a single channel most derivatives of a batch norm are zero: relative errors would mean nothing.
        f"halves {shape}, stride {stride}, {norm or 'as they are'}": Sepconv(
            (shape[0], max(2, shape[1]), *shape[2:]),
            TWO_SOURCES,
            stride,
            outputs=max(2, shape[1] - stride + 1),
            norm=norm,
            shift=2.0 if norm else 0.0,
            sliced=stride == 2,
        )
        for shape in SHAPES
        for stride in (1, 2)
        for norm in (None, "batch")
    }
    | {
        f"halves of one channel, stride {stride}": Sepconv(
            (2, 1, 5, 6), TWO_SOURCES, stride, norm="batch", read_as_it_is=True
        )
        for stride in (1, 2)
    }
    | {
        f"kernels of {kernel}": Sepconv((2, 8, 9, 10), (Kind(kernel), Kind(kernel, 2)), stride)
        for kernel, stride in ((1, 1), (7, 1), (7, 3))
    }
    | {
        f"1x1 of {c} to {k} channels": Sepconv(
            (2, c, 6, 8), (Kind(0), Kind(0, source=1)), outputs=k, in_mix=False
        )
        for c, k in ((16, 16), (48, 16), (64, 8), (3, 5), (24, 40))
    }
    | {
        f"factorized reduces of {c} to {k} channels": Sepconv(
            (2, c, 6, 8), PAIR * count, 2, outputs=k, joined=2, sliced=count > 1, in_mix=count > 1
        )
        for c, k, count in ((16, 8, 3), (48, 16, 1), (3, 5, 2))
    }
    | {
        f"mix of {count}, {shape}": Mix(shape, (True, *[False, True, True] * count)[:count], "is")
        for shape in SHAPES
        for count in (2, 35)
    }
    | {f"norm {shape}": Norm(shape, 2) for shape in SHAPES}
    | {f"fan out {shape}": FanOut(shape, (5, 4, 3), (True, True, False), sliced=True) for shape in SHAPES}
    | {
        f"pools {shape}, stride {stride}": Pool(shape, stride, terms=2)
        for shape in SHAPES
        for stride in (1, 2)
    }
    | {f"add {shape}": Add(shape, 4) for shape in SHAPES}
    | {
        f"genotype {shape}, stride {stride}": Genotype(shape, TWO_SOURCES, stride)
        for shape in SHAPES
        if shape[1] > 1
        for stride in (1, 2)
    }
)


@cache
def _expected(case, device):
    return case.graph(device)


def check(backend, dtype, case, device="cpu"):
    """Calls the functions of a case, each with inputs from autograd, and compares what they write.

    Returns:
        Everything that was written, in order, to be compared with another run to the bit.
    """
    r = Runner(backend, dtype, device)
    case.check(r, _expected(case, device))
    return r.written


def check_large_mean(backend, dtype, device="cpu"):
    """The variance must be taken about the mean: E[x^2] - E[x]^2 in float32 has no correct digit here."""
    r = Runner(backend, dtype, device)
    x = (1e3 + torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(0))).to(device)
    for function in ("sepconv_forward", "pool_forward"):
        y, statistics = r.empty_images(2, x.shape), r.empty(2, 3, 4)
        if function == "sepconv_forward":
            identity = Weights(None, r.numbers(torch.eye(4)[:, :, None, None]))
            source = Source(r.image(x), None)
            r(function, [source], [Task(0, identity)] * 2, y=y, statistics=statistics)
        else:
            position = types.images(1, x.shape, torch.uint8, device)[0]
            r(function, r.image(x), 1, pools=y, position=position, statistics=statistics)
        expected = torch.stack([statistics_of(t.double()) for t in y])
        for row, bound in enumerate((1e-5, 1e-4, 1e-4)):
            assert relative_error(statistics[:, row].cpu(), expected[:, row].cpu()) <= bound, (function, row)


def check_nan(backend, dtype, device="cpu"):
    """NaN must show in everything that it enters, and nowhere else."""
    r = Runner(backend, dtype, device)
    x = torch.ones(1, 4, 5, 5, device=device)
    x[0, 1, 2, 2] = float("nan")
    weights = Weights(r.numbers(torch.ones(4, 1, 3, 3)), r.numbers(torch.ones(4, 4, 1, 1)))
    y, statistics = r.empty_images(1, x.shape), r.empty(1, 3, 4)
    r("sepconv_forward", [Source(r.image(x), None)], [Task(0, weights)], y=y, statistics=statistics)
    reached = torch.zeros(5, 5, dtype=torch.bool, device=device)
    reached[1:4, 1:4] = True
    assert torch.equal(y[0].isnan(), reached.expand(x.shape)) and statistics.isnan().all()
    pools, position = r.empty_images(2, x.shape), types.images(1, x.shape, torch.uint8, device)[0]
    r("pool_forward", r.image(x), 1, pools=pools, position=position, statistics=None)
    reached = reached & (torch.arange(4, device=device) == 1)[:, None, None]
    assert torch.equal(pools.isnan(), reached.expand(pools.shape))
