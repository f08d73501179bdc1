"""The Triton kernels under the interpreter, against ATen in float64; allocations are poisoned with NaN.

On a machine with a GPU the same tests run there, see tests/gpu.
"""

import inspect

import numpy as np
import pytest
import torch
from conftest import relative_error

from darts_fast import architect, kernels
from darts_fast.kernels import Task, torch_backend
from darts_fast.kernels.backends import using
from darts_fast.kernels.torch_backend import Normalizer
from darts_fast.supernet import Supernet

# Triton is a dependency on Linux alone (setup.py).
triton = pytest.importorskip("triton", reason="Triton is installed on Linux only")

from triton.runtime import interpreter  # noqa: E402

from darts_fast.kernels import mix_triton, sepconv_triton, triton_backend  # noqa: E402
from darts_fast.kernels.triton_launch import observed  # noqa: E402

# A kernel is interpreted or compiled from its decoration on: one process cannot have both.
pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the interpreter is for machines without a GPU; tests/gpu runs there"
)

# Relative errors against ATen in float64. float32 by the project's rule; bfloat16 rounds each value at 2^-9,
# and both factors of a pointwise product.
BOUNDS = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 2e-2}
DTYPES = list(BOUNDS)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    def poison(allocate):
        def allocated(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            if tensor.device.type == "cpu":
                tensor.fill_(float("nan") if tensor.is_floating_point() else 99)
            return tensor

        return allocated

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))


@pytest.fixture(autouse=True)
def patched_once(monkeypatch):
    """The interpreter patches the language anew for every call of a device function: half of its time."""
    patch, scopes = interpreter._patch_lang, []

    def patch_once(function):
        if scopes and function.__globals__.get("tl") is triton.language:  # a device function of ours
            return scopes[0]
        scope = patch(function)
        if scope is not None and not scopes:  # Triton 3.5 patches for good
            restore = scope.restore
            scope.restore = lambda: (scopes.clear(), restore())
            scopes.append(scope)
        return scope

    monkeypatch.setattr(interpreter, "_patch_lang", patch_once)


