"""README and docs/: their links lead somewhere, and the reference knows the program."""

import re
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from darts_fast import cli

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def anchors(page):
    """Those of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), target
        assert not anchor or anchor in anchors(found), target


def test_the_reference_has_every_command_and_no_flag_that_is_not_there(monkeypatch, capsys):
    text = (ROOT / "docs" / "reference.md").read_text()
    sections = dict(part.split("\n", 1) for part in re.split(r"^## ", text, flags=re.MULTILINE)[1:])
    assert set(cli.COMMANDS) <= set(sections)
    for command in cli.COMMANDS:
        monkeypatch.setattr(sys, "argv", ["darts-fast", command, "-h"])
        with suppress(SystemExit):  # of argparse
            cli.main()
        known = set(re.findall(r"--\w+", capsys.readouterr().out))
        of_every_run = set(re.findall(r"--\w+", sections["Flags of every run"]))
        if command in ("search", "train"):
            assert of_every_run <= known, command
        assert set(re.findall(r"--\w+", sections[command])) <= known | of_every_run, command
