"""The notebook of examples/ runs from top to bottom, and shows on GitHub what it shows when it runs."""

from pathlib import Path

import nbformat
from nbclient import NotebookClient

PATH = Path(__file__).resolve().parent.parent / "examples" / "search.ipynb"
EPOCHS = "search_epochs, train_epochs = "


def shown(notebook):
    """Of each cell with code, the kinds of its outputs, without what libraries warn of."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [
        [
            sorted(part.get("data", [part.output_type]))
            for part in cell.outputs
            if part.get("name") != "stderr"
        ]
        for cell in code
    ]


def test_the_notebook(tmp_path):
    saved = nbformat.read(PATH, as_version=4)
    assert PATH.stat().st_size < 300_000
    run = nbformat.read(PATH, as_version=4)
    (sizes,) = [cell for cell in run.cells if EPOCHS in cell.source]
    before, found, _ = sizes.source.partition(EPOCHS)
    sizes.source = f"{before}{found}1, 1"  # a search and a training of an epoch
    where = {"metadata": {"path": tmp_path}}
    NotebookClient(run, timeout=300, coalesce_streams=True, resources=where).execute()
    assert shown(run) == shown(saved)
    assert "Test top-1" in str(run.cells) and not list(tmp_path.iterdir())  # its folders are temporary ones
