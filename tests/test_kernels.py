"""Every kernel against its equation written in plain differentiable PyTorch, in float64."""

import pytest
import torch
import torch.nn.functional as F
from conftest import relative_error
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from darts_fast import kernels
from darts_fast.kernels import Task, torch_backend
from darts_fast.kernels.backends import using

CASES = {  # N, C, H, W
    "4 channels": (2, 4, 8, 8),
    "16 channels": (2, 16, 6, 6),
    "32 channels": (1, 32, 5, 4),
    "64 channels": (1, 64, 4, 4),
    "odd channels, odd image": (3, 5, 7, 5),
    "batch 1": (1, 4, 5, 6),
}


@pytest.fixture(autouse=True)
def poisoned():
    """Memory that an allocation does not write is NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(before)
    torch.utils.deterministic.fill_uninitialized_memory = fill


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


# The equations


def plain_norm(y, statistics=None):
    """Batch norm by the statistics of the batch, or by those given."""
    if statistics is None:
        mean, variance = y.mean((0, 2, 3)), y.var((0, 2, 3), correction=0)
    else:
        mean, variance, _ = statistics
    return (y - mean[:, None, None]) / (variance[:, None, None] + 1e-5).sqrt()


def plain_half(x, task, d, p, norm):
    a = F.relu(norm(x))
    if d is None:
        z = a[:, :, task.offset :: task.stride, task.offset :: task.stride]
    else:
        padding = task.dilation * (d.shape[-1] // 2)
        z = F.conv2d(a, d, None, task.stride, padding, task.dilation, groups=a.shape[1])
    return F.conv2d(z, p)


def plain_pool(x, stride):
    average = F.avg_pool2d(x, 3, stride, 1, count_include_pad=False)
    return F.max_pool2d(x, 3, stride, 1), average


def statistics_of(y):
    mean, variance = y.mean((0, 2, 3)), y.var((0, 2, 3), correction=0)
    return torch.stack([mean, variance, (variance + 1e-5).rsqrt()]).detach()


def four_sweeps(outputs, weights, inputs, seed=1):
    """Everything that the exact architecture gradient computes: outputs, first derivatives of a scalar of
    them, and d<grad_weights, v>/d inputs."""
    generator = torch.Generator().manual_seed(seed)

    def random_like(t):
        return torch.randn(t.shape, dtype=t.dtype, generator=generator)

    loss = sum((random_like(y) * y + (random_like(y) * y) ** 2).sum() for y in outputs)
    found = torch.autograd.grad(loss, [*weights, *inputs], create_graph=True)
    gradients = found[: len(weights)]
    assert all(g.grad_fn is not None for g in gradients), "the weight gradients have no graph"
    v = [random_like(g) for g in gradients]
    return [*outputs, *found, *torch.autograd.grad(gradients, inputs, v, retain_graph=True)]


def assert_same(found, expected):
    assert len(found) == len(expected)
    errors = [relative_error(f, e) for f, e in zip(found, expected, strict=True)]
    assert all(error < 1e-9 for error in errors), errors


# Separable halves

TASKS = {
    "3x3": [(3, 1, 1)],
    "5x5": [(5, 1, 1)],
    "dilated 3x3": [(3, 1, 2)],
    "dilated 5x5": [(5, 1, 2)],
    "stride 2": [(3, 2, 1), (5, 2, 1), (3, 2, 2), (5, 2, 2)],
    "four tasks": [(3, 1, 1), (5, 1, 1), (3, 1, 2), (5, 1, 2)],
}


def halves(shape, kinds):
    c = shape[1]
    tasks = [Task(0, stride, dilation) for _, stride, dilation in kinds]
    return tasks, [randn(c, 1, k, k) for k, _, _ in kinds], [randn(c + 1, c, 1, 1) for _ in kinds]


@pytest.mark.parametrize("kinds", TASKS.values(), ids=TASKS)
@pytest.mark.parametrize("shape", CASES.values(), ids=CASES)
@pytest.mark.parametrize("on_load", ["as it is", "batch norm", "constant norm"])
def test_sepconv(shape, kinds, on_load):
    x = randn(*shape)
    tasks, d, p = halves(shape, kinds)
    statistics = None if on_load == "as it is" else statistics_of(3 * x + 1 if "constant" in on_load else x)
    norm = {
        "as it is": lambda y: y,
        "batch norm": plain_norm,
        "constant norm": lambda y: plain_norm(y, statistics),
    }[on_load]
    expected = [plain_half(x, *args, norm) for args in zip(tasks, d, p, strict=True)]
    given = None if statistics is None else statistics[None]
    found, found_statistics = kernels.sepconv([x], tasks, d, p, given, on_load != "constant norm")
    assert_same(list(found_statistics), [statistics_of(y) for y in expected])
    assert not found_statistics.requires_grad
    assert_same(four_sweeps(found, d + p, [x]), four_sweeps(expected, d + p, [x]))


def test_sepconv_of_several_sources_some_used_by_none_or_many():
    shape = (2, 4, 6, 6)
    xs = [randn(*shape) for _ in range(3)]
    tasks = [Task(2), Task(0, 1, 2), Task(2, 1, 1), Task(0)]
    d, p = [randn(4, 1, k, k) for k in (3, 5, 5, 3)], [randn(4, 4, 1, 1) for _ in tasks]
    used = [xs[0], xs[2]]
    found, _ = kernels.sepconv(
        used,
        [t._replace(source=t.source // 2) for t in tasks],
        d,
        p,
        torch.stack(list(map(statistics_of, used))),
    )
    expected = [plain_half(xs[t.source], t, *w, plain_norm) for t, *w in zip(tasks, d, p, strict=True)]
    assert_same(four_sweeps(found, d + p, used), four_sweeps(expected, d + p, used))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("shape", [(2, 4, 6, 6), (1, 3, 4, 8)], ids=str)
def test_sepconv_without_depthwise(shape, stride):
    """The 1x1 preprocessing, and the two halves of a factorized reduce."""
    x = randn(*shape)
    tasks = [Task(0, stride, 1, offset) for offset in range(stride)]
    p = [randn(3, shape[1], 1, 1) for _ in tasks]
    found, _ = kernels.sepconv([x], tasks, [None] * stride, p)
    expected = [plain_half(x, t, None, w, lambda y: y) for t, w in zip(tasks, p, strict=True)]
    assert_same(four_sweeps(found, p, [x]), four_sweeps(expected, p, [x]))


def test_sepconv_cannot_halve_an_odd_image():
    with pytest.raises(ValueError, match="7x8 image cannot be halved"):
        kernels.sepconv([randn(2, 4, 7, 8)], [Task(0, 2)], [None], [randn(4, 4, 1, 1)])


def test_one_value_a_channel_has_no_variance():
    with pytest.raises(ValueError, match="more than one value"):
        kernels.sepconv([randn(1, 4, 1, 1)], [Task()], [None], [randn(4, 4, 1, 1)])


# Pools


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("shape", CASES.values(), ids=CASES)
def test_pool(shape, stride):
    x, w = randn(*shape), randn(shape[1], 1, 1)

    def run(pool):
        *outputs, statistics = pool(w * x, stride)
        return outputs, statistics

    found, statistics = run(kernels.pool)
    expected = plain_pool(w * x, stride)
    assert_same(list(statistics), [statistics_of(y) for y in expected])
    assert_same(four_sweeps(found, [w], [x]), four_sweeps(expected, [w], [x]))


@pytest.mark.parametrize("stride", [1, 2])
def test_max_pool_ties_go_to_the_first_in_row_major_order(stride):
    x = torch.ones(1, 2, 5, 5, dtype=torch.float64, requires_grad=True)
    maximum, _, _ = kernels.pool(x, stride)
    weights = torch.arange(maximum.numel(), dtype=torch.float64).view_as(maximum) + 1
    (found,) = torch.autograd.grad((maximum * weights).sum(), x)
    expected = torch.zeros(1, 2, 5, 5, dtype=torch.float64)
    for c in range(2):
        for i in range(maximum.shape[2]):
            for j in range(maximum.shape[3]):
                first = max(stride * i - 1, 0), max(stride * j - 1, 0)
                expected[0, c, first[0], first[1]] += weights[0, c, i, j].detach()
    assert torch.equal(found, expected)


# Mix


@pytest.mark.parametrize("edges", [1, 4])
@pytest.mark.parametrize("batch", [True, False], ids=["batch norm", "constant norm"])
@pytest.mark.parametrize("shape", CASES.values(), ids=CASES)
def test_mix(shape, batch, edges):
    """`edges` edges of one state: its candidates as they are, shared, and normalised ones of each edge."""
    x, w = randn(*shape), randn(shape[1], 1, 1)
    own = [randn(*shape) for _ in range(2 * edges)]
    p = torch.rand(3 * edges, dtype=torch.float64, requires_grad=True)
    state = (w * x).sin()
    ys = [w * y for y in own]
    constants = [statistics_of(y if batch else 2 * y - 1) for y in ys]
    candidates, statistics, expected = [], [], 0
    for edge in range(edges):
        candidates += [state, *ys[2 * edge : 2 * edge + 2]]
        statistics += [None, *constants[2 * edge : 2 * edge + 2]]
    for weight, y, s in zip(p, candidates, statistics, strict=True):
        expected = expected + weight * (y if s is None else plain_norm(y, None if batch else s))
    found = kernels.mix(candidates, statistics, p, batch)
    inputs = [x, p, *own]
    assert_same(four_sweeps([found], [w], inputs), four_sweeps([expected], [w], inputs))


def test_mix_of_one_candidate_is_batch_norm():
    y = randn(3, 5, 4, 4)
    found = kernels.mix([y], [statistics_of(y)], torch.ones(1, dtype=torch.float64))
    assert relative_error(found, F.batch_norm(y, None, None, training=True)) < 1e-9


# Numerical derivatives: independent of the equations above


def test_first_derivatives_are_numerical_derivatives():
    tasks, d, p = halves((2, 3, 5, 5), [(3, 1, 2), (5, 2, 1)])
    x = randn(2, 3, 5, 5)
    weights = torch.rand(2, dtype=torch.float64, requires_grad=True)

    def node(x, weights, *both):
        ys, statistics = kernels.sepconv([x], [tasks[0]] * 2, both[:2], both[2:])
        return kernels.mix(ys, list(statistics), weights)

    d[1] = randn(3, 1, 3, 3)
    assert gradcheck(node, (x, weights, *d, *p))
    assert gradcheck(lambda x: kernels.pool(x, 2)[:2], (x,))


def test_the_hessian_vector_product_is_the_numerical_derivative_of_the_slope():
    """(x, alphas) -> <grad_w L, v> through both halves of a separable convolution, the pools, the identity
    and the mix, with all weight gradients."""
    c = 3
    weights = [randn(c, 1, 3, 3), randn(c, c, 1, 1), randn(c, 1, 5, 5), randn(c, c, 1, 1), randn(c, c, 1, 1)]
    v = [torch.randn_like(w) for w in weights]
    target = torch.randn(2, c, 6, 6, dtype=torch.float64)
    one = torch.ones(1, dtype=torch.float64)

    def slope(x, alphas):
        d1, p1, d2, p2, p0 = weights
        (y,), s = kernels.sepconv([x], [Task()], [None], [p0])
        x = kernels.mix([y], list(s), one)
        y1, s1 = kernels.sepconv([x], [Task()], [d1], [p1])
        y2, s2 = kernels.sepconv(y1, [Task(0, 1, 2)], [d2], [p2], s1)
        *pools, s3 = kernels.pool(x, 1)
        node = kernels.mix([*y2, *pools, x], [*s2, *s3, None], alphas.softmax(0))
        gradients = torch.autograd.grad(((node - target) ** 2).mean(), weights, create_graph=True)
        return sum((g * d).sum() for g, d in zip(gradients, v, strict=True))

    assert gradcheck(slope, (randn(2, c, 6, 6), randn(4)), fast_mode=True)


# What is refused


def test_a_second_weight_gradient_raises():
    x = randn(2, 4, 6, 6)
    tasks, d, p = halves(x.shape, TASKS["four tasks"])
    ys, _ = kernels.sepconv([x], tasks, d, p)
    loss = sum((y**2).sum() for y in ys)
    gradients = torch.autograd.grad(loss, [*d, *p], create_graph=True)
    v = [torch.ones_like(g) for g in gradients]
    for weight in (d[0], p[3]):
        with pytest.raises(RuntimeError, match="no second derivative with respect to its weights"):
            torch.autograd.grad(gradients, [x, weight], v, retain_graph=True, allow_unused=True)
    with pytest.raises(RuntimeError, match="no second derivative with respect to its weights"):
        torch.autograd.backward(gradients, v, retain_graph=True)
    torch.autograd.grad(gradients, x, v)


def test_a_gradient_of_the_mix_weights_is_not_differentiated_again():
    y = randn(2, 4, 6, 6)
    p = torch.rand(1, dtype=torch.float64, requires_grad=True)
    found = kernels.mix([y], [statistics_of(y)], p)
    (gradient,) = torch.autograd.grad((found**3).sum(), p, create_graph=True)
    with pytest.raises(RuntimeError, match="weights of a mix"):
        torch.autograd.grad(gradient.sum(), y)


def test_no_weight_gradient_is_computed_in_the_last_sweeps(monkeypatch):
    asked = []
    real = torch_backend.sepconv_backward
    monkeypatch.setattr(
        torch_backend, "sepconv_backward", lambda *args: asked.append(args[-1]) or real(*args)
    )
    x = randn(2, 4, 6, 6)
    tasks, d, p = halves(x.shape, [(3, 1, 1)])
    (y,), _ = kernels.sepconv([x], tasks, d, p)
    gradients = torch.autograd.grad((y**2).sum(), [*d, *p], create_graph=True)
    assert asked == [True]
    torch.autograd.grad(gradients, x, [torch.ones_like(g) for g in gradients])
    assert asked == [True, False]


# Layouts and types


def test_memory_layout_changes_nothing():
    base = randn(2, 4, 12, 6)
    layouts = [
        lambda t: t[:, :, ::2],
        lambda t: t[:, :, ::2].contiguous(),
        lambda t: t[:, :, ::2].contiguous(memory_format=torch.channels_last),
        lambda t: t[:, :, ::2].transpose(2, 3).contiguous().transpose(2, 3),
    ]
    tasks, d, p = halves((2, 4, 6, 6), TASKS["four tasks"])
    p = [w[:4].detach().requires_grad_() for w in p]
    results = []
    for layout in layouts:
        x = layout(base)
        ys, s = kernels.sepconv([x], tasks, d, p)
        *pools, s2 = kernels.pool(x, 1)
        node = kernels.mix([x, *pools, *map(layout_of(layout), ys)], [None, *s2, *s], p[0].flatten()[:7])
        assert node.is_contiguous(memory_format=torch.channels_last)
        results.append(four_sweeps([node], [*d, *p[1:]], [base]))
    for found in results[1:]:
        assert_same(found, results[0])


class AsOnCuda(TorchDispatchMode):
    """Fails where a batch norm without a weight is asked for the gradient of its weight or bias: the CPU
    gives it, ATen's CUDA kernels give an empty tensor for channels-last input and raise for other."""

    asked = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.native_batch_norm_backward.default:
            weight, mask = args[2], args[-1]
            assert weight is not None or not any(mask[1:])
            self.asked += any(mask[1:])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_kernels_in_aten_ask_cuda_for_nothing_that_it_does_not_give(dtype):
    x = torch.randn(2, 4, 6, 6).to(dtype).requires_grad_()
    wide = torch.promote_types(dtype, torch.float32)
    d, p = [torch.randn(4, 1, 3, 3, dtype=wide)], [torch.randn(4, 4, 1, 1, dtype=wide)]
    weights = [t.requires_grad_() for t in (*d, *p, torch.rand(2, dtype=wide))]
    with using(torch_backend), AsOnCuda() as mode:
        y, s = kernels.sepconv([x], [Task()], d, p)
        y, s = kernels.sepconv(y, [Task()], d, p, s)
        node = kernels.mix([*y, x], [*s, None], weights[2])
        found = torch.autograd.grad(node.double().pow(2).sum(), weights, create_graph=True)
        torch.autograd.grad(found[:2], [x, weights[2]], [torch.ones_like(w) for w in weights[:2]])
    assert mode.asked > 4


