"""Pictures: a genotype's cells (Graphviz) and the alphas (matplotlib)."""

import io
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from darts_fast.errors import InputError, RunError
from darts_fast.genotype import Gene, Genotype
from darts_fast.nasbench201 import NAMES, NODES, Cell
from darts_fast.runs import write_atomically, writing
from darts_fast.space import DARTS, PRIMITIVES, Names

# One a kind of operation. White text on each, and each on white, has a contrast of at least 4.5:1 (WCAG AA).
COLOURS = {
    "max_pool": "#B5381B",
    "avg_pool": "#8A6100",
    "skip": "#606060",
    "sep_conv": "#0067A5",
    "dil_conv": "#00784F",
    "conv": "#A2337E",
    "noise": "#6B4FA0",
}
# Operations of a cell; published ones have ten at most. Graphviz draws any 40 in a second or two, a chain of
# 50 in 13 seconds, of 75 in minutes.
MOST_DRAWN = 40
FORMATS = ("svg", "png", "pdf")
C = '<c<sub><font point-size="10">{}</font></sub>>'  # small: not every browser lowers the text of an SVG
FONT = "Helvetica,Arial,sans-serif"


class NoGraphviz(RuntimeError):
    """What draws graphs is not installed."""


def source(genotype: Genotype, caption: str = "") -> str:
    """The Graphviz source of one figure with both cells: inputs on the left, the cell's output on the right,
    an operation as a label on the line from the state that it reads to the node that it is added to.

    Raises:
        NoGraphviz: the package graphviz, which writes the source, is not installed.
        ValueError: a cell has more than MOST_DRAWN operations.
    """
    for cell, gene in (("normal", genotype.normal), ("reduction", genotype.reduce)):
        operations = sum(len(node) for node in gene)
        if operations > MOST_DRAWN:
            raise ValueError(
                f"the {cell} cell has {operations:,} operations, and at most {MOST_DRAWN} of a cell are drawn"
            )
    graph = _graph(caption)
    # Graphviz stacks the clusters of a left-to-right graph from the bottom up.
    _cell(graph, "reduction cell", genotype.reduce, genotype.reduce_concat)
    _cell(graph, "normal cell", genotype.normal, genotype.normal_concat)
    for rank in ("normal_0 normal_1 reduction_0 reduction_1", "normal_out reduction_out"):
        graph.body.append(f"\t{{rank=same {rank}}}\n")  # both cells equally wide
    return graph.source


def cell_source(cell: Cell, caption: str = "") -> str:
    """The same of a cell of NAS-Bench-201: its input on the left, its output, which is node 3, on the right.
    Edges whose operation is `none` are left out.

    Raises:
        NoGraphviz: as `source`.
    """
    graph = _graph(caption)
    graph.node("node_0", "input", fillcolor="#FFF3C4")
    for node, edges in enumerate(cell.normal, start=1):
        label, colour = ("output", "#D5EFD9") if node == NODES - 1 else (str(node), "#DCE9F5")
        graph.node(f"node_{node}", label, fillcolor=colour)
        for index, (operation, source) in enumerate(edges):
            colour = COLOURS[NAMES.kinds[operation]]
            name = f"operation_{node}_{index}"
            _operation(graph, name, operation, colour, f"node_{source}", f"node_{node}")
    return graph.source


def _graph(caption: str) -> Any:
    try:
        import graphviz
    except ImportError as error:
        raise NoGraphviz("no Graphviz: the Python package graphviz is not installed") from error
    printable = graphviz.escape("".join(c if c.isprintable() else "?" for c in caption))
    return graphviz.Digraph(
        "genotype",
        graph_attr={
            "rankdir": "LR", "fontname": FONT, "fontsize": "16", "label": printable, "labelloc": "t",
            "nodesep": "0.14", "ranksep": "0.25", "pad": "0.1", "dpi": "120", "newrank": "true",
        },
        node_attr={
            "shape": "box", "style": "rounded,filled", "fontname": FONT, "fontsize": "14",
            "color": "#444444", "height": "0.3", "width": "0.3", "margin": "0.08,0.03",
        },
        edge_attr={"penwidth": "1.6", "arrowsize": "0.7"},
    )  # fmt: skip


