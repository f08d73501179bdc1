"""The instruments count and compute what they say."""

import argparse
import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from processes import start_program

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import baseline  # noqa: E402
import gpu_bench  # noqa: E402
import gpu_kernels  # noqa: E402
import gpu_report  # noqa: E402
import race  # noqa: E402
import race_tables  # noqa: E402
import step  # noqa: E402
import test_steps  # noqa: E402
import traffic  # noqa: E402

from darts_fast.kernels import native  # noqa: E402

count = functools.cache(traffic.count)  # some of it takes seconds, and several tests look at it


def test_the_textbook_step_is_no_slower_than_the_published_port():
    """89,400 launches and 352 GB were counted there at batch 64 and 32x32. Launches do not depend on the
    number of pixels and bytes are linear in it, so two small real runs give both."""
    one, two = (traffic.count(None, n, 16, 8, 8, "cpu").total for n in (1, 2))
    assert one.launches == two.launches == pytest.approx(89_400, rel=0.05)
    images = 64 * 32**2 // 8**2  # of 8x8, with as many pixels
    assert one.bytes + (images - 1) * (two.bytes - one.bytes) == pytest.approx(352e9, rel=0.05)


@pytest.mark.parametrize("kernels", [None, "triton"])
def test_meta_tensors_count_what_a_real_run_counts(kernels):
    real, meta = (count(kernels, 4, 8, 3, 16, device).phases for device in ("cpu", "meta"))
    assert list(meta) == list(real)
    for phase in ("virtual step", "validation pass", "hessian-vector product"):
        assert meta[phase].launches == real[phase].launches, phase
        assert meta[phase].bytes == pytest.approx(real[phase].bytes, rel=0.03), phase


def test_what_the_kernels_leave_to_aten_is_counted_as_it_runs():
    """The shuffle and the 2x2 max pool of partial channels; and a quarter of the channels moves less."""
    if native.level() is None:
        # Without a compiler the install succeeds, and there is no C++ step to count.
        pytest.skip(f"the C++ library {native.absence()}")
    sizes = 3, 8, 3, 8
    step = traffic.search_step("native", *sizes, "cpu", torch.float32, partial_channels=4)
    step.take()  # which makes what is made once
    with traffic.Traffic() as real:
        step.take()
    meta, whole = (traffic.count("native", *sizes, partial_channels=k) for k in (4, 1))
    for operation in ("aten::cat", "aten::copy_", "aten::max.dim", "aten::gather", "aten::where.self"):
        assert meta.by_name[operation] == real.by_name[operation], operation
    assert 0 < meta.total.bytes < whole.total.bytes


def test_the_race_checks_searches_with_partial_channels():
    race.check(partial_channels=2)


def test_the_peak_of_live_bytes_is_at_most_the_textbooks():
    textbook, fused = (count(kernels, 4, 8, 3, 16, "meta").peak for kernels in (None, "triton"))
    assert 0 < fused <= textbook


def test_the_peak_has_the_blocks_of_the_plan():
    """The forward passes of the training and of the validation batch are alive at once, with a block each."""
    found = count("triton", 4, 8, 3, 16, "meta")
    assert found.peak > 2 * found.kept


def test_with_amp_the_peak_of_live_bytes_is_at_most_half_the_textbooks():
    """By the counts in baseline.json, to which the code itself is held by a test below."""
    counts = json.loads(baseline.FILE.read_text())["counts"]
    peak = {name: counts[f"{name}: whole step"]["peak live bytes"] for name in traffic.VARIANTS}
    assert 0 < peak["fused, Triton, bfloat16"] <= peak["textbook"] / 2


def test_traffic_counts_distinct_elements_and_no_views():
    x = torch.zeros(4, 8)
    with traffic.Traffic() as counted:
        y = x.t() + torch.zeros(1, 1).expand(8, 4)  # zeros writes one number; add reads 32 + 1, writes 32
        y.mul_(y)  # one operand, which is also the result
    assert counted.total == (3, 4 * (1 + 65 + 32))
    assert counted.peak == 4 + 4 * 32
    assert counted.live == 4 * 32  # the one number is free again
    del y
    assert counted.live == 0