def layout_of(layout):
    """The tensor, laid out as `layout` lays out."""
    return lambda y: layout(y.repeat_interleave(2, dim=2))


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)], ids=str
)
def test_other_types(dtype, bound):
    """Against the same kernels' float64 on the same rounded inputs: 2-byte types differ by what is rounded
    on store (2^-8 and 2^-11 a store), weights stay float32, statistics are float32."""
    x = torch.randn(2, 16, 8, 8).to(dtype).double().requires_grad_()
    kinds = TASKS["four tasks"]
    tasks = [Task(0, stride, dilation) for _, stride, dilation in kinds]
    d = [torch.randn(16, 1, k, k).double().requires_grad_() for k, _, _ in kinds]
    p = [torch.randn(16, 16, 1, 1).double().requires_grad_() for _ in kinds]
    weights = torch.rand(4).double().requires_grad_()
    c = torch.randn(2, 16, 8, 8)

    def run(x, d, p, weights):
        ys, s = kernels.sepconv([x], tasks, d, p)
        assert all(y.dtype == x.dtype for y in ys)
        assert s.dtype == torch.promote_types(x.dtype, torch.float32)
        node = kernels.mix(ys, list(s), weights)
        assert node.dtype == x.dtype
        loss = ((node.double() - c) ** 2).mean()
        inputs = [*d, *p, weights, x]
        found = torch.autograd.grad(loss, inputs, create_graph=True)
        assert all(f.dtype == i.dtype for f, i in zip(found, inputs, strict=True))
        v = [torch.ones_like(w) for w in [*d, *p]]
        return [node, s, *found, *torch.autograd.grad(found[: len(v)], [weights, x], v)]

    def narrow(tensors):
        return [t.detach().float().requires_grad_() for t in tensors]

    found = run(x.detach().to(dtype).requires_grad_(), narrow(d), narrow(p), *narrow([weights]))
    errors = [relative_error(f, e) for f, e in zip(found, run(x, d, p, weights), strict=True)]
    assert all(error < bound for error in errors), errors