def _cell(graph: Any, title: str, gene: Gene, concat: range | list[int]) -> None:
    prefix = title.split()[0]
    states = [f"{prefix}_{state}" for state in range(2 + len(gene))]
    with graph.subgraph(name=f"cluster_{prefix}") as cell:
        cell.attr(label=title, style="rounded", color="#BBBBBB", labeljust="l", fontsize="15", margin="12")
        cell.node(states[0], C.format("k-2"), fillcolor="#FFF3C4")
        cell.node(states[1], C.format("k-1"), fillcolor="#FFF3C4")
        cell.node(f"{prefix}_out", C.format("k"), fillcolor="#D5EFD9")
        for number, node in enumerate(gene):
            cell.node(states[2 + number], str(number), fillcolor="#DCE9F5")
            for index, (operation, state) in enumerate(node):
                colour = COLOURS[PRIMITIVES[operation].kind]
                name = f"{prefix}_{number}_{index}"
                _operation(cell, name, operation, colour, states[state], states[2 + number])
        for state in concat:
            cell.edge(states[state], f"{prefix}_out", color="#888888", style="dashed")


def _operation(graph: Any, name: str, operation: str, colour: str, source: str, target: str) -> None:
    """A label on the line from one state to another."""
    graph.node(name, operation, color=colour, fillcolor=colour, fontcolor="white", fontsize="13")
    graph.edge(source, name, color=colour, arrowhead="none")
    graph.edge(name, target, color=colour)


def genotype_png(genotype: Genotype, caption: str = "") -> bytes:
    """Both cells as a PNG. Raises what `source` and `render` raise."""
    return render(source(genotype, caption), "png")


def cell_png(cell: Cell, caption: str = "") -> bytes:
    """A cell of NAS-Bench-201 as a PNG. Raises what `cell_source` and `render` raise."""
    return render(cell_source(cell, caption), "png")


def render(dot_source: str, file_format: str) -> bytes:
    """The picture as bytes: "png", "svg" or "pdf". Drawn by `dot` from the PATH, else by the Graphviz that
    pygraphviz's wheels bundle.

    Raises:
        NoGraphviz: neither is there.
        RuntimeError: Graphviz could not draw it.
    """
    if shutil.which("dot"):
        done = subprocess.run(
            ["dot", f"-T{file_format}"],
            input=dot_source.encode(),
            capture_output=True,
            check=False,
            start_new_session=True,  # Ctrl-C, by which a run finishes its step, does not end the drawing
        )
        if done.returncode:
            raise RuntimeError(f"dot failed: {done.stderr.decode(errors='replace').strip()}")
        return done.stdout
    try:
        from pygraphviz import AGraph
    except ImportError as error:
        raise NoGraphviz("no Graphviz: neither `dot` on the PATH nor the package pygraphviz") from error
    with _without_fontconfig_lines():
        return AGraph(string=dot_source).draw(format=file_format, prog="dot")


@contextmanager
def _without_fontconfig_lines() -> Iterator[None]:
    """Keeps off stderr what the fontconfig inside pygraphviz's wheels says of the system's newer settings.
    All else that is written there meanwhile is passed on."""
    try:
        stderr = os.dup(2)
    except OSError:  # it is closed: there is nothing to keep clean
        yield
        return
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)  # more than a pipe holds is lost instead of waiting for a reader
    os.dup2(write_end, 2)
    os.close(write_end)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        with open(read_end, "rb") as lines:
            for line in lines:
                if not line.startswith(b"Fontconfig "):
                    os.write(2, line)


def picture_path(title: str, out: str | None, file_format: str | None) -> Path:
    """Where the picture of a genotype goes: `out`, else `title` with the format's suffix (SVG), a new file.

    Raises:
        InputError: `out` has no suffix of a picture, or another one than `file_format`, or is a folder; the
            file named after the title exists.
    """
    if out is None:
        path = Path(f"{title}.{file_format or FORMATS[0]}")
        if os.path.exists(path):
            raise InputError(f"{str(path)!r} exists and is not overwritten; name it by --out to replace it")
        return path
    path = Path(out)
    suffix = path.suffix.lower().removeprefix(".")
    if suffix not in FORMATS:
        raise InputError(f"--out must end in .{', .'.join(FORMATS[:-1])} or .{FORMATS[-1]}, not {out!r}")
    if file_format not in (None, suffix):
        raise InputError(f"--out {out!r} contradicts --format {file_format}; leave one of them out")
    if os.path.isdir(path):
        raise InputError(f"--out must be a file, and {out!r} is a folder")
    return path


