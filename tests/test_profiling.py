"""Profile reports: what is read from a trace, what is concluded, and a page that stands alone."""

import gzip
import json
import re
import shutil
import subprocess

import pytest
import torch
from conftest import checkpoint, same

from darts_fast import SearchConfig, TrainConfig, profiling, search, train
from darts_fast.profiling import Profile, Row, covered, read_trace, self_times, verdict

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SECOND_ORDER = ["data", "virtual step", "validation pass", "hessian-vector product", "architecture update"]


pytestmark = pytest.mark.usefixtures("no_heat_maps")


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (40, 1, 8, 8), dtype=torch.uint8, generator=generator)
    return images, torch.randint(10, (40,), generator=generator)


def small(**settings):
    return SearchConfig(
        init_channels=2, layers=3, epochs=1, batch_size=4, fused=True, device="cpu", **settings
    )


def test_a_profiled_search_is_the_same_search(in_tmp, data):
    paths = [search(small(name=f"n{steps}", profile=steps), data).path for steps in (0, 2)]
    assert same(*(checkpoint(path)["network"] for path in paths))
    assert not (paths[0] / "profile").exists()
    folder = paths[1] / "profile"
    events = json.loads(gzip.open(folder / "trace.json.gz").read())["traceEvents"]
    found = read_trace(events)
    assert found.steps == 2
    assert [*found.host] == [*SECOND_ORDER, "weight update", "rest of the step"]
    assert sum(found.host.values()) == pytest.approx(found.seconds)
    assert found.host["rest of the step"] < 0.3 * found.seconds
    assert 0 < found.busy <= found.seconds
    # Backward passes run on the thread that asks, and belong to the phase under way.
    launches = {row.name: row.launches for row in found.phases}
    assert launches["virtual step"] > launches["validation pass"] / 2 > 100
    assert found.memory and max(size for _, size in found.memory) > 0
    log = next(paths[1].glob("*.log")).read_text()
    assert "Profile of 2 steps: " in log and "Bound by " in log
    report = (folder / "report.md").read_text()
    assert "| hessian-vector product |" in report and "copy rate" in report


def test_a_profiled_training(in_tmp, data):
    config = TrainConfig(
        genotype="DARTS_V2", init_channels=4, layers=3, epochs=1, batch_size=8, profile=9, device="cpu"
    )
    path = train(config, (*data, *data)).path  # of five steps, three warm up
    assert "recorded: 2 steps" in (path / "profile" / "report.md").read_text()
    for phase in ("data", "forward", "backward", "weight update"):
        assert f"| {phase} |" in (path / "profile" / "report.md").read_text()


def test_a_run_too_short_to_profile_says_so(in_tmp, data):
    config = SearchConfig(
        init_channels=2, layers=3, epochs=1, batch_size=20, fused=True, device="cpu", profile=1
    )
    path = search(config, data).path
    assert "no profile: the run has no step after the first 3" in next(path.glob("*.log")).read_text()
    assert not (path / "profile").exists()


def test_nothing_is_recorded_outside_a_profile():
    with torch.profiler.profile() as recorded, profiling.phase("data"):
        torch.ones(1)
    assert "data" not in {event.key for event in recorded.key_averages()}


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


def test_an_uncaptured_step_is_recorded_beside_a_captured_one():
    calls = []

    def trial(use):
        use(lambda: calls.append("uncaptured"))

    profiler = profiling.Profiler(2, torch.device("cpu"), trial)
    for _ in range(profiling.WARM_UP + 2):
        with profiler.step():
            calls.append("step")
            torch.ones(1)
    assert calls == ["step"] * profiling.WARM_UP + ["uncaptured"] + ["step"] * 2
    names = {event.key: event.count for event in profiler._profile.key_averages()}
    assert (names[profiling.UNCAPTURED], names["step"]) == (1, 2)


def test_self_time_leaves_out_what_an_operation_calls():
    events = [event("cpu_op", n, t, d) for n, t, d in (("a", 0, 10), ("b", 1, 4), ("c", 2, 1), ("d", 20, 3))]
    assert {e["name"]: own for e, own in self_times(events)} == {"a": 6, "b": 3, "c": 1, "d": 3}
    assert covered([(0, 10), (2, 5), (8, 12), (20, 21)]) == 13