def test_the_variance_is_stable_at_a_large_offset():
    """E[x^2] - E[x]^2 in float32 has no correct digit here."""
    x = (1e4 + torch.randn(4, 3, 16, 16)).requires_grad_()
    _, statistics = kernels.sepconv([x], [Task()], [None], [torch.eye(3)[:, :, None, None]])
    expected = x.detach().double().var((0, 2, 3), correction=0)
    assert relative_error(statistics[0, 1], expected) < 1e-4


# Affine batch norm


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_normalize(layout):
    """The four sweeps of a network whose first layers are a convolution and an affine batch norm: what the
    gradients' own derivative needs of it is the one with respect to the adjoint, here through p."""
    images = torch.randn(3, 2, 5, 7, dtype=torch.float64).contiguous(memory_format=layout)
    convolution, weight, bias, p = randn(4, 2, 3, 3), randn(4), randn(4), randn(4)

    def networks(norm):
        y = F.conv2d(images, convolution, padding=1)
        return [norm(y) * p[:, None, None]]

    found = networks(lambda y: kernels.normalize(y, kernels.statistics_of([y.detach()])[0], weight, bias))
    expected = networks(lambda y: plain_norm(y) * weight[:, None, None] + bias[:, None, None])
    weights = [convolution, weight, bias]
    assert_same(four_sweeps(found, weights, [p]), four_sweeps(expected, weights, [p]))


def test_normalize_refuses_a_second_derivative_it_does_not_have():
    images, convolution, weight, bias = (
        torch.randn(3, 2, 5, 7).double(),
        randn(4, 2, 1, 1),
        randn(4),
        randn(4),
    )
    y = F.conv2d(images, convolution)
    z = kernels.normalize(y, kernels.statistics_of([y.detach()])[0], weight, bias)
    (gradient,) = torch.autograd.grad(z.pow(3).sum(), convolution, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative with respect to the input"):
        torch.autograd.grad(gradient.sum(), convolution)
