"""The C++ kernels, function by function against the ATen ones in float64, and the whole supernet on them."""

import gc
import os

import pytest
import torch

from darts_fast import architect, kernels
from darts_fast.kernels import backends, native, torch_backend
from darts_fast.kernels.handover import Handover, Reader
from darts_fast.kernels.torch_backend import Normalizer, Task
from darts_fast.supernet import Supernet

# The C++ kernels are optional: without a compiler the install succeeds and the ATen kernels, which
# tests/test_kernels.py tests everywhere, compute instead.
pytestmark = pytest.mark.skipif(
    native.level() is None, reason="the C++ kernels were not built: no compiler when this was installed"
)

TOLERANCE = 1e-5  # relative norm, float32 against float64


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def image(g, n, c, h, w):
    return torch.randn(n, c, h, w, generator=g).contiguous(memory_format=torch.channels_last)


def wide(value):
    """The same arguments in float64."""
    if isinstance(value, torch.Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, Normalizer):
        return Normalizer(wide(value.statistics), value.batch)
    if isinstance(value, Task) or not isinstance(value, (list, tuple)):
        return value
    return [wide(item) for item in value]


def flat(result):
    if isinstance(result, (list, tuple)):
        return [tensor for item in result for tensor in flat(item)]
    return [result]


def assert_agree(found, expected, tolerance=TOLERANCE):
    found, expected = flat(found), flat(expected)
    assert len(found) == len(expected)
    for index, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert (a is None) == (b is None), index
        if a is not None:
            assert a.shape == b.shape and a.dtype == torch.float32
            error = float((a.double() - b).norm() / b.norm().clamp_min(1e-30))
            assert error <= tolerance, (index, error)


def sepconv_last(module, start, adjoints, tangents, seconds):
    """The tangent and the second backward sweep: yd of every task, and the second adjoint of every source."""
    if module is native:
        yd, left = native.sepconv_tangent_forward(*start, adjoints, *tangents)
        return yd, native.sepconv_second(*start, seconds, left)
    yd, gained = torch_backend.sepconv_tangent(*start, adjoints, *tangents)
    seconds, yd = (
        [torch.zeros_like(y) if t is None else t for t, y in zip(tensors, adjoints, strict=True)]
        for tensors in (seconds, yd)
    )
    found, *_ = torch_backend.sepconv_backward(*start, seconds, False)
    return yd, [f if g is None else f + g for f, g in zip(found, gained, strict=True)]


def mix_last(module, start, g, first, tangents, second):
    """od, the second adjoint of every candidate, and that of p; `first` is what `mix_backward` returned."""
    if module is native:
        od, left = native.mix_tangent_forward(*start, g, first[1], tangents)
        return od, *native.mix_second(*start, second, left)
    od, gained, p_gained = torch_backend.mix_tangent(*start, g, *first[:2], tangents)
    found, sums = torch_backend.mix_backward(*start, second)
    return od, [f if g is None else f + g for f, g in zip(found, gained, strict=True)], p_gained + sums.sum(1)


def call(module, name, *arguments):
    several = {"sepconv_last": sepconv_last, "mix_last": mix_last}
    return several[name](module, *arguments) if name in several else getattr(module, name)(*arguments)


def compared(name, *arguments, select=lambda result: result):
    """The native result, after it was held against float64's and against itself on two threads."""
    found = call(native, name, *arguments)
    assert_agree(select(found), select(call(torch_backend, name, *wide(arguments))))
    threads = torch.get_num_threads()
    torch.set_num_threads(2 if threads == 1 else 1)
    try:
        again = call(native, name, *arguments)
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(flat(found), flat(again), strict=True):
        assert a is b is None or torch.equal(a, b)
    return found