def test_the_race_checks_its_results_first(monkeypatch):
    race.check()
    monkeypatch.setattr(race, "error", lambda found, expected: float("nan"))
    monkeypatch.setattr(race.TextbookStep, "__call__", lambda *_: None)  # their results are not looked at
    monkeypatch.setattr(race.SearchStep, "take", lambda *_: None)
    with pytest.raises(AssertionError, match="after two steps"):
        race.check()


def test_the_benchmarks_of_steps_are_named_by_their_setting():
    assert test_steps.words(test_steps.GPU) == "batch 64, 16 channels, 8 layers, 32x32"


def test_a_variant_that_is_not_compiled_in_time_is_skipped(monkeypatch):
    def late(*arguments, **options):
        raise TimeoutError("it took more than 120 s")

    monkeypatch.setattr(test_steps, "Runner", late)
    # What is tested is that the benchmark skips: nothing is skipped here.
    with pytest.raises(pytest.skip.Exception, match="it took more than 120 s"):
        test_steps.runner("textbook, torch.compile", test_steps.GPU, torch.device("cuda"))


@pytest.mark.slow
def test_a_step_costs_what_the_committed_baseline_says():
    # On its own: Triton's kernels are not compiled where they were imported for the interpreter.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, baseline.__file__], capture_output=True, text=True, env=environment, timeout=900
    )
    assert done.returncode == 0, f"{done.stdout}{done.stderr}\nbaseline.py --update takes these over"
    # Figures are of PyTorch's operations and of Triton's compiler, too: other versions are not compared.
    if "not compared" in done.stdout:
        pytest.skip(done.stdout)
    assert "nothing differs" in done.stdout


def test_saved_bytes_are_those_of_what_backward_reads():
    """The textbook keeps every candidate's activations, the fused cells keep once what edges share."""
    sizes = dict(baseline.SETTING)
    wide = traffic.count("triton", **sizes).kept
    assert 0 < wide < baseline.saved_by_the_textbook()
    assert traffic.count("triton", **sizes, dtype=torch.bfloat16).kept < 0.6 * wide


def test_what_differs_from_the_baseline_is_named():
    before = {"a": {"launches": 100, "bytes": 8}, "b": {"launches": 1}}
    now = {"a": {"launches": 110, "bytes": 8}, "c": {"launches": 2}}
    assert baseline.differences(now, before) == [
        "a, launches: 100 -> 110 (+10.0%)",
        "b, launches: 1 -> absent",
        "c, launches: absent -> 2",
    ]


@pytest.mark.slow
def test_a_dry_run_of_the_gpu_report(tmp_path):
    """Every section runs on a CPU at a tiny size, and the report says what each found."""
    # 60 minutes: on a busy machine, too, no section meets its limit.
    arguments = ["--device", "cpu", "--quick", "--minutes", "60", "--out", str(tmp_path)]
    printed = tmp_path / "printed"
    process = start_program(Path(gpu_report.__file__), *arguments, output=printed)
    process.join()
    report = json.loads((tmp_path / "report.json").read_text())
    assert {name: part["state"] for name, part in report.items()} == dict.fromkeys(
        gpu_report.SECTIONS, "done"
    )
    assert process.exitcode == 0, printed.read_text()
    assert report["compilation"]["facts"]["kernels compiled"] == 2
    assert report["tests"]["facts"]["failed"] == 0 < report["tests"]["facts"]["skipped"]
    assert {r["variant"] for r in report["step"]["records"]} >= {"textbook", "fused, ATen"}
    text = (tmp_path / "report.md").read_text()
    for words in ("exact product: error", "of its roofline", "a whole epoch, s", "left out: textbook, torch"):
        assert words in text
    for name in ("step.svg", "kernels.svg", "timeline.svg"):
        ElementTree.parse(tmp_path / name)
        assert f"({name})" in text
    assert (tmp_path / "profile" / "report.html").exists()


