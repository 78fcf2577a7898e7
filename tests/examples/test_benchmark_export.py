"""benchmark_export.py: one line for each file and batch size."""

import importlib.util
import sys
from pathlib import Path

import pytest

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

FOLDER = Path(__file__).parents[2] / "examples" / "vision_transformer"


@pytest.mark.slow
def test_it_measures_each_file(model, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location("benchmark_export", FOLDER / "benchmark_export.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.PAUSE, script.FORWARDS = 0, 1
    script.OURS = {"ours 4-bit": {"bits": 4}}
    arguments = ["--model", str(model), "--batch", "1", "2", "--rounds", "1", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", ["benchmark_export.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        script.run(script.main)
    printed = capsys.readouterr().out
    assert stopped.value.code == 0
    assert printed.count("ours 4-bit, batch") == 2
    assert printed.count("onnxruntime dynamic QInt8, channel, batch") == 2
