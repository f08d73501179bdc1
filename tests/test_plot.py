import io
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from darts_fast import plot
from darts_fast.genotype import derive


@pytest.fixture
def genotype():
    torch.manual_seed(0)
    return derive(torch.randn(14, 8), torch.randn(14, 8))


def test_the_source_holds_every_edge_once(genotype):
    source = plot.source(genotype, "caption")
    for name in ("normal", "reduce"):
        for number, node in enumerate(getattr(genotype, name)):
            for operation, state in node:
                prefix = {"normal": "normal", "reduce": "reduction"}[name]
                edge = f"{prefix}_{state} -> {prefix}_{number + 2} [label={operation}"
                assert source.count(edge) == node.count((operation, state))
    assert source.count("label=") == 16 + 1 + 2 + 14  # operations, caption, two cells, nodes


@pytest.mark.parametrize(("kind", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_rendered_without_dot_on_the_path(genotype, kind, start, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert plot.render(plot.source(genotype), kind).startswith(start)


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
