"""Pictures of genotypes, heat maps of the alphas, and curves."""

import io
import os
import re
import sys
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image

from darts_fast import plot
from darts_fast.genotype import derive
from darts_fast.notation import NAMED
from darts_fast.plot import render
from darts_fast.space import PRIMITIVES


@pytest.fixture
def genotype():
    torch.manual_seed(0)
    return derive(torch.randn(14, 8), torch.randn(14, 8))


@pytest.mark.parametrize("name", ["derived", *NAMED])
def test_the_source_holds_every_edge_once(genotype, name):
    genotype = NAMED.get(name, genotype)
    source = plot.source(genotype, "caption")
    lines = [line.strip() for line in source.splitlines()]
    for cell, prefix in (("normal", "normal"), ("reduce", "reduction")):
        gene = getattr(genotype, cell)
        labels = dict(re.findall(rf"({prefix}_\d+_\d+) \[label=(\w+)", source))
        into = dict(re.findall(rf"({prefix}_\d+_\d+) -> {prefix}_(\d+) ", source))
        edges = re.findall(rf"{prefix}_(\d+) -> ({prefix}_\d+_\d+) ", source)
        out_of = {operation: state for state, operation in edges}
        drawn = [(labels[key], int(out_of[key]), int(into[key]) - 2) for key in labels]
        assert drawn == [(*pair, number) for number, node in enumerate(gene) for pair in node]
        concat = [line.split()[0] for line in lines if f"-> {prefix}_out" in line]
        assert concat == [f"{prefix}_{state}" for state in getattr(genotype, f"{cell}_concat")]


def contrast(one, other):
    """The WCAG contrast ratio of two colours."""

    def luminance(colour):
        parts = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] + 0.05

    bright, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return bright / dark


def test_every_operation_has_a_colour_of_its_kind_that_can_be_read():
    assert set(plot.COLOURS) == {primitive.kind for primitive in PRIMITIVES.values()} - {"none"}
    assert len(set(plot.COLOURS.values())) == len(plot.COLOURS)
    assert all(contrast(colour, "#FFFFFF") >= 4.5 for colour in plot.COLOURS.values())
    assert contrast("#000000", "#FFFFFF") == pytest.approx(21)


@pytest.mark.parametrize("name", ["derived", *NAMED])
def test_legible_at_800_pixels(genotype, name):
    """The smallest label, of 13 points, is at least 9 pixels high where the picture is 800 wide."""
    svg = plot.render(plot.source(NAMED.get(name, genotype), name), "svg").decode()
    width = float(re.search(r'viewBox="0.00 0.00 ([\d.]+)', svg)[1])
    scale = float(re.search(r"scale\(([\d.]+)", svg)[1])
    assert 13 * scale * 800 / width >= 9
    assert f">{name}</text>" in svg and svg.count(">sep_conv") >= 4


def test_a_caption_of_any_text_is_drawn(genotype):
    svg = plot.render(plot.source(genotype, 'a\\n<b>&\x07\udc80\n"é'), "svg").decode()
    assert ">a\\n&lt;b&gt;&amp;???&quot;é</text>" in svg
    ElementTree.fromstring(svg)


@pytest.mark.parametrize(("kind", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_rendered_without_dot_on_the_path(genotype, kind, start, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert plot.render(plot.source(genotype), kind).startswith(start)


# The drawing program here is a script of sh, and Ctrl-C a signal to a process group; Windows has neither.
@pytest.mark.skipif(os.name != "posix", reason="needs sh and POSIX process groups")
def test_ctrl_c_in_a_terminal_does_not_reach_the_drawing_program(tmp_path, monkeypatch):
    """It signals the process group of the run, which finishes its step and saves."""
    program = tmp_path / "dot"
    program.write_text(f"#!{sys.executable}\nimport os\nprint(os.getpgrp())\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert int(render("digraph {}", "svg")) != os.getpgrp()


def test_only_what_fontconfig_says_is_kept_off_stderr(capfd):
    with plot._without_fontconfig_lines():
        os.write(2, b"Fontconfig warning: line 6\nanother line\n")
    os.write(2, b"after\n")
    assert capfd.readouterr().err == "another line\nafter\n"


def test_no_graphviz_at_all(genotype, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setitem(sys.modules, "pygraphviz", None)
    with pytest.raises(plot.NoGraphviz):
        plot.render(plot.source(genotype), "png")


def test_heat_map_tells_strong_from_weak():
    alphas = np.full((14, 8), 1 / 8)
    png = plot.alpha_heat_map(alphas + 0.0, "even")  # no division by zero where nothing was learned
    assert Image.open(io.BytesIO(png)).size == (750, 650)
    alphas[3, 4], alphas[3, 0] = 0.2, 0.05
    assert plot.alpha_heat_map(alphas, "even") != png


@pytest.mark.filterwarnings("error")
def test_heat_map_of_decided_edges():
    """An operation alone on each edge, and none on those that went: nothing is divided by zero."""
    decided = np.zeros((14, 8))
    decided[:8, 4] = 1
    png = plot.alpha_heat_map(decided, "decided")
    decided[0, 4], decided[0, 5] = 0, 1
    assert plot.alpha_heat_map(decided, "decided") != png


def test_curves_show_what_comes_late_and_name_each_line_once(monkeypatch):
    """The axis leaves out the first epochs, far below; equal names are one entry of the legend."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figures, plain = [], FigureCanvasAgg.print_png

    def print_png(self, *arguments):
        figures.append(self.figure)
        return plain(self, *arguments)

    monkeypatch.setattr(FigureCanvasAgg, "print_png", print_png)
    lines = [[10.0, 50.0, 90.0, 92.0], [20.0, 60.0, 94.0, 95.0], [30.0, 70.0, 91.0, 96.0]]
    names = ["chosen", "others", "others"]
    curves = [
        plot.Curve(values, "#0067A5", i == 0, 1 + i, name)
        for i, (values, name) in enumerate(zip(lines, names, strict=True))
    ]
    png = plot.curves([plot.Panel("one", curves), plot.Panel("nothing", [])])
    assert Image.open(io.BytesIO(png)).size == (1200, 460)
    one, nothing = figures[0].axes
    assert [list(line.get_ydata()) for line in one.lines] == lines and not nothing.lines
    assert [list(line.get_xdata()) for line in one.lines] == [[1, 2, 3, 4]] * 3
    assert [line.get_linestyle() for line in one.lines] == ["--", "-", "-"]
    assert [text.get_text() for text in one.get_legend().get_texts()] == ["chosen", "others"]
    low, high = one.get_ylim()
    assert 85 < low < 90 and 96 < high < 100
