"""Profile reports: what is concluded from a trace, and a page that stands alone."""

import re
import shutil
import subprocess

import pytest

from darts_fast import report
from darts_fast.report import verdict
from darts_fast.trace import Profile, Row

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


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


# Only a browser tells whether a page has errors, and it is no dependency of the project: where there is none,
# this is left out.
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium, to open the page in")
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_page_in_a_browser(tmp_path, device):
    memory = [(i / 100, i * 1000) for i in range(50)]
    rows = [Row("data", 3, 0.4, 0), Row("virtual step", 3, 0.3, 0)]
    host = {"data": 0.5, "virtual step": 0.5}
    shown = Profile(device, 1, 1.0, 0.7, rows, host, [Row("a<b>", 3, 0.9, 9)], memory)
    text = report.page(shown, "Bound by <nothing>.", 1e9, {"fused": True})
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
