"""Where the buffers of sweeps are placed, and the memory that they are placed in."""

import gc
from itertools import combinations

import pytest
import torch
from test_cell import everything, network

from darts_fast.kernels import aten
from darts_fast.kernels.cell import Sweeps
from darts_fast.kernels.network import Plan
from darts_fast.kernels.plan import Binding, Blocks, Lease, Place, Recorder, place
from darts_fast.kernels.types import launches, tensors


def sum_of(recorder, *terms):
    out = torch.empty(1000, device="meta")
    recorder.add(terms, out=out)
    return out


def key(t):
    return t.untyped_storage()._cdata


def test_a_sweep_reuses_what_is_no_longer_read():
    k, a, b = Recorder(), *(torch.empty(1000, device="meta") for _ in range(2))
    c = sum_of(k, a, b)
    d = sum_of(k, a, c)  # the last to read a and c
    e = sum_of(k, b, d)
    layout = place(["only"], [k.calls], [[a, b]], [[e]])
    offsets = {name: layout.places[key(t)].offset for name, t in zip("abcde", (a, b, c, d, e), strict=True)}
    assert len({offsets[name] for name in "abcd"}) == 4
    assert offsets["e"] in (offsets["a"], offsets["c"])
    assert layout.sizes == {"only kept": 0, "only scratch": 4 * 4096}


def test_what_a_later_sweep_reads_is_kept():
    first, second = Recorder(), Recorder()
    a = torch.empty(1000, device="meta")
    b = sum_of(first, a, a)
    c = sum_of(first, a, b)
    d = sum_of(second, b, b)
    layout = place(["first", "second"], [first.calls, second.calls], [[a], []], [[c], [d]])
    assert layout.places[key(b)] == Place("first kept", 0)
    assert [layout.places[key(t)].block for t in (a, c, d)] == ["first scratch"] * 2 + ["second scratch"]


def test_reading_what_nothing_wrote_raises():
    k, a = Recorder(), torch.empty(1000, device="meta")
    sum_of(k, a, a)
    with pytest.raises(RuntimeError, match="add reads a tensor that nothing has written"):
        place(["only"], [k.calls], [[]], [[]])


@pytest.fixture(scope="module")
def plan():
    book, data = network(3, everything, True)
    blocks = Blocks(torch.device("cpu"))
    return Plan(data, [(2, 5, 8, 8)], torch.float64, book.size, book.channels, 2, blocks, aten)


def test_buffers_that_are_alive_together_do_not_overlap(plan):
    """In every layout of a network, by a second reckoning: what is written stays until it is read last."""
    for name, layout in plan.layouts.items():
        sweeps = list(plan.sweeps.calls.items())[: 4 if name == "exact" else 2]
        events = [(sweep, call) for sweep, calls in sweeps for call in calls]
        lives = {}
        for i, (_, call) in enumerate(events):
            for t in tensors([call.reads, call.writes]):
                first, _, size = lives.get(key(t), (i, i, t.untyped_storage().nbytes()))
                lives[key(t)] = first, i, size
        by_block = {}
        for storage, life in lives.items():
            at = layout.places[storage]
            assert at.offset + life[2] <= layout.sizes[at.block]
            by_block.setdefault(at.block, []).append((at.offset, *life))
        for buffers in by_block.values():
            for a, b in combinations(buffers, 2):
                apart = a[0] + a[3] <= b[0] or b[0] + b[3] <= a[0]
                assert apart or a[2] < b[1] or b[2] < a[1]


def test_a_binding_is_the_same_views_of_real_memory(plan):
    layout = plan.layouts["exact"]
    blocks = {name: torch.zeros(size, dtype=torch.uint8) for name, size in layout.sizes.items()}
    bound = Binding(layout, blocks)
    for call in plan.sweeps.calls["second"]:
        for meta, real in zip(
            tensors([call.reads, call.writes]), tensors(bound([call.reads, call.writes])), strict=True
        ):
            assert (real.shape, real.stride(), real.dtype) == (meta.shape, meta.stride(), meta.dtype)
            at = layout.places[key(meta)]
            expected = at.offset + meta.storage_offset() * meta.element_size()
            assert real.data_ptr() - blocks[at.block].data_ptr() == expected


def test_a_binding_of_tensors_that_live_for_the_call_alone():
    """Python gives the second the id that the first had."""
    k, a = Recorder(), torch.empty(2, 1000, device="meta")
    b = sum_of(k, a, a)
    layout = place(["only"], [k.calls], [[a]], [[b]])
    blocks = {name: torch.zeros(size, dtype=torch.uint8) for name, size in layout.sizes.items()}
    bound, start = Binding(layout, blocks), layout.number(a)[1]
    assert [bound(a[i]).storage_offset() - start for i in range(2)] == [0, 1000]


def test_blocks_are_used_again():
    blocks = Blocks(torch.device("cpu"))
    small, large = Lease(blocks, 100), Lease(blocks, 1000)
    addresses = small.block.data_ptr(), large.block.data_ptr()
    del small, large
    gc.collect()
    # The smallest that is large enough; where none is left, a new one.
    again = [Lease(blocks, size) for size in (500, 50, 10)]
    assert [lease.block.data_ptr() for lease in again[:2]] == [addresses[1], addresses[0]]
    assert again[2].block.data_ptr() not in addresses


def test_launches_are_counted_without_running():
    book, data = network(1, everything, False)
    sweeps = Sweeps(data, [(2, 5, 8, 8)], torch.float32, book.size, book.channels, 2)
    found = list(launches(aten, sweeps.calls["forward"]))
    assert [launch.name for launch in found] == [call.function for call in sweeps.calls["forward"]]
    pool = next(launch for launch in found if launch.name == "pool_forward")
    image = 2 * 4 * 8 * 8  # numbers; the state is read, two pools, their positions and statistics written
    assert pool.bytes == 4 * 3 * image + image + 4 * 2 * 3 * 4
