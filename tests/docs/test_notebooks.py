"""The notebooks run from top to bottom on tiny settings, and what they show in the repository is from a whole run."""

import json
from pathlib import Path

import pytest
from IPython.core.interactiveshell import InteractiveShell
from traitlets.config import Config

from .conftest import as_command
from .pages import LINK, REPOSITORY


NOTEBOOKS = sorted((REPOSITORY / "docs" / "notebooks").glob("*.ipynb"))
# What is added to the cell tagged `parameters`.
TINY = {"first_flow": "\nteacher_epochs = judge_epochs = max_train_steps = 1"}
MAX_BYTES = 300_000

pytestmark = pytest.mark.usefixtures("settings_of_torch")
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read_cells(path: Path, cell_type: str) -> list[dict]:
    cells = json.loads(path.read_text())["cells"]
    return [{**cell, "source": "".join(cell["source"])} for cell in cells if cell["cell_type"] == cell_type]


@pytest.fixture
def shell(clone, monkeypatch):
    """IPython in this process: a kernel for each notebook would import torch again."""
    monkeypatch.setenv("IPYTHONDIR", str(clone / "ipython"))
    with as_command("notebook", []):
        yield InteractiveShell.instance(config=Config({"HistoryManager": {"enabled": False}}))
    InteractiveShell.clear_instance()


@each_notebook
def test_a_notebook_runs(path, shell):
    for cell in read_cells(path, "code"):
        source = cell["source"]
        if "parameters" in cell["metadata"].get("tags", []):
            source += TINY[path.stem]
        shell.run_cell(source).raise_error()


@each_notebook
def test_a_notebook_holds_the_outputs_of_one_whole_run(path):
    cells = read_cells(path, "code")
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not any(output["output_type"] == "error" for output in outputs)
    assert not any(output.get("name") == "stderr" for output in outputs)  # progress bars, and paths of a machine
    assert path.stat().st_size <= MAX_BYTES


@each_notebook
def test_the_links_of_a_notebook_exist(path):
    text = "\n".join(cell["source"] for cell in read_cells(path, "markdown"))
    assert text.startswith("[![Open in Colab](") and f"/blob/main/docs/notebooks/{path.name})" in text
    for target in LINK.findall(text):
        assert target.startswith("https://") or (path.parent / target).exists(), target