def save(genotype: Genotype, path: Path, caption: str = "") -> None:
    """Draws both cells into `path`, whose suffix is the format.

    Raises:
        InputError: a cell is too large to be drawn, or the file cannot be written.
        RunError: there is no Graphviz, or it failed. Where only the program is missing, the figure's source
            is written, with the suffix .gv, unless that file exists.
    """
    try:
        dot_source = source(genotype, caption)
    except NoGraphviz as error:
        raise RunError(str(error)) from error
    except ValueError as error:
        raise InputError(str(error)) from error
    try:
        picture = render(dot_source, path.suffix.lower().removeprefix("."))
    except NoGraphviz as error:
        text = path.with_suffix(".gv")
        if os.path.exists(text):
            raise RunError(f"{error}; the source is not written instead, {str(text)!r} exists") from error
        _write(text, dot_source.encode())
        raise RunError(f"{error}; wrote the source {str(text)!r} instead, which `dot` can draw") from error
    except RuntimeError as error:
        raise RunError(" ".join(str(error).split())) from error
    _write(path, picture)


def _write(path: Path, content: bytes) -> None:
    with writing(path):
        write_atomically(path, content)


def alpha_heat_map(alphas: np.ndarray, title: str, names: Names = DARTS.names) -> bytes:
    """A PNG of the softmaxed alphas [edges, candidates]: a row an edge, a column a candidate, its weight in
    the cell; blank where it is 0: the edge does not have the candidate, or has been decided.

    Coloured by the distance from 1 / candidates of the edge, where each of them starts.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 6.5), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    alphas = np.where(alphas == 0, np.nan, alphas)
    moved = alphas - 1 / np.isfinite(alphas).sum(axis=1, keepdims=True).clip(min=1)
    reach = np.nanmax(np.abs(moved)) or 1.0
    image = axes.imshow(moved, cmap="RdBu_r", aspect="auto", vmin=-reach, vmax=reach)
    axes.set_xticks(range(len(names.candidates)), names.candidates, rotation=30, ha="right")
    axes.set_yticks(range(len(names.edges)), names.edges)
    axes.set_title(title)
    for row, column in np.argwhere(np.isfinite(alphas)):
        colour = "white" if abs(moved[row, column]) > 0.6 * reach else "black"
        text = f"{alphas[row, column]:.4f}"
        axes.text(column, row, text, ha="center", va="center", fontsize=8, color=colour)
    figure.colorbar(image, label="softmax(alpha) - 1 / candidates")
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


class Curve(NamedTuple):
    """Values of the epochs from 1 on, how their line is drawn, and its name in the legend ("": none), where
    each name is once."""

    values: list[float]
    colour: str
    dashed: bool
    width: float
    label: str


class Panel(NamedTuple):
    """Curves on common axes."""

    title: str
    curves: list[Curve]


def curves(panels: list[Panel]) -> bytes:
    """A PNG of accuracies in percent by epoch, the panels side by side. The first epochs, which are far below
    the others, may lie outside: an axis begins at the least value of the second half of the epochs, and a
    little below."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(6 * len(panels), 4.6), dpi=100, layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        axes.set_title(panel.title)
        axes.set_xlabel("epoch")
        axes.set_ylabel("top-1 accuracy (%)")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        named = {""}
        for values, colour, dashed, width, label in panel.curves:
            style = {"linestyle": "--" if dashed else "-", "marker": "." if len(values) < 20 else ""}
            epochs = range(1, len(values) + 1)
            axes.plot(
                epochs,
                values,
                color=colour,
                linewidth=width,
                label=None if label in named else label,
                **style,
            )
            named.add(label)
        late = [value for curve in panel.curves for value in curve.values[len(curve.values) // 2 :]]
        if late:
            margin = 0.1 * (max(late) - min(late)) + 0.1
            axes.set_ylim(min(late) - margin, max(late) + margin)
            axes.legend(loc="best", fontsize=8)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()