def profile_of(operations, busy=0.9, device="cuda", data=0.0):
    return Profile(device, 1, 1.0, busy, [], {"data": data}, operations, [])


@pytest.mark.parametrize(
    ("profile", "settings", "words"),
    [
        (profile_of([], data=0.5), {}, "Bound by the data"),
        (profile_of([], 0.2), {"fused": True, "no_graph": True}, "leave out --no_graph"),
        (profile_of([], 0.2, "cpu"), {}, "Bound by dispatch"),
        (profile_of([Row("sepconv_forward", 9, 0.9, 0)]), {}, "Bound by arithmetic"),
        (profile_of([Row("conv2d", 9000, 0.9, 9000 * 60_000)], 0.9, "cpu"), {}, "Bound by dispatch"),
        (profile_of([Row("conv2d", 9000, 0.9, 9000 * 70_000)], 0.9, "cpu"), {}, "Bound by arithmetic"),
        (profile_of([Row("sepconv_fwd_kernel", 9, 0.9, 0)]), {"fused": True}, "move more than they multiply"),
        (profile_of([Row("mix", 9, 0.9, 0)]), {"fused": True, "hvp": "exact"}, "--amp halves"),
        (profile_of([Row("mix", 9, 0.9, 0)]), {"fused": False}, "Bound by memory traffic"),
        (profile_of([Row("mix", 9, 0.9, 0)]), {"fused": True, "amp": True, "hvp": "exact"}, "every flag"),
    ],
)
def test_the_verdict(profile, settings, words):
    found = verdict(profile, settings, captured=False)
    assert words in found and found.count(". ") == 0


def opened(page, tmp_path):
    """The document, what the browser complained of, and the addresses it asked the network for."""
    netlog = tmp_path / "net.json"
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'p'}"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += ["--no-first-run", f"--log-net-log={netlog}", "--net-log-capture-mode=Everything"]
    command += ["--enable-logging=stderr", "--v=0", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    complaints = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    # The browser has requests of its own, which are not in the name of a file's page.
    asked = [line for line in netlog.read_text().splitlines() if '"network_isolation_key":"file:' in line]
    return done.stdout, complaints, [re.search(r'"url":"([^"]+)"', line).group(1) for line in asked]


# Only a browser tells whether a page has errors; it is no dependency of the project.
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium, to open the page in")
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_page_in_a_browser(tmp_path, device):
    memory = [(i / 100, i * 1000) for i in range(50)]
    rows = [Row("data", 3, 0.4, 0), Row("virtual step", 3, 0.3, 0)]
    host = {"data": 0.5, "virtual step": 0.5}
    shown = Profile(device, 1, 1.0, 0.7, rows, host, [Row("a<b>", 3, 0.9, 9)], memory)
    text = profiling.page(shown, "Bound by <nothing>.", 1e9, {"fused": True})
    assert not re.search(r"""(src|href)=(?!["']?data:)""", text) and "url(" not in text
    path = tmp_path / "report.html"
    path.write_text(text)
    document, complaints, asked = opened(path, tmp_path)
    assert "Bound by &lt;nothing&gt;." in document and "a&lt;b&gt;" in document
    bars = re.findall(r'aria-label="(\d+%)"', document)
    assert bars == ["40%", "30%"] + (["30%"] if device == "cuda" else [])
    assert document.count("<polygon") == 1
    assert not complaints
    assert not asked
    path.write_text('<img src="http://127.0.0.1:9/asked.png">')
    assert "http://127.0.0.1:9/asked.png" in opened(path, tmp_path)[2], "requests are not seen"


# Only a browser tells whether a page has errors; it is no dependency of the project.
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium, to open the page in")
def test_the_page_of_a_run_in_a_browser(in_tmp, data):
    path = (search(small(profile=1), data).path / "profile" / "report.html").resolve()
    document, complaints, asked = opened(path, in_tmp)
    for name in [*SECOND_ORDER, "weight update"]:
        assert f"<span>{name}</span>" in document
    heights = re.search(r'<polygon class="fill" points="([^"]+)"', document).group(1).split()
    assert len(heights) > 50 and "nan" not in document.lower().split("<table")[0]
    assert not complaints
    assert not asked