@pytest.fixture(autouse=True)
def poisoned():
    """Every tensor that is allocated is full of NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


# The tasks of one call: (kernel, dilation); 0: no depthwise part
KERNELS = [(3, 1), (5, 1), (3, 2), (5, 2)]
SHAPES = [
    (2, 16, 9, 11),
    (1, 16, 8, 8),
    (3, 32, 7, 6),
    (2, 64, 5, 4),
    (2, 1, 6, 5),
    (2, 3, 7, 9),
    (2, 5, 4, 33),
    (2, 17, 6, 7),
    (2, 24, 8, 3),
    (1, 16, 2, 40),
    (35, 4, 3, 3),
]


def arguments_of(shape, stride, normalized, kernels=KERNELS, batch=True, outputs=None):
    """Two sources, tasks on both; the arguments that all three functions begin with, and each y's adjoint."""
    n, c, h, w = shape
    g = generator(c + stride)
    sources = [image(g, *shape) * 2 + 3, image(g, *shape)]
    norms = [None, None]
    if normalized:
        norms = [Normalizer(s, batch) for s in torch_backend.statistics_of(sources)]
        if not batch:
            constants = [torch.rand(2, c, generator=g) + 0.5 for _ in sources]
            norms = [
                Normalizer(torch.stack([m, v, (v + torch_backend.EPSILON).rsqrt()]), False)
                for m, v in constants
            ]
    tasks, d, p = [], [], []
    for source in range(2):
        for kernel, dilation in kernels:
            offset = source if kernel == 0 and stride > 1 else 0
            tasks.append(Task(source, stride, dilation, offset))
            d.append(torch.randn(c, 1, kernel, kernel, generator=g) if kernel else None)
            p.append(torch.randn(outputs or c, c, 1, 1, generator=g))
    size = -(-h // stride), -(-w // stride)
    adjoints = [image(g, n, outputs or c, *size) for _ in tasks]
    return (sources, norms, tasks, d, p), adjoints


def check_sepconv(start, adjoints):
    compared("sepconv_forward", *start)
    compared("sepconv_backward", *start, adjoints, True)
    compared("sepconv_backward", *start, adjoints, False)
    g = generator(5)
    sources, _, _, d, p = start
    tangents = [torch.randn(x.shape, generator=g) for x in sources]
    moved = [[None if w is None else torch.randn(w.shape, generator=g) for w in ws] for ws in (d, p)]
    seconds = [torch.randn(y.shape, generator=g) for y in adjoints]
    compared("sepconv_last", start, adjoints, [tangents, *moved], seconds)
    compared("sepconv_last", start, adjoints, [[None] * len(sources), *moved], [None, *seconds[1:]])


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_sepconv(shape, stride, normalized):
    check_sepconv(*arguments_of(shape, stride, normalized))


@pytest.mark.parametrize("shape", [(7, 16, 32, 32), (4, 48, 27, 25), (10, 20, 24, 24)])
@pytest.mark.parametrize("normalized", [False, True])
def test_sepconv_of_calls_that_write_past_the_caches(shape, normalized):
    """STREAMED in sepconv.cpp; with 20 channels, which fill no register, they do not after all."""
    start, adjoints = arguments_of(shape, 1, normalized)
    assert sum(t.numel() for t in [*start[0], *adjoints]) >= 1 << 20
    check_sepconv(start, adjoints)


@pytest.mark.parametrize("channels", [(16, 16), (48, 16), (64, 8), (3, 5), (24, 40)])
@pytest.mark.parametrize("stride", [1, 2])
def test_sepconv_without_depthwise_part(channels, stride):
    check_sepconv(*arguments_of((2, channels[0], 6, 8), stride, False, [(0, 1)], outputs=channels[1]))


@pytest.mark.parametrize("kernels", [[(1, 1)], [(7, 1)], [(3, 3)]])
def test_sepconv_of_other_kernels(kernels):
    check_sepconv(*arguments_of((2, 8, 9, 10), 1, True, kernels))
    check_sepconv(*arguments_of((2, 8, 9, 10), 3, False, kernels))


def test_sepconv_with_constant_statistics():
    check_sepconv(*arguments_of((2, 16, 6, 6), 1, True, batch=False))


@pytest.mark.parametrize("kept", range(4))
def test_sepconv_leaves_out_what_is_zero(kept):
    """Of the tangents of sources and weights and the second adjoints, one alone."""
    start, adjoints = arguments_of((2, 16, 6, 6), 1, True)
    given = [*(start[i] for i in (0, 3, 4)), adjoints[::-1]]
    *tangents, seconds = (
        [torch.roll(t, 1) if i == kept else None for t in tensors] for i, tensors in enumerate(given)
    )
    compared("sepconv_last", start, adjoints, tangents, seconds)
    nothing = [[None] * len(tensors) for tensors in given]
    found, second = sepconv_last(native, start, adjoints, nothing[:3], nothing[3])
    assert not any(t.any() for t in [*found, *second])


def test_statistics_of_a_large_mean():
    (sources, norms, tasks, d, p), _ = arguments_of((4, 16, 16, 16), 1, False, [(0, 1)])
    sources = [x.abs() * 1e-3 + 100 for x in sources]
    p = [torch.eye(16)[:, :, None, None]] * 2
    _, statistics = native.sepconv_forward(sources, norms, tasks, d, p)
    exact = torch_backend.statistics_of([x.double() for x in sources])
    assert_agree(statistics[:, 0], exact[:, 0], 1e-7)
    assert_agree(statistics[:, 1], exact[:, 1], 1e-4)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_pool(shape, stride):
    g = generator()
    x = image(g, *shape).mul(4).round().div(4)  # ties
    maximum, average, position, statistics = native.pool_forward(x, stride)
    expected = torch_backend.pool_forward(x.double(), stride)
    assert_agree([maximum, average, statistics], [*expected[:2], expected[3]])
    a, b = (image(g, *maximum.shape) for _ in range(2))
    found = native.pool_backward(x, position, stride, a, b)
    exact = torch_backend.pool_backward(x.double(), expected[2], stride, a.double(), b.double())
    assert_agree(found, exact)
    terms = [image(g, *shape) for _ in range(3)]
    found = native.pool_backward(x, position, stride, a, b, terms)
    assert_agree(found, exact + sum(t.double() for t in terms))
    xd = image(g, *shape)
    found = native.pool_tangent(xd, position, stride)
    assert_agree(found, torch_backend.pool_tangent(xd.double(), expected[2], stride))


def test_pool_takes_the_first_of_equal_values_and_nan():
    x = torch.zeros(1, 16, 4, 4)
    _, _, position, _ = native.pool_forward(x, 1)
    assert position[0, :, 0, 0].tolist() == [4] * 16 and position[0, :, 1, 1].tolist() == [0] * 16
    x[0, :, 2, 2] = float("nan")
    maximum = native.pool_forward(x, 1)[0]
    assert torch.equal(maximum.isnan(), torch.nn.functional.max_pool2d(x, 3, 1, 1).isnan())


@pytest.mark.parametrize("batch", [True, False])
@pytest.mark.parametrize("count", [1, 2, 7, 35])
@pytest.mark.parametrize("shape", SHAPES)
def test_mix(shape, count, batch):
    g = generator(count)
    candidates = [image(g, *shape) * (1 + k) + k for k in range(count)]
    norms = [Normalizer(s, batch) for s in torch_backend.statistics_of(candidates)]
    if count > 1:
        norms[1] = None
    p = torch.rand(count, generator=g)
    compared("mix_forward", candidates, norms, p)
    adjoint = image(g, *shape) + 0.5
    adjoints, sums, gained = compared(
        "mix_backward", candidates, norms, p, adjoint, select=lambda result: result[0]
    )
    exact = torch_backend.mix_backward(*wide((candidates, norms, p, adjoint)))[1]
    # Here and below, sums whose terms nearly cancel: their error is that of the terms.
    for k, (y, norm) in enumerate(zip(candidates, norms, strict=True)):
        h = y if norm is None else norm.apply(y)
        assert (sums[k] - exact[k]).norm() <= 1e-6 * float(adjoint.norm() * h.norm())
        assert abs(gained[k] - exact[k].sum()) <= 1e-6 * float(adjoint.norm() * h.norm())
    tangents = [image(g, *shape) + 1 for _ in range(count)]
    if count > 2:
        tangents[2] = None
    start = (candidates, norms, p), adjoint, (adjoints, sums), tangents, image(g, *shape) - 0.5
    found = compared("mix_last", *start, select=lambda result: result[:2])
    exact = mix_last(torch_backend, *wide(start))[2]
    for k, (y, norm, tangent) in enumerate(zip(candidates, norms, tangents, strict=True)):
        h = y if norm is None else norm.apply(y)
        terms = start[-1].norm() * h.norm() + (0 if tangent is None else adjoint.norm() * tangent.norm())
        assert abs(found[2][k].double() - exact[k]) <= 1e-6 * float(terms)


@pytest.mark.parametrize("read", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_mix_writes_a_slice_as_it_writes_an_image(shape, read):
    g = generator(3)
    candidates, tangents = ([image(g, *shape) for _ in range(5)] for _ in range(2))
    norms = [Normalizer(s, True) for s in torch_backend.statistics_of(candidates)]
    start, adjoint = (candidates, norms, torch.rand(5, generator=g)), image(g, *shape)
    _, sums, _ = native.mix_backward(*start, adjoint)

    def written(function, *arguments):
        slices = kernels.Slices(3)
        outputs = slices.outputs(1, candidates[0], read)
        parts = [slices.part(i, candidates[0]) for i in range(3)]
        for part in parts:
            part.fill_(7)
        result = function(*start, *arguments, outputs=outputs)
        assert (parts[0] == 7).all() and (parts[2] == 7).all()
        return result[0] if isinstance(result, tuple) else result, outputs[-1]

    output = native.mix_forward(*start)
    tangent, _ = native.mix_tangent_forward(*start, adjoint, sums, tangents)
    for found in written(native.mix_forward):
        assert torch.equal(found, output)
    for found in written(native.mix_tangent_forward, adjoint, sums, tangents):
        assert torch.equal(found, tangent)


@pytest.mark.parametrize("shape", [(2, 16, 6, 7), (2, 6, 5, 5), (1, 17, 8, 6), (3, 32, 4, 4)])
@pytest.mark.parametrize("stride", [1, 2])
def test_links_and_spread_in_a_mix(shape, stride):
    """A 1x1 convolution with its batch norm, and of that a mix of a dilated and a separable convolution with
    links, two pools and, spread or joined, a skip: the four sweeps, on one thread and on two, against the
    same without links by ATen in float64."""
    c, g = shape[1] // 2 * 2, generator(shape[1])
    x = image(g, shape[0], c, *(stride * size for size in shape[2:]))
    adjoint = image(g, shape[0], c, *shape[2:])
    shapes = [(c, 1, 3, 3), (c, 1, 5, 5), (c, 1, 3, 3), *[(c, c, 1, 1)] * 4, *[(c // 2, c, 1, 1)] * 2]
    weights, v = ([torch.randn(s, generator=g) for s in shapes] for _ in range(2))
    p = torch.rand(5, generator=g)

    def sweeps(module, x, p, adjoint, weights, v, joined):
        def links(count):
            return [kernels.Link() for _ in range(count)] if joined else []

        x, p, *weights = (t.detach().requires_grad_() for t in (x, p, *weights))
        with backends.using(module):
            one, of_first = links(1), links(2)
            (y,), (found,) = kernels.sepconv([x], [Task()], [None], weights[6:7], links=one)
            state = kernels.mix([y], [found], p.new_ones(1), True, one)
            spread = links(3 if stride == 1 else 2)
            if joined:
                (others,), of_pools, (for_convolutions, skip) = kernels.spread(state, stride, [spread], 2)
            else:
                for_convolutions, for_pools, skip = kernels.share(state, 3)
                *others, of_pools = kernels.pool(for_pools, stride)
                others = [*others, skip] if stride == 1 else others
            of_others = [*of_pools, *[None] * (len(others) - 2)]
            tasks = [Task(0, stride), Task(0, stride, 2)]
            y, found = kernels.sepconv([for_convolutions], tasks, weights[:2], weights[3:5], links=of_first)
            last = links(1)
            second, of_second = kernels.sepconv(
                y[1:], [Task()], weights[2:3], weights[5:6], found[1:], True, last, source_links=of_first[1:]
            )
            candidates, norms = [y[0], *second], [found[0], *of_second]
            given = [*of_first[:1], *last]
            if stride == 2:
                halves, of_halves = [Task(0, 2, 1, offset) for offset in (0, 1)], links(1)
                y, found = kernels.sepconv([skip], halves, [None] * 2, weights[7:], links=of_halves, join=2)
                candidates, norms, given = [*candidates, *y], [*norms, *found], [*given, *of_halves]
            o = kernels.mix([*others, *candidates], [*of_others, *norms], p, True, [*spread, *given])
            used = weights if stride == 2 else weights[:7]
            first = torch.autograd.grad(o, [*used, p, x], adjoint, create_graph=True)
            last = torch.autograd.grad(first[: len(used)], [p, x], v[: len(used)])
            return [t.detach() for t in (o, *first, *last)]

    given = x, p, adjoint, weights, v
    found, expected = sweeps(native, *given, True), sweeps(torch_backend, *wide(given), False)
    assert_agree(found, expected)
    threads = torch.get_num_threads()
    torch.set_num_threads(2 if threads == 1 else 1)
    try:
        again = sweeps(native, *given, True)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


def test_the_bytes_that_are_counted():
    """Of every sweep: each image once that it reads or writes."""
    g = generator()
    x, xd, other = (image(g, 2, 16, 8, 8) for _ in range(3))
    tasks, counted, expected = [Task(0, 1, 1), Task(0, 2, 1)], [], []
    d, p = [torch.randn(16, 1, 3, 3) for _ in tasks], [torch.randn(16, 16, 1, 1) for _ in tasks]
    start = [x], [None], tasks, d, p

    def moved(*images):
        expected.append(sum(t.numel() * t.element_size() for t in images))

    with native.observed(lambda name, size: counted.append(size)):
        y, _ = native.sepconv_forward(*start)
        moved(x, *y)
        found, *_ = native.sepconv_backward(*start, y, True)
        moved(x, *y, *found)
        yd, left = native.sepconv_tangent_forward(*start, y, [xd], d, p)
        moved(x, xd, *yd)
        found = native.sepconv_second(*start, yd, left)
        moved(x, xd, *y, *yd, *found)
        maximum, average, position, _ = native.pool_forward(x, 2)
        moved(x, maximum, average, position)
        moved(
            maximum, average, position, other, native.pool_backward(x, position, 2, maximum, average, [other])
        )
        moved(xd, position, *native.pool_tangent(xd, position, 2))
        mixed = [x, xd, x], [None] * 3, torch.ones(3)  # one image twice
        moved(x, xd, native.mix_forward(*mixed))
        adjoints, sums, _ = native.mix_backward(*mixed, other)
        moved(x, xd, other, *adjoints)
        output, left = native.mix_tangent_forward(*mixed, other, sums, [xd, None, x])
        moved(x, xd, other, output)
        seconds, _ = native.mix_second(*mixed, output, left)
        moved(x, xd, other, output, *seconds)
        reader = Reader(other, torch.ones(1, 3, 16), torch.ones(1), (0,))
        moved(x, other, *native.spread_backward([x], [None], [reader]))
    assert counted == expected


def test_nothing_of_a_step_is_kept():
    """What a tangent sweep left and no second sweep took holds the whole graph, if it is held."""

    def alive():
        gc.collect()
        return sum(type(found) is Handover for found in gc.get_objects())

    before = alive()  # of other tests
    network = Supernet(4, 10, 3, fused=True)
    weights, alphas = architect.leaves(network.weights()), architect.leaves(network.alphas())
    images, labels = torch.randn(2, 3, 8, 8), torch.tensor([1, 2])
    gradients = architect.gradients(network.loss(images, labels, weights, alphas), weights, create_graph=True)
    architect.exact_hvp(gradients, alphas, architect.detached(weights))
    del gradients
    assert alive() == before


def test_nan_is_not_hidden():
    (sources, norms, tasks, d, p), _ = arguments_of((2, 16, 6, 6), 1, False)
    sources[0][0, 0, 0, 0] = float("nan")
    outputs, statistics = native.sepconv_forward(sources, norms, tasks, d, p)
    assert all(y.isnan().any() for y, t in zip(outputs, tasks, strict=True) if t.source == 0)
    assert statistics[: len(KERNELS)].isnan().all() and not statistics[len(KERNELS) :].isnan().any()


def test_other_dtypes_and_memory_layouts():
    with pytest.raises(TypeError, match="float32 on the CPU, not torch.float64"):
        native.pool_forward(torch.zeros(1, 4, 4, 4, dtype=torch.float64), 1)
    x = torch.randn(2, 5, 6, 7, generator=generator())  # [N, C, H, W] in memory too
    assert_agree(native.pool_forward(x, 1)[0], torch_backend.pool_forward(x.double(), 1)[0])


def test_float32_on_the_cpu_is_native_and_nothing_else_is():
    assert backends.backend(torch.zeros(1)) is native
    assert kernels.used(torch.zeros(1)).startswith("native (C++, ")
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        assert backends.backend(torch.zeros(1, dtype=dtype)) is torch_backend


@pytest.mark.parametrize(
    "replaced, expected",
    [
        (("_path", lambda level: None), "was not built: no C++ compiler"),
        (("_digest", lambda: "other"), "was built of other sources than are here: install darts_fast again"),
    ],
    ids=["no library", "of other sources"],
)
def test_where_it_cannot_be_used_the_other_says_so(replaced, expected, monkeypatch):
    # sanitize.sh compiles without setup.py, which alone builds the digest in.
    if os.environ.get("DARTS_NATIVE_FOLDER") and replaced[0] == "_digest":
        pytest.skip("a build for the sanitizers, which is not compared with the sources")
    for function in (native.absence, native.level):
        monkeypatch.setattr(native, function.__name__, function.__wrapped__)
    monkeypatch.setattr(native, *replaced)
    assert backends.backend(torch.zeros(1)) is torch_backend
    assert kernels.used(torch.zeros(1)).startswith(f"torch (ATen; native is faster but {expected}")
    assert backends.available()["native"].startswith(expected)


@pytest.mark.parametrize("level", sorted(native.LEVELS))
def test_every_library_that_this_processor_runs(level, monkeypatch):
    """A small check of each; `test_sepconv` and the others are of the one that is used."""
    # A processor that lacks its instructions would end the process; arm64 builds the portable one only.
    if native._path(level) is None or level > native.level():
        pytest.skip(f"{native.LEVELS[level]} was not built, or this processor does not run it")
    library = native.library_of(level)
    monkeypatch.setattr(native, "_library", lambda: library)
    for shape in ((2, 16, 9, 11), (2, 5, 6, 7)):
        check_sepconv(*arguments_of(shape, 1, True))
        check_sepconv(*arguments_of(shape, 2, False))
        test_pool(shape, 2)
        test_mix(shape, 7, True)
