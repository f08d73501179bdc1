"""Search spaces other than the paper's: named ones, and a user's own file."""

import json
import os
import reprlib
from pathlib import Path
from typing import Any

from darts_fast.errors import InputError
from darts_fast.files import Unreadable, read_json
from darts_fast.space import DARTS, EDGES, PRIMITIVES, Candidates, Space, edges

# What an edge may have. (The factorized convolution has no second derivative on the kernels.)
SEARCHABLE = tuple(name for name in PRIMITIVES if name != "conv_7x1_1x7")


def _same(*names: str) -> Space:
    """The same candidates on every edge."""
    return Space((names,) * len(EDGES), (names,) * len(EDGES))


# RobustDARTS (arXiv 1909.09656), section 3: spaces in which DARTS collapses. S1 has on each edge the two
# candidates that its authors found strongest there.
_SKIP, _SEP, _DIL3, _DIL5 = "skip_connect", "sep_conv_3x3", "dil_conv_3x3", "dil_conv_5x5"
_MAX, _AVERAGE = "max_pool_3x3", "avg_pool_3x3"
_S1 = Space(
    normal=(
        (_SKIP, _DIL3), (_SKIP, _DIL5),
        (_SKIP, _DIL5), (_SKIP, _SEP), (_SKIP, _DIL3),
        (_MAX, _SKIP), (_SKIP, _SEP), (_SKIP, _SEP), (_SKIP, _DIL3),
        (_SKIP, _SEP), (_MAX, _SKIP), (_SKIP, _DIL3), (_DIL3, _DIL5), (_DIL3, _DIL5),
    ),
    reduce=(
        (_MAX, _AVERAGE), (_MAX, _DIL3),
        (_MAX, _AVERAGE), (_MAX, _AVERAGE), (_SKIP, _DIL5),
        (_MAX, _AVERAGE), (_MAX, _SEP), (_SKIP, _DIL3), (_SKIP, _DIL5),
        (_MAX, _AVERAGE), (_MAX, _AVERAGE), (_SKIP, _DIL5), (_SKIP, _DIL5), (_SKIP, _DIL5),
    ),
)  # fmt: skip
SPACES = {
    "darts": DARTS,
    "s1": _S1,
    "s2": _same(_SKIP, _SEP),
    "s3": _same("none", _SKIP, _SEP),
    "s4": _same(_SEP, "noise"),
}


def read_space(text: str) -> Space:
    """The space of that name; of a JSON file; or of what such a file holds, written out.

    A file holds `nodes` (1 to 8) and the candidates of `normal` and of `reduce` cells: a list of names, which
    every edge has, or a list of such lists, one an edge. Edges are in the order of `space.edges`: those of
    node 0 from states 0 and 1, then those of node 1 from states 0, 1 and 2, and so on.

    Raises:
        InputError: it is none of these; the sentence says what is wrong.
    """
    if text in SPACES:
        return SPACES[text]
    if text.lstrip().startswith("{"):
        try:
            found = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputError(f"space is no JSON ({error})") from error
        return _space_of(found, "space")
    if not os.path.lexists(text):
        raise InputError(
            f"space must be {', '.join(SPACES)}, nasbench201, or a JSON file; there is no file "
            f"{reprlib.repr(text)}"
        )
    try:
        return _space_of(read_json(Path(text)), text)
    except Unreadable as error:
        raise InputError(f"{text} {error}") from error


def _space_of(found: Any, place: str) -> Space:
    if not isinstance(found, dict) or set(found) != {"nodes", "normal", "reduce"}:
        raise InputError(f"{place} must have nodes, normal and reduce, and nothing else")
    nodes = found["nodes"]
    if type(nodes) is not int or not 1 <= nodes <= 8:
        raise InputError(f"{place}: nodes must be a whole number from 1 to 8, not {reprlib.repr(nodes)}")
    normal, reduce = (
        _candidates(found[kind], len(edges(nodes)), f"{place}: {kind}") for kind in ("normal", "reduce")
    )
    return Space(normal, reduce, nodes)


def _candidates(found: Any, count: int, place: str) -> Candidates:
    if type(found) is list and found and all(type(name) is str for name in found):
        found = [found] * count
    if type(found) is not list or len(found) != count:
        raise InputError(
            f"{place} must be a list of operations, or a list of {count} such lists, one an edge"
        )
    for number, of_edge in enumerate(found):
        where = f"{place}, edge {number}"
        if type(of_edge) is not list or not of_edge or len(set(map(str, of_edge))) < len(of_edge):
            raise InputError(f"{where} must be a list of different operations")
        for name in of_edge:
            if name not in SEARCHABLE:
                raise InputError(
                    f"{where}: {reprlib.repr(name)} is no candidate; known: {', '.join(SEARCHABLE)}"
                )
        if of_edge == ["none"]:
            raise InputError(f"{where} needs a candidate other than none")
    return tuple(tuple(name for name in PRIMITIVES if name in of_edge) for of_edge in found)


def written_out(space: Space) -> str:
    """What `read_space` reads, in a line: its name, or its JSON."""
    for name, named in SPACES.items():
        if space == named:
            return name
    return json.dumps({"nodes": space.nodes, "normal": space.normal, "reduce": space.reduce})
