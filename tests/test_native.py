"""The C++ kernels: what is theirs alone. Their functions against the equations: test_kernels.py."""

import gc
import os
import re
from ctypes import c_int64
from pathlib import Path

import pytest
import sweeps
import torch
from test_kernels import poisoned  # noqa: F401  (a fixture)

from darts_fast import kernels
from darts_fast.kernels import aten, backends, native, types
from darts_fast.kernels.native import library, table
from darts_fast.kernels.types import Call, Reader, Source, Task, Weights

# Without a compiler the install succeeds, and ATen computes instead: there is no C++ to test. Any other
# absence fails in test_kernels.py.
pytestmark = pytest.mark.skipif(native.level() is None, reason=f"the C++ library {native.absence()}")

HALVES = sweeps.Kind(3), sweeps.Kind(5, 2)
# Of 4 MB, from which on what is written goes past the caches (STREAMED in sepconv.cpp); with 20 channels,
# which fill no register, it does not after all.
LARGE_CASES = {
    "large, as they are": sweeps.Sepconv((22, 16, 32, 32), HALVES),
    "large, batch norm": sweeps.Sepconv((8, 48, 27, 35), HALVES, norm="batch", sliced=True),
    "large, odd channels": sweeps.Sepconv((20, 20, 31, 30), HALVES, norm="batch"),
    "large, joined": sweeps.Sepconv((14, 16, 64, 64), sweeps.PAIR, 2, joined=2, sliced=True),
}


# Factorized convolutions are ATen's, whose sums are cut by the number of threads.
OWN_CASES = [name for name in sweeps.CASES if not name.startswith("factorized convolution")]


@pytest.mark.parametrize("name", [*OWN_CASES, *LARGE_CASES])
def test_the_bits_do_not_depend_on_the_number_of_threads(name, monkeypatch):
    """The results of one thread are right; those of others are the same."""
    monkeypatch.setattr(native, "threads", torch.get_num_threads)  # whatever a quota says
    case, threads, written = (sweeps.CASES | LARGE_CASES)[name], torch.get_num_threads(), []
    if name in LARGE_CASES:
        outputs = len(case.kinds) * case.shape[0] * case.shape[1] * case.shape[2] * case.shape[3]
        assert torch.Size(case.shape).numel() + outputs // case.stride**2 >= 1 << 20
    try:
        for count in (1, 3) if name in LARGE_CASES else (1, 2, 3, 7):
            torch.set_num_threads(count)
            written.append(sweeps.check(native, torch.float32, case))
    finally:
        torch.set_num_threads(threads)
    for others in written[1:]:
        assert all(sweeps.same_bits(a, b) for a, b in zip(written[0], others, strict=True))


@pytest.mark.parametrize("level", sorted(native.LEVELS))
def test_every_library_that_this_processor_runs(level, monkeypatch):
    """test_kernels.py is about the one that is used."""
    # A processor that lacks its instructions would end the process; arm64 builds the portable one only.
    if library._path(level) is None or level > native.level():
        pytest.skip(f"{native.LEVELS[level]} was not built, or this processor does not run it")
    chosen = native.library_of(level)
    monkeypatch.setattr(native, "loaded", lambda: chosen)
    for case in sweeps.CASES.values():
        sweeps.check(native, torch.float32, case)
    for shape in ((2, 16, 9, 11), (2, 17, 6, 7)):
        sweeps.check(native, torch.float32, sweeps.Sepconv(shape, sweeps.ALL_KINDS, 2, norm="batch"))
        sweeps.check(native, torch.float32, sweeps.Mix(shape, (True, False, *[True] * 5), "is"))
        sweeps.check(native, torch.float32, sweeps.Pool(shape, 1, terms=2))


# Tables


def test_structures_are_those_of_the_header():
    header = Path(native.__file__).with_name("tables.h")
    # Tests of an installed wheel: the header is a source, of which a wheel has none.
    if not header.exists():
        pytest.skip("a wheel, which has no sources")
    text = re.sub(r"//.*", "", header.read_text())
    declared = {}
    for name, body in re.findall(r"struct (\w+) \{(.*?)\n\};", text, re.DOTALL):
        body = re.sub(r"\w+\* row\(.*", "", body)  # a function
        body = body.replace("(*function)(const void* call, Team& team)", "function")
        fields = [re.findall(r"(\w+)(?:,|$)", line.strip()) for line in body.split(";")]
        declared[name] = [field for of_line in fields for field in of_line]
    assert declared == {structure.__name__: list(structure._fields) for structure in table.STRUCTURES}


