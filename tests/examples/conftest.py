"""The scripts as a person runs them, and a model on disk as they load it."""

import importlib.util
import sys
from pathlib import Path

import pytest
from families import shortened
from transformers import ViTImageProcessor

FOLDER = Path(__file__).parents[2] / "examples" / "vision_transformer"


@pytest.fixture
def script(monkeypatch, capsys):
    """Run a script in this process: (exit code, standard output, standard error)."""
    monkeypatch.syspath_prepend(str(FOLDER))

    def call(name, *arguments, before=lambda module: None):
        spec = importlib.util.spec_from_file_location(f"script_{name}", FOLDER / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        before(module)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        run = module.run if hasattr(module, "run") else lambda main: sys.exit(main())
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            run(module.main)
        captured = capsys.readouterr()
        return stopped.value.code, captured.out, captured.err

    return call


@pytest.fixture
def tiny_vit(tiny_vit):
    """Of one block and 7 Linear layers: the second is like the first."""
    return shortened(tiny_vit)


@pytest.fixture
def model(tiny_vit, tmp_path):
    """A folder with a tiny classifier and its image processor."""
    folder = tmp_path / "vit"
    tiny_vit.save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder
