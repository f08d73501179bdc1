"""That a step can be captured as a CUDA graph, shown without one."""

import pytest
import torch
from conftest import same
from torch.utils._python_dispatch import TorchDispatchMode

from darts_fast.capture import Captured, leaving_no_trace
from darts_fast.config import SearchConfig
from darts_fast.kernels import torch_backend
from darts_fast.kernels.backends import using
from darts_fast.search import SearchStep
from darts_fast.supernet import Supernet

aten = torch.ops.aten
HOST_READS = {
    aten._local_scalar_dense,
    aten.is_nonzero,
    aten.item,
    aten.equal,
    aten.allclose,
    aten.nonzero,
    aten.masked_select,
    aten._unique,
    aten._unique2,
    aten.unique_dim,
    aten.unique_consecutive,
    aten.bincount,
    aten.histc,
    aten.lift_fresh,  # torch.tensor(a number): a copy from the host
}


class NothingFromTheHost(TorchDispatchMode):
    """Fails where a value is read by the host or comes from it, and where a shape depends on values."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket not in HOST_READS, f"{func} in a step that is to be captured"
        if func.overloadpacket in (aten.index, aten.index_put, aten.index_put_):
            assert all(i is None or i.dtype != torch.bool for i in args[1]), "a shape that depends on values"
        return func(*args, **(kwargs or {}))


def stepper(**settings):
    torch.manual_seed(0)
    config = SearchConfig(fused=True, **settings)
    return SearchStep(Supernet(4, 5, 3, fused=True), config)


def batches(seed, size=4):
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for half in ("train", "validation"):
        found[f"{half}_images"] = torch.randn(size, 3, 8, 8, generator=generator)
        found[f"{half}_labels"] = torch.randint(5, (size,), generator=generator)
    return found


SETTINGS = [
    {},
    {"amp_dtype": "bfloat16"},
    {"amp_dtype": "float16"},
    {"order": 1},
    {"hvp": "finite-difference"},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_step_reads_nothing_back(settings):
    step = stepper(**settings)
    with using(torch_backend), NothingFromTheHost():
        step.take(**batches(1))


def test_the_mode_sees_what_it_is_for():
    x = torch.ones(3)
    for read in (
        x.sum().item,
        lambda: x[x > 0],
        x.nonzero,
        lambda: bool(x[0] > 0),
        lambda: torch.tensor(1.0),
    ):
        with pytest.raises(AssertionError), NothingFromTheHost():
            read()


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_nothing_that_a_step_changes_moves(settings):
    step = stepper(**settings)
    tracked = [step.lr, step.network.flat_weights.grad, *(a.grad for a in step.alphas.values())]
    tracked += step.tensors()
    before = [t.data_ptr() for t in tracked]
    values = [t.clone() for t in step.tensors()]
    for seed in range(3):
        step.take(**batches(seed))
    after = [step.lr, step.network.flat_weights.grad, *(a.grad for a in step.alphas.values())]
    assert before == [t.data_ptr() for t in [*after, *step.tensors()]]
    # and `tensors` are all that changes: what is put back there, is put back
    with torch.no_grad():
        for tensor, value in zip(step.tensors(), values, strict=True):
            tensor.copy_(value)
    assert same(step.state_dict(), stepper(**settings).state_dict())


def test_calls_that_leave_no_trace():
    step, other = stepper(), stepper()
    leaving_no_trace(lambda: [step.take(**batches(1)) for _ in range(2)], step.tensors())
    for seed in (2, 3):
        assert torch.equal(step.take(**batches(seed)), other.take(**batches(seed)))
    assert same(step.state_dict(), other.state_dict())


def test_buffers_stay_and_each_call_sees_new_data():
    step, plain = stepper(), stepper()
    buffers = {name: torch.zeros_like(tensor) for name, tensor in batches(0).items()}
    seen = []

    def function(**inputs):
        seen.append({name: tensor.data_ptr() for name, tensor in inputs.items()})
        return step.take(**inputs)

    captured = Captured(function, buffers, step.tensors, graph=False)
    for seed in (1, 2, 3):
        assert torch.equal(captured(**batches(seed)), plain.take(**batches(seed)))
    assert all(addresses == {n: t.data_ptr() for n, t in buffers.items()} for addresses in seen)
    # a smaller batch is computed as it is, and the next large one from the buffers again
    for size in (2, 4):
        inputs = batches(4, size)
        assert torch.equal(captured(**inputs), plain.take(**inputs))
    assert seen[-1] == seen[0] != seen[-2]
    assert same(step.state_dict(), plain.state_dict())


# A graph is captured and replayed by the CUDA driver.
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_captured_and_uncaptured_give_the_same_bits(settings):
    plain, captured = stepper(**settings), stepper(**settings)
    plain, captured = (SearchStep(s.network.to("cuda"), s.config) for s in (plain, captured))
    buffers = {name: torch.zeros_like(tensor, device="cuda") for name, tensor in batches(0).items()}
    take = Captured(captured.take, buffers, captured.tensors, graph=True)
    for seed in range(4):
        inputs = {name: tensor.cuda() for name, tensor in batches(seed, 4 if seed != 2 else 2).items()}
        assert torch.equal(take(**inputs), plain.take(**inputs))
    assert same(captured.state_dict(), plain.state_dict())
