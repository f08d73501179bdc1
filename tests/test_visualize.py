"""visualize.py as a person calls it."""

import io
import json
import os
import sys
from pathlib import Path

import pytest
from PIL import Image
from test_run import call

from darts_fast.notation import NAMED

V2 = NAMED["DARTS_V2"]
START = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}


@pytest.fixture
def visualize(monkeypatch, capsys, in_tmp):
    return lambda *arguments: call(monkeypatch, capsys, *arguments, program="visualize")


@pytest.mark.parametrize(
    ("arguments", "file"),
    [
        (["DARTS_V2"], "DARTS_V2.svg"),
        (["darts_v2", "--format", "png"], "DARTS_V2.png"),
        ([str(V2)], "genotype.svg"),
        ([V2.flat(), "--format", "pdf"], "genotype.pdf"),
        (["NASNet", "--out", "some where.PNG"], "some where.PNG"),
        (["AmoebaNet", "--out", "a.b.pdf", "--format", "pdf"], "a.b.pdf"),
    ],
)
def test_one_picture_and_one_line(visualize, arguments, file):
    assert visualize(*arguments) == (0, f"wrote {file!r}\n", "")
    assert os.listdir() == [file]
    assert Path(file).read_bytes().startswith(START[file[-3:].lower()])


def test_files_and_folders_give_their_name(visualize):
    search = Path("searchs", "first.try")
    search.mkdir(parents=True)
    (search / "genotype.json").write_text(json.dumps({"best": {"genotype": V2.as_json()}}))
    Path("my.log").write_text(f"genotype = {V2}\n")
    for argument, file in {
        "searchs/first.try": "first.try.svg",
        "searchs/first.try/": "first.try.png",
        "searchs/first.try/genotype.json": "genotype.svg",
        "my.log": "my.svg",
    }.items():
        assert visualize(argument, "--format", file[-3:]) == (0, f"wrote {file!r}\n", "")
        assert Path(file).exists()


def test_the_png_shows_both_cells_in_colour(visualize):
    visualize("AmoebaNet", "--out", "a.png")
    image = Image.open(io.BytesIO(Path("a.png").read_bytes())).convert("RGB")
    colours = {colour for _, colour in image.getcolors(2**24)}
    assert image.width > 600 and {(0, 103, 165), (181, 56, 27), (138, 97, 0), (162, 51, 126)} <= colours


def test_only_a_file_that_was_named_is_replaced(visualize):
    Path("DARTS.svg").write_text("mine")
    Path("DARTS_V2.svg").write_text("mine")
    code, out, err = visualize("DARTS_V2")
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert "'DARTS_V2.svg' exists and is not overwritten; name it by --out to replace it" in err
    assert Path("DARTS_V2.svg").read_text() == "mine"
    assert visualize("DARTS_V2", "--out", "DARTS_V2.svg")[0] == 0
    assert Path("DARTS_V2.svg").read_text() != "mine" == Path("DARTS.svg").read_text()


BAD = {
    ("DARTS_V3",): "'DARTS_V3' is no genotype, file or folder; did you mean DARTS_V",
    ("Genotype(normal=[('skip', 0)])",): "genotype, character 30: expected ',', found ')'",
    ("searchs/none",): "there is no file or folder 'searchs/none'",
    (".",): "'.' is not the folder of a search",
    ("DARTS", "--format", "jpg"): "invalid choice: 'jpg'",
    ("DARTS", "--out", "a.jpg"): "--out must end in .svg, .png or .pdf, not 'a.jpg'",
    ("DARTS", "--out", "a"): "--out must end in .svg, .png or .pdf, not 'a'",
    ("DARTS", "--out", ""): "--out must end in .svg, .png or .pdf, not ''",
    ("DARTS", "--out", "a.svg", "--format", "png"): "--out 'a.svg' contradicts --format png",
    ("DARTS", "--out", "none/a.svg"): "cannot write none/a.svg",
    ("DARTS", "--out", f"{'a' * 300}.svg"): "File name too long",
    ("DARTS", "--ou", "a.svg"): "unrecognized arguments: --ou a.svg",
    ("DARTS", "NASNet"): "unrecognized arguments: NASNet",
    (): "the following arguments are required: GENOTYPE",
}


@pytest.mark.parametrize("arguments", BAD)
def test_bad_input_is_one_sentence(visualize, arguments):
    code, out, err = visualize(*arguments)
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert err.startswith("visualize.py: ") and BAD[arguments] in err
    assert os.listdir() == []


def test_out_is_no_folder(visualize):
    Path("a.svg").mkdir()
    code, _, err = visualize("DARTS", "--out", "a.svg")
    assert code == 2 and "--out must be a file, and 'a.svg' is a folder" in err
    assert os.listdir() == ["a.svg"] and os.listdir("a.svg") == []


def test_without_graphviz_its_source_is_written(visualize, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setitem(sys.modules, "pygraphviz", None)
    code, out, err = visualize("DARTS_V2", "--out", "cells.png")
    assert (code, out) == (1, "") and err.count("\n") == 1
    assert "no Graphviz" in err and "wrote the source 'cells.gv' instead" in err
    text = Path("cells.gv").read_text()
    assert text.startswith("digraph genotype {") and os.listdir() == ["cells.gv"]
    Path("cells.gv").write_text("mine")
    code, _, err = visualize("DARTS_V2", "--out", "cells.png")
    assert code == 1 and "'cells.gv' exists" in err and Path("cells.gv").read_text() == "mine"


def test_without_the_package_that_writes_the_source(visualize, monkeypatch):
    monkeypatch.setitem(sys.modules, "graphviz", None)
    sentence = "visualize.py: no Graphviz: the Python package graphviz is not installed\n"
    assert visualize("DARTS_V2", "--out", "cells.png") == (1, "", sentence)
    assert os.listdir() == []


# Windows runs no file by its `#!` line, and so would find no `dot`.
@pytest.mark.skipif(sys.platform == "win32", reason="the stand-in for dot is a shell script")
def test_a_dot_that_fails(visualize, monkeypatch, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bin")
    (folder / "dot").write_text("#!/bin/sh\necho 'no\nformat' >&2\nexit 1\n")
    (folder / "dot").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    assert visualize("DARTS") == (1, "", "visualize.py: dot failed: no format\n")
    assert os.listdir() == []


def test_the_written_source_is_drawn_by_graphviz(visualize, monkeypatch):
    with monkeypatch.context() as without:
        without.setenv("PATH", "")
        without.setitem(sys.modules, "pygraphviz", None)
        assert visualize("PDARTS")[0] == 1
    from darts_fast.plot import render

    assert render(Path("PDARTS.gv").read_text(), "svg").startswith(b"<?xml")