def test_the_gpu_report_survives_what_fails_hangs_or_crashes(tmp_path, monkeypatch, capsys):
    def fails(bench):
        bench.fact("before", 1)
        raise ValueError("it broke")

    def hangs(bench):
        bench.fact("before", 2)
        while True:
            with contextlib.suppress(BaseException):
                time.sleep(100)  # not to be ended by asking

    def crashes(bench):
        bench.fact("before", 3)
        os.kill(os.getpid(), signal.SIGKILL)

    sections = {"fails": (fails, 60), "hangs": (hangs, 4), "crashes": (crashes, 60)}
    monkeypatch.setattr(gpu_report, "SECTIONS", sections)
    argv = ["gpu_report.py", "--device", "cpu", "--quick", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", argv)
    assert gpu_report.main() == 1
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["fails"]["state"] == "failed: ValueError" and "it broke" in report["fails"]["error"]
    assert report["hangs"]["state"] == "stopped after 4 s"
    assert report["crashes"]["state"] == "failed: exit code -9"
    assert [report[name]["facts"]["before"] for name in ("fails", "hangs", "crashes")] == [1, 2, 3]
    assert "it broke" in (tmp_path / "report.md").read_text()


def test_compiling_for_the_gpu_report_ends_before_it_is_killed(tmp_path, monkeypatch):
    """Kernels are compiled in the order of their launches; those for which no time is left are compiled when
    they are launched."""
    from darts_fast.kernels.triton import compilation

    monkeypatch.setenv("TRITON_INTERPRET", os.environ.get("TRITON_INTERPRET", ""))  # which it takes away
    closed = []

    def compile_ahead(planned, archs, count, then, launchers):
        try:
            for kernel in planned:
                bench.end -= 40
                yield then(kernel, archs[0], "")
        finally:
            closed.append(planned)

    monkeypatch.setattr(compilation, "compile_ahead", compile_ahead)
    monkeypatch.setattr(gpu_kernels, "launches_to_compile", lambda bench, kind: [kind] * 2)
    bench = gpu_bench.Bench(argparse.Namespace(device="cpu", quick=False), tmp_path / "part.json", 130)
    gpu_kernels.compilation(bench)
    facts = json.loads(bench.path.read_text())["facts"]
    assert closed == [["float16"] * 2, ["float32"] * 2]
    assert facts["kernels compiled"] == 3 and facts["failed"] == []
    assert facts["ended for want of time"].startswith("within float32")


def test_the_first_sections_of_the_gpu_report_have_the_time_that_they_need(tmp_path, monkeypatch, capsys):
    """Each of the first sections has its own limit, and the later ones have what time is left."""
    clock, given = [0.0], {}

    def supervised(name, args, parts, seconds):
        given[name] = seconds
        clock[0] += seconds  # it hangs
        yield {"state": "stopped"}

    monkeypatch.setattr(gpu_report.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(gpu_report, "supervised", supervised)
    monkeypatch.setattr(sys, "argv", ["gpu_report.py", "--minutes", "8", "--out", str(tmp_path)])
    assert gpu_report.main() == 0
    limits = {name: limit for name, (_, limit) in gpu_report.SECTIONS.items()}
    first = ["environment", "compilation", "agreement"]
    assert list(given)[:4] == [*first, "step"] and [given[n] for n in first] == [limits[n] for n in first]
    assert given["step"] == 470 - sum(limits[name] for name in first) and list(given)[4:] == []
    assert "left out: no time was left; --only 'tests' runs it" in capsys.readouterr().out


def test_a_launch_does_the_operations_of_its_equations():
    from darts_fast.kernels import triton
    from darts_fast.kernels.types import Call, Reader, Source, Task, Weights, images, launches

    (x,), y = images(1, (2, 16, 8, 8), torch.float32), images(2, (2, 16, 8, 8), torch.float32)
    tasks = [Task(0, Weights(torch.empty(16, 1, k, k), torch.empty(16, 16, 1, 1))) for k in (3, 5)]
    reads = {"sources": [Source(x)], "tasks": tasks}
    readers = [Reader(t, None, 0, t, None, None) for t in y]
    writes = {"adjoint": x[None], "sums": None, "gradients": torch.empty(2, 16 * (16 + 25))}
    calls = [
        Call("sepconv_forward", reads, {"y": y, "statistics": torch.empty(2, 3, 16)}),
        Call("sepconv_backward", {**reads, "readers": readers, "terms": [()]}, writes),
    ]
    without = calls[1]._replace(writes={**writes, "gradients": None})
    pixels = 2 * 8 * 8
    depthwise, pointwise = 2 * pixels * 16 * (9 + 25), 2 * 2 * pixels * 16 * 16
    found = [(one.name, traffic.operations(one)) for one in launches(triton, [*calls, without])]
    assert found == [
        ("sepconv_fwd_kernel", (depthwise, pointwise)),
        ("sepconv_bwd_pointwise_kernel", (2 * depthwise, 2 * pointwise)),
        ("sepconv_bwd_kernel", (depthwise, 0)),
        ("sepconv_bwd_pointwise_kernel", (0, pointwise)),
        ("sepconv_bwd_kernel", (depthwise, 0)),
    ]


def test_the_time_outside_kernels_is_what_programs_leave():
    runner = race.Runner("fused, ATen", race.Setting(2, 2, 3, 8), torch.device("cpu"))
    found = runner.take()
    assert 0 < found[race.OUTSIDE] < found["step"]
    phases = ["virtual step", "validation pass", "hessian-vector product", "architecture update"]
    assert list(found) == [*phases, "weight update", "step", race.OUTSIDE]


def test_a_training_step_is_raced_with_an_evaluation():
    race.check_training()
    runner = race.TrainingRunner("fused, ATen", race.Setting(2, 2, 3, 24), torch.device("cpu"))
    found = runner.take()
    assert list(found) == ["forward", "backward", "weight update", "step", race.OUTSIDE, race.EVALUATION]
    assert 0 < found[race.OUTSIDE] < found["step"] and found[race.EVALUATION] > 0
    assert runner.network.training and "auxiliary_head.classifier.weight" in runner.network.state_dict()


def test_a_training_step_has_the_launches_and_bytes_that_were_asked_for():
    """At the paper's setting, where a step in plain PyTorch has 3,088 launches and 60.8 GB."""
    for dtype, most in ((torch.float32, 28e9), (torch.bfloat16, 15e9)):
        found = traffic.count("triton", 96, 36, 20, dtype=dtype, train=True).total
        assert found.launches <= 1200 and found.bytes <= most


def test_a_sweep_is_tabled_and_drawn(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(step, "check", lambda *_: None)

    def of_two(kernels, _, *sizes, **more):
        """Counting takes seconds, most on meta tensors: the counts of the smaller batch do for both."""
        return count(kernels, 2, *sizes, device="cpu", **more)

    monkeypatch.setattr(race.Runner, "count", staticmethod(of_two))
    arguments = "--init_channels 2 --layers 3 --size 8 --repeats 2 --sweep batch_size=2,4 --only".split()
    arguments += ["textbook", "fused, ATen", "fused, Triton", "--results", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["step.py", *arguments])
    assert step.main() == 0
    printed = capsys.readouterr().out
    assert "left out: fused, Triton (the Triton kernels run on CUDA)" in printed
    assert "| batch_size | textbook, ms | fused, ATen, ms | ratio |" in printed
    (lines,) = tmp_path.glob("sweep-batch_size-*.jsonl")
    records = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [r["setting"]["batch_size"] for r in records] == [2, 2, 4, 4]
    for record in records:
        assert record["commit"]
        if record["variant"] == "textbook":
            assert record["launches"] > 1000 and record["bandwidth"] > 0
        assert record["seconds"]["step"][0] <= record["seconds"]["step"][1] <= record["seconds"]["step"][2]
    picture = ElementTree.parse(lines.with_suffix(".svg"))
    assert len(picture.findall(".//{*}circle")) == 4


def test_busy_neighbours_end_with_the_race(monkeypatch):
    started: list = []
    popen = step.subprocess.Popen

    def start(command):
        started.append(popen(command))
        return started[-1]

    monkeypatch.setattr(step.subprocess, "Popen", start)
    with pytest.raises(KeyboardInterrupt), step.neighbours(2):
        assert [process.poll() for process in started] == [None, None]
        raise KeyboardInterrupt
    assert all(process.poll() is not None for process in started) and len(started) == 2


def test_the_fit_of_a_sweep():
    def record(images):
        step = 0.001 * (340 + 2 * images)
        return {
            "variant": "a",
            "setting": {"batch_size": images},
            "seconds": {"step": [step] * 3},
            "launches": 34_000,
            "bytes": 7e6 + 4e6 * images,
        }

    assert race_tables.fits([record(n) for n in (8, 16, 64)]) == [
        "a: 340 ms + 2.0 ms an image, within 0%; 10.0 us for each of 34,000 launches, 2.0 GB/s"
    ]