def test_a_library_of_other_structures_is_refused(monkeypatch):
    class Sum(table.NamedTuple):
        terms: int = 0

    assert table.size_of(table.Sum) == 5 * 8 and table.size_of(table.Matrix) == 16
    monkeypatch.setattr(library, "STRUCTURES", (*table.STRUCTURES, Sum))
    with pytest.raises(RuntimeError, match="tables.h and table.py disagree about Sum"):
        native.library_of(native.level())


def images(*shape):
    return types.images(1, shape, torch.float32)[0]


def additions(count):
    """Calls that add up in order, and the sum: each reads what the one before wrote."""
    terms = [images(2, 5, 3, 4).normal_() for _ in range(count + 1)]
    outs = [images(2, 5, 3, 4) for _ in range(count)]
    calls = [
        Call("add", {"terms": (a, b)}, {"out": out})
        for a, b, out in zip([terms[0], *outs], terms[1:], outs, strict=False)
    ]
    return calls, outs[-1], sum(terms)


def test_a_program_is_one_call_of_cpp(monkeypatch):
    calls, out, expected = additions(5)
    made, sweep = [], native.loaded().darts_sweep

    def counted(records, count, threads):
        made.append((count, threads))
        sweep(records, c_int64(count), threads)

    monkeypatch.setattr(native.loaded(), "darts_sweep", counted)
    run = native.program(calls)
    assert not made
    run()
    assert made == [(5, torch.get_num_threads())]
    assert torch.allclose(out, expected, atol=1e-6)


def test_a_program_keeps_its_tensors_and_runs_as_often_as_it_is_called():
    calls, out, expected = additions(3)
    run = native.program(calls)
    del calls
    gc.collect()
    overwrite = [images(2, 5, 3, 4).fill_(7) for _ in range(20)]  # of memory that was freed, if it was
    for _ in range(2):
        out.zero_()
        run()
        assert torch.allclose(out, expected, atol=1e-6)
    assert all((t == 7).all() for t in overwrite)


def test_tensors_that_are_not_taken():
    x = images(2, 6, 4, 5)
    statistics, position = torch.empty(2, 3, 6), types.images(1, x.shape, torch.uint8)[0]
    written = {
        "pools": types.images(2, x.shape, torch.float32),
        "position": position,
        "statistics": statistics,
    }
    native.pool_forward(x, 1, **written)
    with pytest.raises(TypeError, match="float32, not torch.float64"):
        native.pool_forward(x.double(), 1, **written)
    with pytest.raises(ValueError, match="not those of channels-last memory"):
        native.pool_forward(x.contiguous(), 1, **written)
    with pytest.raises(ValueError, match="a slice of channels"):
        native.pool_forward(images(2, 8, 4, 5)[:, :6], 1, **written)
    with pytest.raises(ValueError, match="not those of contiguous memory"):
        native.pool_forward(x, 1, **written | {"position": position.contiguous()})
    with pytest.raises(ValueError, match="not those of contiguous memory"):
        native.pool_forward(x, 1, **written | {"statistics": torch.empty(2, 6, 3).mT})
    with pytest.raises(ValueError, match="the channels of a row are apart"):
        native.norm_forward([Source(x, torch.empty(6, 3).t())], out=x[None])
    with pytest.raises(TypeError, match="on the CPU, not on meta"):
        native.program([Call("add", {"terms": (x, x)}, {"out": x.to("meta")})])


def test_a_dimension_of_one_value_may_have_any_stride():
    for shape in ((1, 5, 1, 1), (3, 5, 1, 1), (1, 5, 4, 1), (1, 5, 1, 4), (2, 1, 3, 4)):
        whole = images(shape[0], shape[1] + 2, *shape[2:])
        part = whole[:, 1 : 1 + shape[1]]
        odd = part.as_strided(
            shape, [s if n > 1 else 1234 for n, s in zip(shape, part.stride(), strict=True)]
        )
        out = images(*shape)
        whole.normal_()
        native.program([Call("add", {"terms": (odd, part)}, {"out": out})])()
        assert torch.equal(out, 2 * part)


def counted(launches):
    return [launch.bytes for launch in launches]


