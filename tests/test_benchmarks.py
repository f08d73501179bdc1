"""The instruments count and compute what they say."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import baseline  # noqa: E402
import step  # noqa: E402
import traffic  # noqa: E402


def test_the_textbook_step_is_no_slower_than_the_published_port():
    """89,400 launches and 352 GB were counted there at batch 64 and 32x32. Launches do not depend on the
    number of pixels and bytes are linear in it, so two small real runs give both."""
    one, two = (traffic.count(False, n, 16, 8, 8, "cpu")["total"] for n in (1, 2))
    assert one.launches == two.launches == pytest.approx(89_400, rel=0.05)
    images = 64 * 32**2 // 8**2  # of 8x8, with as many pixels
    assert one.bytes + (images - 1) * (two.bytes - one.bytes) == pytest.approx(352e9, rel=0.05)


def test_meta_tensors_count_what_a_real_run_counts():
    real, meta = (traffic.count(True, 3, 2, 3, 8, device)["phases"] for device in ("cpu", "meta"))
    for phase in ("virtual step", "validation pass", "hessian-vector product"):
        assert meta[phase].launches == real[phase].launches, phase
        assert meta[phase].bytes == pytest.approx(real[phase].bytes, rel=0.03), phase


def test_the_peak_of_live_bytes_is_at_most_the_textbooks():
    textbook, fused = (traffic.count(fused, 4, 8, 3, 16, "cpu")["peak"] for fused in (False, True))
    assert 0 < fused <= textbook


def test_with_amp_the_peak_of_live_bytes_is_at_most_half_the_textbooks():
    """Of the committed counts, which the code is held to below."""
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
    step.check()
    monkeypatch.setattr(step, "error", lambda found, expected: float("nan"))
    with pytest.raises(AssertionError, match="after two steps"):
        step.check()


def test_a_step_costs_what_the_committed_baseline_says():
    before = json.loads(baseline.FILE.read_text())
    # Counts are of PyTorch's operations, too, and each version composes its own of others.
    if before["torch"] != baseline.VERSION:
        pytest.skip(f"counted with torch {before['torch']}, whose operations are others than this one's")
    assert before["setting"] == baseline.SETTING
    lines = baseline.differences(baseline.counted(), before["counts"])
    assert not lines, "python benchmarks/baseline.py --update takes these over:\n" + "\n".join(lines)


def test_what_differs_from_the_baseline_is_named():
    before = {"a": {"launches": 100, "bytes": 8}, "b": {"launches": 1}}
    now = {"a": {"launches": 110, "bytes": 8}, "c": {"launches": 2}}
    assert baseline.differences(now, before) == [
        "a, launches: 100 -> 110 (+10.0%)",
        "b, launches: 1 -> absent",
        "c, launches: absent -> 2",
    ]
