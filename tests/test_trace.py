"""What is read from a trace."""

import pytest

from darts_fast import profiling
from darts_fast.report import verdict
from darts_fast.trace import covered, read_trace, self_times


def event(cat, name, ts, dur, **args):
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "tid": 1, "args": args}


def test_a_view_reads_nothing():
    shape = {"Input type": ["float"], "Input Dims": [[4, 8]], "Input Strides": [[8, 1]]}
    events = [
        event("user_annotation", "step", 0, 100),
        event("user_annotation", "data", 0, 90),
        event("cpu_op", "aten::slice", 20, 5, **shape),
        event("cpu_op", "aten::neg", 30, 5, **shape),
        event("cpu_op", "_SepConv", 40, 5, **shape),
    ]
    found = {row.name: row.bytes for row in read_trace(events).operations}
    assert found == {"aten::slice": 0, "aten::neg": 128, "_SepConv": 128}


def test_a_kernel_belongs_to_the_phase_that_launched_it():
    shape = {"Input type": ["c10::Half", "Scalar"], "Input Dims": [[4, 8], []], "Input Strides": [[0, 1], []]}
    events = [
        event("user_annotation", "step", 0, 100),
        event("user_annotation", "data", 0, 10),
        event("user_annotation", "virtual step", 10, 60),
        event("cpu_op", "aten::mul", 20, 5, **{"External id": 7}, **shape),
        event("cuda_runtime", "cudaLaunchKernel", 21, 2, correlation=1),
        event("cuda_driver", "cuLaunchKernelEx", 80, 2, correlation=2),
        event("cuda_runtime", "cudaLaunchKernel", 120, 2, correlation=3),
        event("kernel", "mul", 75, 10, correlation=1, **{"External id": 7}),
        event("kernel", "mix", 90, 5, correlation=2),
        event("kernel", "later", 130, 5, correlation=3),
    ]
    found = read_trace(events)
    assert (found.device, found.steps, found.seconds) == ("cuda", 1, 100e-6)
    assert {row.name: row[1:] for row in found.phases} == {
        "data": (0, 0.0, 0),
        "virtual step": (1, pytest.approx(10e-6), 8 * 2),  # the expanded dimension counts once
        "rest of the step": (1, pytest.approx(5e-6), 0),
    }
    assert [row.name for row in found.operations] == ["mul", "mix"]
    assert found.busy == pytest.approx(15e-6)
    assert verdict(found, {"fused": False}, False).startswith(
        "Bound by launches: the GPU computes for only 15%"
    )


def replayed(kernels):
    """An uncaptured step of four kernels in two phases and a rest, then a step that replays `kernels`."""
    launches = [(21, 1), (22, 2), (45, 3), (55, 4)]
    return [
        event("user_annotation", profiling.UNCAPTURED, 0, 60),
        event("user_annotation", "virtual step", 20, 10),
        event("user_annotation", "weight update", 40, 10),
        *(event("cuda_runtime", "cudaLaunchKernel", ts, 1, correlation=c) for ts, c in launches),
        *(event("kernel", f"k{c}", ts + 2, 1, correlation=c) for ts, c in launches),
        event("user_annotation", "step", 100, 100),
        event("user_annotation", "data", 100, 10),
        event("cuda_runtime", "cudaGraphLaunch", 115, 2, correlation=9),
        *(event("kernel", name, ts, 5, correlation=9) for name, ts in kernels),
    ]


def test_the_phases_of_a_captured_step_are_those_of_the_uncaptured_one():
    # in the order of the device, whatever the order in the trace
    found = read_trace(replayed([("k4", 160), ("k1", 120), ("k3", 140), ("k2", 130)]))
    assert (found.steps, found.seconds) == (1, 100e-6)
    assert {row.name: (row.launches, row.seconds) for row in found.phases} == {
        "virtual step": (2, pytest.approx(10e-6)),
        "weight update": (1, pytest.approx(5e-6)),
        "data": (0, 0.0),
        "rest of the step": (1, pytest.approx(5e-6)),
    }
    assert found.host["virtual step"] == 0.0 and found.host["data"] == pytest.approx(10e-6)
    assert sum(row.launches for row in found.operations) == 4  # the uncaptured step's are not counted
    # Another number of kernels is not told apart.
    found = read_trace(replayed([("k1", 120), ("k2", 130)]))
    assert {row.name: row.launches for row in found.phases}["rest of the step"] == 2


def test_self_time_leaves_out_what_an_operation_calls():
    events = [event("cpu_op", n, t, d) for n, t, d in (("a", 0, 10), ("b", 1, 4), ("c", 2, 1), ("d", 20, 3))]
    assert {e["name"]: own for e, own in self_times(events)} == {"a": 6, "b": 3, "c": 1, "d": 3}
    assert covered([(0, 10), (2, 5), (8, 12), (20, 21)]) == 13