def size(*tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


def test_the_bytes_that_are_counted():
    """Each tensor once that is read or written; a y that is not normalised is not read."""
    x, g, out = (images(2, 16, 8, 8) for _ in range(3))
    (y,), statistics = types.images(1, (2, 16, 4, 4), torch.float32), torch.empty(1, 3, 16)
    adjoint, sums = images(2, 16, 4, 4), torch.empty(2, 1, 16)
    task = Task(0, Weights(torch.empty(16, 1, 3, 3), torch.empty(16, 16, 1, 1)), 2)

    found = native.sepconv_forward([Source(x)], [task, task], y=torch.stack([y, y]), statistics=None)
    assert counted(found) == [size(x, y, y, *task.weights)]
    written = {"adjoint": out[None], "sums": None, "gradients": None}
    reader = Reader(y, statistics[0], 0, adjoint, sums, None)
    found = native.sepconv_backward([Source(x)], [task], [reader], [()], **written)
    assert counted(found) == [size(x, y, statistics, adjoint, sums, out, *task.weights)]
    reader = Reader(y, None, 0, adjoint, None, None)
    found = native.sepconv_backward([Source(x)], [task], [reader], [()], **written)
    assert counted(found) == [size(x, adjoint, out, *task.weights)]
    weights, read = torch.empty(2), [Source(x), Source(x)]
    assert counted(native.mix_forward(read, weights, outs=[out])) == [size(x, weights, out)]
    readers = [[Reader(x, None, 1, g, None, weights)] * 2]
    assert counted(native.fan_out_backward([Source(x)], readers, out=out[None])) == [size(g, weights, out)]
    found = native.norm_backward([Source(x)] * 2, [g, out], sums=torch.empty(2, 2, 16))
    assert counted(found) == [size(x, g) + 2 * 16 * 4] * 2


def test_the_bytes_that_are_counted_in_the_tangent_sweep():
    """Sums of a tangent read y, normalised or not; a mix reads y where it is, and its adjoint where not."""
    x, xd = types.images(2, (2, 16, 8, 8), torch.float32)
    y, g, out, *yd = tangents = types.images(5, (2, 16, 4, 4), torch.float32)
    statistics, sums, products, p = (torch.empty(*shape) for shape in ((3, 16), (3, 2, 16), (2, 16), (2,)))
    weights, reader = Weights(None, torch.empty(16, 16, 1, 1)), Reader(y, None, 0, g, None, p)
    reads = [Source(x)], [Task(0, weights, 2)], [xd], None, [weights], [reader]
    found = native.sepconv_tangent(*reads, y=out[None], sums=[sums[:, 0]])
    assert counted(found) == [size(x, xd, weights.pointwise, y, g, out, sums[:, 0])]
    position = types.images(1, y.shape, torch.uint8)[0]
    readers = [], [reader._replace(statistics=statistics)] * 2
    found = native.pool_tangent(xd, position, 2, readers, pools=tangents[3:], sums=([], sums.unbind(1)))
    assert counted(found) == [size(xd, position, y, statistics, g, *yd, sums)]
    for source, read in ((Source(y), (g, products)), (Source(y, statistics), (y, statistics))):
        found = native.mix_tangent([source, source], p, yd, sums, g, outs=[out], products=products)
        assert counted(found) == [size(*yd, sums, p, out, *read)]


# Which backend computes


def test_float32_on_the_cpu_is_native_and_nothing_else_is():
    cpu = torch.device("cpu")
    assert kernels.backend(cpu, torch.float32) is native
    assert kernels.used(cpu, torch.float32).startswith("native (C++, ")
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        assert kernels.backend(cpu, dtype) is aten


@pytest.fixture
def uncached(monkeypatch):
    """What the machine has is found anew."""
    for function in (library.absence, library.level):
        for module in (native, library):
            monkeypatch.setattr(module, function.__name__, function.__wrapped__)


@pytest.mark.parametrize("key", sorted(native.LEVELS))
def test_the_environment_names_the_highest_level(key, uncached, monkeypatch):
    # setup.py builds the higher levels on x86-64 alone, with a compiler that knows them: what is not there
    # cannot be chosen.
    if library._path(key) is None:
        pytest.skip(f"{native.LEVELS[key]} was not built")
    before = native.level()
    monkeypatch.setenv("DARTS_NATIVE_LEVEL", native.LEVELS[key])
    assert native.level() == min(key, before)
    monkeypatch.setenv("DARTS_NATIVE_LEVEL", "v3")
    assert native.level() is None
    expected = "DARTS_NATIVE_LEVEL is 'v3', which is none of x86-64-v4, x86-64-v3, portable"
    assert expected in kernels.used(torch.device("cpu"), torch.float32)


@pytest.mark.parametrize(
    "replaced, expected",
    [
        (("_path", lambda level: None), "was not built: no C++ compiler"),
        (("_digest", lambda: "other"), "was built of other sources than are here: install darts_fast again"),
    ],
    ids=["no library", "of other sources"],
)
def test_where_it_cannot_be_used_the_other_says_so(replaced, expected, uncached, monkeypatch):
    # sanitize.sh compiles without setup.py, which alone builds the digest in.
    if os.environ.get("DARTS_NATIVE_FOLDER") and replaced[0] == "_digest":
        pytest.skip("a build for the sanitizers, which is not compared with the sources")
    monkeypatch.setattr(library, *replaced)
    where = torch.device("cpu"), torch.float32
    assert kernels.backend(*where) is aten
    assert kernels.used(*where).startswith(f"aten (native is faster but {expected}")
    assert backends.available()["native"].startswith(expected)
