"""Who may import whom: the rooms of the house."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# What each module of ours may import of ours. The package itself and those which call the rooms are free but
# for FORBIDDEN and ONLY_FROM; every other module is listed.
ALLOWED = {
    "darts_fast.errors": set(),
    "darts_fast.distributed": {"darts_fast.errors"},
    "darts_fast.files": set(),
    "darts_fast.state": set(),
    "darts_fast.space": set(),
    "darts_fast.config": {"darts_fast.errors"},
    "darts_fast.genotype": {"darts_fast.errors", "darts_fast.space"},
    "darts_fast.card": {"darts_fast.tables"},
    "darts_fast.notation": {"darts_fast.errors", "darts_fast.files", "darts_fast.genotype"},
    "darts_fast.diagnosis": {"darts_fast.genotype", "darts_fast.space"},
    "darts_fast.perturb": {"darts_fast.architect"},
    "darts_fast.evaluation": {"darts_fast.data", "darts_fast.distributed"},
    "darts_fast.search_step": {
        "darts_fast.architect",
        "darts_fast.config",
        "darts_fast.cost",
        "darts_fast.evaluation",
        "darts_fast.flat",
        "darts_fast.perturb",
        "darts_fast.precision",
        "darts_fast.profiling",
    },
    "darts_fast.train_step": {
        "darts_fast.architect",
        "darts_fast.config",
        "darts_fast.derived",
        "darts_fast.evaluation",
        "darts_fast.precision",
        "darts_fast.profiling",
    },
    "darts_fast.cost": {"darts_fast.genotype", "darts_fast.space"},
    "darts_fast.projection": {"darts_fast.architect", "darts_fast.genotype", "darts_fast.space"},
    "darts_fast.spaces": {"darts_fast.errors", "darts_fast.files", "darts_fast.space"},
    "darts_fast.flat": set(),
    "darts_fast.reference": {"darts_fast.space"},
    "darts_fast.architect": {"darts_fast.profiling"},
    "darts_fast.curvature": {"darts_fast.architect"},
    "darts_fast.profiling": set(),
    "darts_fast.trace": {"darts_fast.profiling"},
    "darts_fast.report": {"darts_fast.profiling", "darts_fast.tables", "darts_fast.trace"},
    "darts_fast.precision": set(),
    "darts_fast.process": {"darts_fast.fused"},
    "darts_fast.tables": set(),
    "darts_fast.traffic": set(),
    "darts_fast.capture": set(),
    "darts_fast.data": {"darts_fast.errors"},
    "darts_fast.supernet": {
        "darts_fast.flat",
        "darts_fast.fused",
        "darts_fast.reference",
        "darts_fast.space",
    },
    "darts_fast.interop": {
        "darts_fast.derived",
        "darts_fast.errors",
        "darts_fast.genotype",
        "darts_fast.space",
        "darts_fast.supernet",
    },
    "darts_fast.runs": {
        "darts_fast.config",
        "darts_fast.distributed",
        "darts_fast.errors",
        "darts_fast.files",
        "darts_fast.state",
    },
    "darts_fast.cluster": {"darts_fast.errors", "darts_fast.runs"},
    "darts_fast.datasets": {
        "darts_fast.config",
        "darts_fast.data",
        "darts_fast.distributed",
        "darts_fast.errors",
    },
    "darts_fast.stream": {
        "darts_fast.data",
        "darts_fast.datasets",
        "darts_fast.distributed",
        "darts_fast.errors",
    },
    "darts_fast.derived": {
        "darts_fast.errors",
        "darts_fast.files",
        "darts_fast.fused",
        "darts_fast.genotype",
        "darts_fast.notation",
        "darts_fast.reference",
        "darts_fast.space",
        "darts_fast.state",
    },
    "darts_fast.loop": {
        "darts_fast.capture",
        "darts_fast.config",
        "darts_fast.data",
        "darts_fast.datasets",
        "darts_fast.distributed",
        "darts_fast.errors",
        "darts_fast.evaluation",
        "darts_fast.fused",
        "darts_fast.precision",
        "darts_fast.process",
        "darts_fast.profiling",
        "darts_fast.report",
        "darts_fast.runs",
        "darts_fast.state",
        "darts_fast.stream",
        "darts_fast.tables",
    },
    "darts_fast.nasbench201": {
        "darts_fast.errors",
        "darts_fast.flat",
        "darts_fast.reference",
        "darts_fast.space",
    },
    "darts_fast.cells": {
        "darts_fast.config",
        "darts_fast.cost",
        "darts_fast.data",
        "darts_fast.flat",
        "darts_fast.genotype",
        "darts_fast.nasbench201",
        "darts_fast.plot",
        "darts_fast.spaces",
        "darts_fast.supernet",
    },
    "darts_fast.plot": {
        "darts_fast.errors",
        "darts_fast.genotype",
        "darts_fast.nasbench201",
        "darts_fast.runs",
        "darts_fast.space",
    },
    "darts_fast.protocol_report": {
        "darts_fast.config",
        "darts_fast.errors",
        "darts_fast.genotype",
        "darts_fast.plot",
        "darts_fast.runs",
        "darts_fast.tables",
        "darts_fast.train",
    },
    "darts_fast.kernels": set(),
    "darts_fast.fused": {
        "darts_fast.kernels",
        "darts_fast.reference",
        "darts_fast.space",
        "darts_fast.traffic",
    },
}
FREE = {
    "darts_fast",
    "darts_fast.cli",
    "darts_fast.export",
    "darts_fast.protocol",
    "darts_fast.search",
    "darts_fast.train",
}
FORBIDDEN = {("darts_fast.search", "darts_fast.train"), ("darts_fast.train", "darts_fast.search")}
ONLY_FROM = {"darts_fast.kernels": {"darts_fast.fused"}}


def modules():
    for path in sorted((ROOT / "darts_fast").glob("*.py")):
        yield ("darts_fast" if path.stem == "__init__" else f"darts_fast.{path.stem}"), path
    for path in sorted((ROOT / "kernels").rglob("*.py")):
        yield "darts_fast.kernels", path


def imported(path):
    """Every module name that the file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def ours(names):
    known = {name for name, _ in modules()}
    kernels = {"darts_fast.kernels" for name in names if name.startswith("darts_fast.kernels")}
    return {name for name in names if name in known and name != "darts_fast"} | kernels


@pytest.mark.parametrize(("name", "path"), list(modules()))
def test_import_rules(name, path):
    found = imported(path)
    assert ours(found) - {name} <= ALLOWED.get(name, ours(found))
    assert not [other for other in found if (name, other) in FORBIDDEN]
    assert not [o for o in ours(found) if name not in ONLY_FROM.get(o, {name}) | {o}]
    if name in ("darts_fast.reference", "darts_fast.architect", "darts_fast.curvature", "darts_fast.kernels"):
        external = {other.split(".")[0] for other in found} - {"darts_fast"}
        assert external - sys.stdlib_module_names <= {"torch", "triton"}


def test_the_rules_name_every_module():
    assert set(ALLOWED) | FREE == {name for name, _ in modules()}


def test_importing_needs_no_gpu_and_loads_neither_a_kernel_compiler_nor_what_draws():
    import subprocess

    code = (
        "import sys, darts_fast.protocol; "
        "print({'triton', 'matplotlib', 'graphviz', 'pygraphviz', 'ray'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
