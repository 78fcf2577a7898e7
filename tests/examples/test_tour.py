"""The notebook: every cell runs, in order, and says what it is there to say."""

import ast
import json
import re
import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

EXAMPLES = Path(__file__).parent.parent.parent / "examples" / "vision_transformer"


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tour")
    for name in ("assets", "cifar10-vit"):
        shutil.copytree(EXAMPLES / name, folder / name)
    notebook = nbformat.read(EXAMPLES / "tour.ipynb", as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
    return notebook


def printed(notebook):
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output.get("text", "") for output in outputs if output.output_type == "stream")


def test_it_is_committed_without_outputs():
    notebook = json.loads((EXAMPLES / "tour.ipynb").read_text(encoding="utf-8"))
    assert all(not cell.get("outputs") and cell.get("execution_count") is None for cell in notebook["cells"])


def test_what_its_cells_import_is_there():
    notebook = json.loads((EXAMPLES / "tour.ipynb").read_text(encoding="utf-8"))
    codes = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    lines = [line for code in codes for line in ast.parse(code).body]
    imports = [line for line in lines if isinstance(line, (ast.Import, ast.ImportFrom))]
    assert any(getattr(line, "module", "") == "fairseq.models.vit_quantization" for line in imports)
    exec(compile(ast.Module(imports, []), "tour.ipynb", "exec"), {})


@pytest.mark.slow
def test_every_cell_runs(executed):
    text = printed(executed)
    kept = float(re.search(r"([\d.]+)% of the classes kept", text)[1])
    assert 90 < kept < 100
    assert "37 4-bit channel" in text
    page = Path(re.search(r"^(/\S+report\.html)$", text, re.MULTILINE)[1])
    assert "It keeps" in page.read_text(encoding="utf-8")
    pictures = [output for cell in executed.cells for output in cell.get("outputs", []) if "data" in output]
    assert sum("image/png" in output["data"] for output in pictures) == 2
