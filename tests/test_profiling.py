"""Profiled runs: what is recorded and written, and that the run stays the same."""

import dataclasses
import gzip
import json
import re
import signal

import pytest
import torch
from conftest import checkpoint, same
from test_report import CHROMIUM, opened

from darts_fast import SearchConfig, TrainConfig, profiling, resume_search, search, train
from darts_fast.kernels import native
from darts_fast.runs import Stopped
from darts_fast.search import Search
from darts_fast.trace import read_trace

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


# Without a compiler the install succeeds, and ATen's operations are recorded in place of sweeps in C++.
@pytest.mark.skipif(native.level() is None, reason=f"the C++ library {native.absence()}")
def test_the_kernels_of_a_sweep_are_told_apart(in_tmp, data):
    path = search(small(profile=2), data).path / "profile" / "trace.json.gz"
    operations = {
        row.name: row for row in read_trace(json.loads(gzip.open(path).read())["traceEvents"]).operations
    }
    kernels = {name: row for name, row in operations.items() if name.startswith("native::")}
    for function in (
        "sepconv_forward",
        "sepconv_backward",
        "sepconv_tangent",
        "sepconv_second",
        "mix_tangent",
    ):
        assert kernels[f"native::{function}"].bytes > 0
    whole = [row.seconds for name, row in operations.items() if "_Cells" in name]
    assert sum(row.seconds for row in kernels.values()) > sum(whole)


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


def test_a_run_that_is_stopped_while_it_is_recorded(in_tmp, data, signal_at):
    """Its process records nothing more; the resumed run records all steps."""
    signal_at(Search, 4, signal.SIGTERM)
    with pytest.raises(Stopped):
        search(dataclasses.replace(small(profile=2, name="stopped"), epochs=2), data)
    assert not profiling._recording and not torch.autograd._profiler_enabled()
    path = resume_search("searchs/stopped", data).path
    assert "recorded: 2 steps" in (path / "profile" / "report.md").read_text()


def test_a_report_whose_writing_was_killed_is_written_again(in_tmp, data, monkeypatch):
    """No half of a report is taken for one."""

    def killed(profiler, folder, settings, captured):
        folder.mkdir()
        (folder / "trace.json").write_text("half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("darts_fast.loop.write_report", killed)
        with pytest.raises(KeyboardInterrupt):
            search(small(profile=2, name="killed"), data)
    path = resume_search("searchs/killed", data).path
    assert sorted(file.name for file in (path / "profile").iterdir()) == [
        "report.html", "report.md", "trace.json.gz",
    ]  # fmt: skip
    assert not (path / "profile.partial").exists()


def test_nothing_is_recorded_outside_a_profile():
    with torch.profiler.profile() as recorded, profiling.phase("data"):
        torch.ones(1)
    assert "data" not in {event.key for event in recorded.key_averages()}


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