def images(shape, dtype, seed):
    """Values that every dtype holds, so that both sides see the same."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()
    return x.to(dtype).contiguous(memory_format=torch.channels_last)


def weight(shape, dtype, seed):
    x = 0.3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return x.bfloat16().to(torch.promote_types(dtype, torch.float32))


def widened(tree):
    if isinstance(tree, torch.Tensor):
        return tree.double() if tree.is_floating_point() else tree
    if isinstance(tree, Normalizer):
        return Normalizer(widened(tree.statistics), tree.batch)
    if isinstance(tree, Task):
        return tree
    return type(tree)(widened(t) for t in tree) if isinstance(tree, (list, tuple)) else tree


def compare(found, expected, dtype):
    if isinstance(expected, (list, tuple)):
        assert len(found) == len(expected)
        for f, e in zip(found, expected, strict=True):
            compare(f, e, dtype)
    elif expected is None or found is None:  # a tangent that is zero may be either
        other = expected if found is None else found
        assert other is None or not other.any()
    else:
        assert found.shape == expected.shape
        assert relative_error(found, expected) <= BOUNDS[dtype]


def normalizer(y, batch):
    y = y.double()
    mean, variance = y.mean((0, 2, 3)), y.var((0, 2, 3), unbiased=False)
    rows = torch.stack([mean, variance, (variance + 1e-5).rsqrt()])
    return Normalizer(rows, batch)


def narrowed(norm, dtype):
    wide = torch.promote_types(dtype, torch.float32)
    return norm and Normalizer(norm.statistics.to(wide), norm.batch)


SEPCONV = {
    # name: source shape, sources, tasks (kernel or None, Task), outputs, normalised, batch statistics
    "all candidates": (
        (1, 4, 7, 10), 1, [(3, Task()), (5, Task()), (3, Task(dilation=2)), (5, Task(dilation=2))], 4, None
    ),
    "stride 2, odd": ((1, 5, 7, 9), 1, [(3, Task(stride=2)), (5, Task(0, 2, 2))], 6, None),
    "second halves": ((1, 6, 6, 5), 2, [(3, Task(0)), (5, Task(1))], 6, True),
    "evaluation": ((1, 6, 4, 5), 2, [(3, Task(0)), (5, Task(1))], 6, False),
    "preprocessing": ((2, 70, 3, 5), 1, [(None, Task())], 4, None),
    "factorized reduce": (
        (2, 6, 6, 4), 1, [(None, Task(stride=2)), (None, Task(stride=2, offset=1))], 3, None
    ),
}  # fmt: skip


def sepconv_case(name, dtype):
    shape, n_sources, tasks, k, batch = SEPCONV[name]
    kernels, tasks = zip(*tasks, strict=True)
    c = shape[1]
    sources = [images(shape, dtype, i) for i in range(n_sources)]
    norms = [None if batch is None else narrowed(normalizer(x, batch), dtype) for x in sources]
    d = [None if s is None else weight((c, 1, s, s), dtype, 10 + i) for i, s in enumerate(kernels)]
    p = [weight((k, c, 1, 1), dtype, 20 + i) for i in range(len(tasks))]
    stride = tasks[0].stride
    out = shape[0], k, -(-shape[2] // stride), -(-shape[3] // stride)
    adjoints = [images(out, dtype, 30 + i) for i in range(len(tasks))]
    return (sources, norms, list(tasks), d, p), adjoints


def last_sweeps_of_sepconv(arguments, adjoints, tangents, seconds):
    """yd of every task, and the second adjoint of every source."""
    yd, left = triton_backend.sepconv_tangent_forward(*arguments, adjoints, *tangents)
    return yd, triton_backend.sepconv_second(*arguments, seconds, left)


def expected_last_sweeps_of_sepconv(arguments, adjoints, tangents, seconds):
    yd, gained = torch_backend.sepconv_tangent(*arguments, adjoints, *tangents)
    seconds = [torch.zeros_like(y) if s is None else s for s, y in zip(seconds, adjoints, strict=True)]
    found, *_ = torch_backend.sepconv_backward(*arguments, seconds, False)
    return yd, [f if g is None else f + g for f, g in zip(found, gained, strict=True)]


def last_sweeps_of_mix(arguments, g, sums, tangents, second):
    """od, and the second adjoints of every candidate and of p."""
    od, left = triton_backend.mix_tangent_forward(*arguments, g, sums, tangents)
    return od, *triton_backend.mix_second(*arguments, second, left)


def expected_last_sweeps_of_mix(arguments, g, adjoints, sums, tangents, second):
    od, gained, p_gained = torch_backend.mix_tangent(*arguments, g, adjoints, sums, tangents)
    found, sums = torch_backend.mix_backward(*arguments, second)
    return od, [f if g is None else f + g for f, g in zip(found, gained, strict=True)], p_gained + sums.sum(1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SEPCONV)
def test_sepconv(name, dtype):
    arguments, adjoints = sepconv_case(name, dtype)
    sources, _, tasks, d, p = arguments
    found = triton_backend.sepconv_forward(*arguments)
    expected = torch_backend.sepconv_forward(*widened(arguments))
    compare(found, expected, dtype)
    for weights in (True, False):
        found = triton_backend.sepconv_backward(*arguments, adjoints, weights)
        expected = torch_backend.sepconv_backward(*widened(arguments), widened(adjoints), weights)
        compare(found, expected, dtype)
    tangents = (
        [images(x.shape, dtype, 40 + i) for i, x in enumerate(sources)],
        [None if x is None else weight(x.shape, dtype, 50 + i) for i, x in enumerate(d)],
        [weight(x.shape, dtype, 60 + i) for i, x in enumerate(p)],
    )
    seconds = [images(y.shape, dtype, 70 + i) for i, y in enumerate(adjoints)]
    compare(
        last_sweeps_of_sepconv(arguments, adjoints, tangents, seconds),
        expected_last_sweeps_of_sepconv(*widened((arguments, adjoints, tangents, seconds))),
        dtype,
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_joined_outputs_are_the_tasks_side_by_side(dtype):
    """Two factorized reduces in one call: the same bits as their halves apart."""
    arguments, _ = sepconv_case("factorized reduce", dtype)
    sources, norms, tasks, d, p = arguments
    twice = sources, norms, tasks * 2, d * 2, [weight(p[0].shape, dtype, 80 + i) for i in range(4)]

    def both(run):
        found, joined = run(*twice), run(*twice, join=2)
        return [torch.cat(found[0][i : i + 2], dim=1) for i in (0, 2)], joined[0], found[1], joined[1]

    apart, joined, statistics, joined_statistics = both(triton_backend.sepconv_forward)
    compare(joined, [y.double() for y in apart], torch.float64)
    for i, found in enumerate(joined_statistics):
        assert torch.equal(found, torch.cat(list(statistics[2 * i : 2 * i + 2]), dim=1))
    tangents = [images(x.shape, dtype, 40) for x in sources], [None] * 4, twice[4][::-1]

    def tangent(*arguments, join=1):
        return triton_backend.sepconv_tangent_forward(*arguments, [], *tangents, join=join)

    apart, joined, *_ = both(tangent)
    compare(joined, [y.double() for y in apart], torch.float64)


@pytest.mark.parametrize("kept", range(3))
def test_sepconv_tangents_may_be_zero(kept):
    arguments, adjoints = sepconv_case("second halves", torch.float64)
    sources, _, _, d, p = arguments
    tangents = [[images(x.shape, torch.float64, 40) for x in sources]]
    tangents += [[weight(x.shape, torch.float64, 50) for x in w] for w in (d, p)]
    tangents = [t if i == kept else [None] * len(t) for i, t in enumerate(tangents)]
    given = arguments, adjoints, tangents, [None, images(adjoints[1].shape, torch.float64, 70)]
    compare(last_sweeps_of_sepconv(*given), expected_last_sweeps_of_sepconv(*given), torch.float64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "stride"), [((1, 3, 5, 7), 1), ((2, 20, 5, 4), 2), ((3, 4, 6, 6), 2)])
def test_pool(shape, stride, dtype):
    x = images(shape, dtype, 0).relu()  # zeros: maxima with ties
    maximum, average, position, statistics = triton_backend.pool_forward(x, stride)
    expected = torch_backend.pool_forward(x.double(), stride)
    compare((maximum, average, statistics), (*expected[:2], expected[3]), dtype)
    adjoints = images(maximum.shape, dtype, 1), images(maximum.shape, dtype, 2)
    found = triton_backend.pool_backward(x, position, stride, *adjoints)
    compare(
        found,
        torch_backend.pool_backward(x.double(), expected[2], stride, *(a.double() for a in adjoints)),
        dtype,
    )
    xd = images(shape, dtype, 3)
    found = triton_backend.pool_tangent(xd, position, stride)
    compare(found, torch_backend.pool_tangent(xd.double(), expected[2], stride), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [True, False])
@pytest.mark.parametrize(("shape", "count"), [((1, 3, 5, 7), 1), ((2, 20, 7, 10), 5)])
def test_mix(shape, count, batch, dtype):
    candidates = [images(shape, dtype, i) for i in range(count)]
    norms = [None if i == 2 else narrowed(normalizer(y, batch), dtype) for i, y in enumerate(candidates)]
    p = weight((count,), dtype, 10)
    g = images(shape, dtype, 11)
    wide = widened((candidates, norms, p))
    compare(triton_backend.mix_forward(candidates, norms, p), torch_backend.mix_forward(*wide), dtype)
    adjoints, sums, p_gradient = triton_backend.mix_backward(candidates, norms, p, g)
    expected = torch_backend.mix_backward(*wide, g.double())
    compare((adjoints, sums), expected, dtype)
    compare(p_gradient, expected[1].sum(1), dtype)
    tangents = [None if i == 3 else images(shape, dtype, 20 + i) for i in range(count)]
    second = images(shape, dtype, 40)
    found = last_sweeps_of_mix((candidates, norms, p), g, sums, tangents, second)
    expected = expected_last_sweeps_of_mix(wide, *widened((g, *expected, tangents, second)))
    compare(found, expected, dtype)


def linked_case(shape, dtype):
    """x, the weights of three depthwise and four pointwise convolutions, p and the adjoint of the mix."""
    c = shape[1]
    shapes = [(c, 1, 3, 3), (c, 1, 5, 5), (c, 1, 3, 3), *[(c, c, 1, 1)] * 4]
    weights = [weight(s, dtype, 10 + i) for i, s in enumerate(shapes)]
    return images(shape, dtype, 0), weights, weight((5,), dtype, 20), images(shape, dtype, 21)


def linked_sweeps(module, x, weights, p, g, joined):
    """A 1x1 convolution with its batch norm, and of that a mix of a dilated and a separable convolution with
    links, two pools and a skip that are spread: all four sweeps; or the same without links and spread."""
    x, p, *weights = (t.detach().requires_grad_() for t in (x, p, *weights))
    with using(module):
        one = [kernels.Link()] if joined else ()
        (y,), (found,) = kernels.sepconv([x], [Task()], [None], weights[6:], links=one)
        state = kernels.mix([y], [found], p.new_ones(1), True, one)
        if joined:
            spread = [kernels.Link() for _ in range(3)]
            ((*others,),), statistics, (for_convolutions,) = kernels.spread(state, 1, [spread], 1)
        else:
            for_convolutions, for_pools, skip = kernels.share(state, 3)
            *pools, statistics = kernels.pool(for_pools, 1)
            others, spread = [*pools, skip], ()
        links = [kernels.Link(), kernels.Link()] if joined else ()
        tasks = [Task(), Task(dilation=2)]
        y, found = kernels.sepconv([for_convolutions], tasks, weights[:2], weights[3:5], links=links)
        halves, links = links[1:], [*links[:1], kernels.Link()] if joined else ()
        second, last = kernels.sepconv(
            y[1:], [Task()], weights[2:3], weights[5:6], found[1:], True, links[1:], source_links=halves
        )
        norms = [*statistics, None, found[0], *last]
        o = kernels.mix([*others, y[0], *second], norms, p, True, [*spread, *links])
        first = torch.autograd.grad(o, [*weights, p, x], g.to(x.dtype), create_graph=True)
        v = [(1 + w.detach()) / 8 for w in weights]
        return [o.detach(), *first, *torch.autograd.grad(first[: len(weights)], [p, x], v)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_linked_convolutions_and_spread_pools_in_a_mix(dtype):
    """Against the same without links and spread, by ATen in float64."""
    given = linked_case((2, 6, 5, 4), dtype)
    found = linked_sweeps(triton_backend, *given, True)
    expected = linked_sweeps(torch_backend, *widened(given), False)
    # A bfloat16 network rounds between its functions, too.
    bound = BOUNDS[dtype] * (3 if dtype == torch.bfloat16 else 1)
    errors = [relative_error(f, e) for f, e in zip(found, expected, strict=True)]
    assert max(errors) <= bound, errors


def concatenated_mixes(y, p, g, slices):
    """All sweeps of two nodes side by side, the second of which reads the first."""
    y, p = ([t.clone().requires_grad_() for t in group] for group in (y, p))
    g = g.clone().requires_grad_()
    statistics = [normalizer(t.detach(), True).statistics.to(p[0].dtype) for t in y]
    first_place, last_place = [kernels.Place(slices, i, i == 0) if slices else None for i in range(2)]
    first = kernels.mix(y[:2], statistics[:2], p[0], place=first_place)
    last = kernels.mix([first, y[2]], [None, statistics[2]], p[1], place=last_place)
    output = kernels.concatenate([first, last], slices)
    assert output.is_contiguous(memory_format=torch.channels_last)
    found = [output.detach()]
    for _ in range(2):  # over one graph: a pass leaves the next nothing
        adjoints = torch.autograd.grad(output, y, g, create_graph=True)
        tangents = [t.detach().flip(0) for t in y]
        found += [a.detach() for a in adjoints]
        found += torch.autograd.grad(adjoints, [g, *p, *y], tangents, retain_graph=True)
        # Of the last node alone: the first has no tangent.
        found += torch.autograd.grad(adjoints[2], g, tangents[2], retain_graph=True)
    return found


@pytest.mark.parametrize("dtype", DTYPES)
def test_mixes_write_the_slices_of_their_concatenation(dtype):
    y, g = [images((2, 3, 5, 4), dtype, i) for i in range(3)], images((2, 6, 5, 4), dtype, 20)
    p = [weight((2,), dtype, 10 + i) for i in range(2)]
    with using(triton_backend):
        found = concatenated_mixes(y, p, g, kernels.Slices(2))
    with using(torch_backend):
        expected = concatenated_mixes(widened(y), widened(p), widened(g), None)
    compare(found, expected, dtype)


def test_a_concatenation_moves_only_what_no_mix_wrote_there():
    y, one = images((2, 3, 5, 4), torch.float32, 1), torch.ones(1)
    other, slices = images((2, 3, 5, 4), torch.float32, 2), kernels.Slices(3)
    with using(triton_backend), torch.no_grad():
        kernels.mix([other], [None], one, place=kernels.Place(slices, 1, True))  # and is not what is given
        written = kernels.mix([y], [None], one, place=kernels.Place(slices, 2, False))
        found = kernels.concatenate([y, other, written], slices)
    assert written.data_ptr() == found[:, 6:].data_ptr()
    assert torch.equal(found, torch.cat([y, other, y], dim=1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_add(dtype):
    terms = [images((2, 20, 7, 10), dtype, i) for i in range(3)]
    compare(triton_backend.add(terms), sum(t.double() for t in terms), dtype)


@pytest.mark.parametrize("name", ["second halves", "preprocessing", "mix"])
def test_a_launch_touches_the_bytes_that_are_counted(name, monkeypatch):
    """Distinct addresses of every load and store of the interpreter, against `Launch.bytes`."""
    builder, touched = interpreter.InterpreterBuilder, []
    load, store = builder.create_masked_load, builder.create_masked_store

    def note(pointers, mask):
        size = pointers.get_element_ty().primitive_bitwidth // 8
        live = np.broadcast_to(mask.data, pointers.data.shape).astype(bool)
        touched[-1].update((address, size) for address in pointers.data[live].tolist())

    def noted_load(self, pointers, mask, *rest):
        note(pointers, mask)
        return load(self, pointers, mask, *rest)

    def noted_store(self, pointers, value, mask, *rest):
        note(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    monkeypatch.setattr(builder, "create_masked_load", noted_load)
    monkeypatch.setattr(builder, "create_masked_store", noted_store)
    launches = []
    with observed(lambda planned: (launches.append(planned), touched.append(set()))):
        if name == "mix":
            candidates = [images((2, 16, 4, 8), torch.float32, i) for i in range(4)]
            norms = [normalizer(y, True) if i else None for i, y in enumerate(candidates)]
            norms = [narrowed(norm, torch.float32) for norm in norms]
            p, g = weight((4,), torch.float32, 10), images((2, 16, 4, 8), torch.float32, 11)
            adjoints, sums, _ = triton_backend.mix_backward(candidates, norms, p, g)
            last_sweeps_of_mix((candidates, norms, p), g, sums, adjoints, adjoints[0])
        else:
            arguments, adjoints = sepconv_case(name, torch.float32)
            triton_backend.sepconv_forward(*arguments)
            triton_backend.sepconv_backward(*arguments, adjoints, False)
            last_sweeps_of_sepconv(arguments, adjoints, [arguments[i] for i in (0, 3, 4)], adjoints)
    assert len(launches) >= 4
    for planned, addresses in zip(launches, touched, strict=True):
        counted, found = planned.bytes(), sum(size for _, size in addresses)
        # The variances [C] that lie between means and reciprocal deviations are not read.
        assert found <= counted <= 1.1 * found, (planned.kernel.fn.__name__, counted, found)


def test_a_single_value_a_channel_is_refused():
    with pytest.raises(ValueError, match="single value"):
        triton_backend.pool_forward(images((1, 3, 1, 1), torch.float32, 0), 1)


def test_statistics_far_from_zero_keep_their_variance():
    """E[x^2] - mean^2 would lose 12 % here."""
    x = 1000.0 + images((2, 4, 6, 6), torch.float32, 0)
    *_, statistics = triton_backend.pool_forward(x, 1)
    compare(statistics, torch_backend.pool_forward(x.double(), 1)[3], torch.float32)


def test_nan_stays():
    x = images((1, 4, 4, 4), torch.float32, 0)
    x[0, 1, 2, 2] = float("nan")
    y, _ = triton_backend.sepconv_forward(
        [x], [None], [Task()], [weight((4, 1, 3, 3), x.dtype, 1)], [weight((4, 4, 1, 1), x.dtype, 2)]
    )
    assert y[0][0, :, 1:, 1:].isnan().all()
    assert triton_backend.pool_forward(x, 1)[0][0, 1, 1:, 1:].isnan().all()


def test_hessian_vector_product_of_a_supernet(monkeypatch):
    """The fused supernet on the interpreter against the reference and generic automatic differentiation."""
    # Most of the interpreter's time goes to checks of integer overflow and to the selects of `pick`, which
    # the tests above have.
    monkeypatch.setitem(vars(interpreter.interpreter_builder.options), "sanitize_overflow", False)
    for module in (mix_triton, sepconv_triton):
        monkeypatch.setattr(module, "pick", lambda values, i: values[int(i.handle.data.item())])
    torch.manual_seed(0)
    reference = Supernet(2, 3, 3).double()
    fused = Supernet(2, 3, 3, fused=True).double()
    fused.load_state_dict(reference.state_dict())
    images, labels = torch.randn(2, 3, 4, 4, dtype=torch.float64), torch.tensor([0, 2])
    v = {name: torch.randn_like(w) for name, w in reference.weights().items()}

    def product(network):
        with network.frozen_statistics():
            weights, alphas = architect.leaves(network.weights()), architect.leaves(network.alphas())
            loss = network.loss(images, labels, weights, alphas)
            gradients = architect.gradients(loss, weights, create_graph=True)
            return loss, architect.detached(gradients), architect.exact_hvp(gradients, alphas, v)

    expected = product(reference)
    with using(triton_backend):
        found = product(fused)
    assert relative_error(found[0], expected[0]) <= 1e-9
    for f, e in zip(found[1:], expected[1:], strict=True):
        assert set(f) == set(e)
        for name in f:
            assert relative_error(f[name], e[name]) <= 1e-9, name


def test_what_the_sanitizer_runs_captures_nothing():
    """On a GPU, without the allocator's cache, which a capture needs (tests/gpu)."""
    from gpu.test_triton_gpu import SANITIZED

    assert SANITIZED and not any("CUDAGraph" in inspect.getsource(test) for test in SANITIZED)
