"""Pictures: a genotype's cells (Graphviz) and the alphas (matplotlib)."""

import io
import shutil
import subprocess

import graphviz
import numpy as np

from darts_fast.genotype import Gene, Genotype
from darts_fast.space import CANDIDATES, EDGES

# Colours that stay apart for colour-blind readers (Okabe and Ito), one a kind of operation.
COLOURS = {
    "max_pool": "#D55E00",
    "avg_pool": "#E69F00",
    "skip_connect": "#666666",
    "sep_conv": "#0072B2",
    "dil_conv": "#009E73",
    "conv": "#CC79A7",
}


class NoGraphviz(RuntimeError):
    """There is neither `dot` on the PATH nor a pygraphviz that bundles Graphviz."""


def source(genotype: Genotype, caption: str = "") -> str:
    """The Graphviz source of one figure with both cells."""
    graph = graphviz.Digraph(
        "genotype",
        graph_attr={
            "rankdir": "LR", "fontname": "Helvetica", "label": caption, "labelloc": "t", "fontsize": "16",
            "nodesep": "0.25", "ranksep": "0.35", "pad": "0.2", "newrank": "true", "dpi": "120",
        },
        node_attr={
            "shape": "box", "style": "rounded,filled", "fontname": "Helvetica", "fontsize": "14",
            "color": "#444444", "fillcolor": "#DCE9F5", "height": "0.4", "width": "0.4",
        },
        edge_attr={"fontname": "Helvetica", "fontsize": "13", "penwidth": "1.6", "arrowsize": "0.7"},
    )  # fmt: skip
    # Graphviz stacks the clusters of a left-to-right graph from the bottom up.
    _cell(graph, "reduction cell", genotype.reduce, genotype.reduce_concat)
    _cell(graph, "normal cell", genotype.normal, genotype.normal_concat)
    return graph.source


def _cell(graph: graphviz.Digraph, title: str, gene: Gene, concat: range | list[int]) -> None:
    prefix = title.split()[0]
    states = [f"{prefix}_{state}" for state in range(2 + len(gene))]
    with graph.subgraph(name=f"cluster_{prefix}") as cell:
        cell.attr(label=title, style="rounded", color="#BBBBBB", labeljust="l", fontsize="15")
        cell.node(states[0], "c_{k-2}", fillcolor="#FFF3C4")
        cell.node(states[1], "c_{k-1}", fillcolor="#FFF3C4")
        cell.node(f"{prefix}_out", "c_{k}", fillcolor="#D5EFD9")
        for number, node in enumerate(gene):
            cell.node(states[2 + number], str(number))
            for operation, state in node:
                colour = next(c for kind, c in COLOURS.items() if operation.startswith(kind))
                cell.edge(states[state], states[2 + number], label=operation, color=colour, fontcolor=colour)
        for state in concat:
            cell.edge(states[state], f"{prefix}_out", color="#AAAAAA", style="dashed")


def render(dot_source: str, file_format: str) -> bytes:
    """The picture as bytes: "png", "svg" or "pdf". Drawn by `dot` from the PATH, else by the Graphviz that
    pygraphviz's wheels bundle.

    Raises:
        NoGraphviz: neither is there.
        RuntimeError: Graphviz could not draw it.
    """
    if shutil.which("dot"):
        done = subprocess.run(
            ["dot", f"-T{file_format}"], input=dot_source.encode(), capture_output=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"dot failed: {done.stderr.decode(errors='replace').strip()}")
        return done.stdout
    try:
        from pygraphviz import AGraph
    except ImportError as error:
        raise NoGraphviz("no Graphviz: neither `dot` on the PATH nor the package pygraphviz") from error
    return AGraph(string=dot_source).draw(format=file_format, prog="dot")


def alpha_heat_map(alphas: np.ndarray, title: str) -> bytes:
    """A PNG of the softmaxed alphas [14, 8]: a row an edge, a column a candidate, its weight in the cell.

    Coloured by the distance from 1/8, where every candidate starts.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 6.5), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    start = 1 / alphas.shape[1]
    reach = np.abs(alphas - start).max()
    image = axes.imshow(alphas, cmap="RdBu_r", aspect="auto", vmin=start - reach, vmax=start + reach)
    axes.set_xticks(range(len(CANDIDATES)), list(CANDIDATES), rotation=30, ha="right")
    axes.set_yticks(range(len(EDGES)), [edge_name(source, node) for source, node in EDGES])
    axes.set_title(title)
    for (row, column), value in np.ndenumerate(alphas):
        colour = "white" if abs(value - start) > 0.6 * reach else "black"
        axes.text(column, row, f"{value:.4f}", ha="center", va="center", fontsize=8, color=colour)
    figure.colorbar(image, label="softmax(alpha)")
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def edge_name(source: int, node: int) -> str:
    """`c_k-1 to 2`: how pictures and TensorBoard call the edge from a state to a node."""
    return f"{('c_k-2', 'c_k-1')[source] if source < 2 else source - 2} to {node}"
