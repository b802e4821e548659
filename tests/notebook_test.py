"""The notebook runs from top to bottom in a short form, and is stored without outputs."""

from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parent.parent / "notebooks" / "quickstart.ipynb"


def test_the_quickstart_runs(monkeypatch):
    monkeypatch.setenv("FEDQSN_NOTEBOOK_ROUNDS", "2")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    # Most of its time is compilation.
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    client = NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": str(NOTEBOOK.parent.parent)}}
    )
    client.execute()
    shown = [output for cell in code for output in cell.outputs]
    pictures = [output for output in shown if "image/png" in output.get("data", {})]
    assert len(pictures) == 2
    text = "".join(str(output.get("text", "")) for output in shown)
    assert "bytes instead of 340,008" in text
    assert not any(output.output_type == "error" for output in shown)
