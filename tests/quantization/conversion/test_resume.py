"""An interrupted quantization goes on after the last finished block, and gives what an uninterrupted one gives."""

import functools
import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from conftest import make_tiny_vit
from transformers import ViTForImageClassification

from fairseq.models.vit_quantization import ViTQuantizer
from fairseq.quantization.calibration import calibration
from fairseq.quantization.conversion import convert as converting
from fairseq.quantization.conversion import resume as resuming

PICTURES = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(3))
SETTINGS = {"bits": 4, "method": "tensor", "activations": "static", "activation_bits": 6, "bias_correction": "add"}


class _Stop(Exception):
    pass


def quantize(model, folder=None, pictures=PICTURES, **changes):
    return ViTQuantizer(**{**SETTINGS, **changes}).quantize_model(model, calibration=pictures, resume=folder)


def interrupted(monkeypatch, model, folder, after=1, **changes):
    """A run that stops in its stage number ``after``."""
    entered = []

    def enter(self, stage):
        if len(entered) == after:
            raise _Stop
        entered.append(stage)
        real(self, stage)

    real = calibration.Calibration.enter
    with monkeypatch.context() as patch:
        patch.setattr(calibration.Calibration, "enter", enter)
        with pytest.raises(_Stop):
            quantize(model, folder, **changes)


@functools.cache
def uninterrupted(execution):
    """The model and the report of a run that was not interrupted."""
    quantizer = ViTQuantizer(**SETTINGS, execution=execution)
    return quantizer.quantize_model(make_tiny_vit(), calibration=PICTURES), quantizer.report


def same(first, second):
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("after", [0, 1, 2])
@pytest.mark.parametrize("execution", ["packed", "emulated"])
def test_it_goes_on_to_the_same_model(monkeypatch, tiny_vit, tmp_path, after, execution):
    folder = tmp_path / "run"
    expected, report = uninterrupted(execution)
    interrupted(monkeypatch, tiny_vit, folder, after, execution=execution)
    stages, rounded = [], []
    real, weigh = converting.quantize_stage, calibration.token_weights
    monkeypatch.setattr(converting, "quantize_stage", lambda *a: stages.append(a[1]) or real(*a))
    monkeypatch.setattr(calibration, "token_weights", lambda *a: rounded.append(a) or weigh(*a))
    quantizer = ViTQuantizer(**SETTINGS, execution=execution)
    got = quantizer.quantize_model(tiny_vit, calibration=PICTURES, resume=folder)
    assert len(stages) == 3 - after  # two blocks and what is outside: what was finished was not done again
    assert not rounded
    assert same(got, expected)
    assert len(quantizer.report.quantized) == 13
    assert quantizer.report == report
    assert not folder.exists()


KILLED = """
import os, signal, sys, torch
from transformers import ViTForImageClassification
from fairseq.models.vit_quantization import ViTQuantizer
from fairseq.quantization.conversion.resume import Resume
folder, model, pictures, threads = sys.argv[1:]
save = Resume.save
Resume.save = lambda *a: (save(*a), os.kill(os.getpid(), signal.SIGKILL))
model = ViTForImageClassification.from_pretrained(model).eval()
torch.set_num_threads(int(threads))  # as the run that goes on: sums in another order may round otherwise
ViTQuantizer(bits=3, method="channel").quantize_model(model, calibration=torch.load(pictures), resume=folder)
"""


@pytest.mark.slow
def test_a_process_that_is_killed(tiny_vit, tmp_path):
    tiny_vit.save_pretrained(tmp_path / "model")
    model = ViTForImageClassification.from_pretrained(tmp_path / "model").eval()
    torch.save(PICTURES, tmp_path / "pictures.pt")
    folder = tmp_path / "run"
    command = [folder, tmp_path / "model", tmp_path / "pictures.pt", torch.get_num_threads()]
    done = subprocess.run([sys.executable, "-c", KILLED, *map(str, command)], env=os.environ, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [path.name for path in sorted(folder.glob("stage-*"))] == ["stage-000.safetensors"]
    quantizer = ViTQuantizer(bits=3, method="channel")
    got = quantizer.quantize_model(model, calibration=PICTURES, resume=folder)
    assert same(got, quantizer.quantize_model(model, calibration=PICTURES))


def test_a_folder_of_another_run_is_refused(monkeypatch, tiny_vit, tmp_path):
    folder = tmp_path / "run"
    interrupted(monkeypatch, tiny_vit, folder)
    with pytest.raises(ValueError, match=r"holds a run of another kind: settings .*bits=4.*now .*bits=5"):
        quantize(tiny_vit, folder, bits=5)
    with pytest.raises(ValueError, match=r"another kind: pictures '8, .*now '7, "):
        quantize(tiny_vit, folder, PICTURES[1:])
    with monkeypatch.context() as patch:
        patch.setattr(resuming, "METHODS", resuming.METHODS + 1)
        with pytest.raises(ValueError, match=r"another kind: version .*now "):
            quantize(tiny_vit, folder)
    with torch.no_grad():
        tiny_vit.classifier.bias[0] += 1
    with pytest.raises(ValueError, match="another kind: model "):
        quantize(tiny_vit, folder)
    assert folder.is_dir()


def test_other_folders_are_refused_and_left(monkeypatch, tiny_vit, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("words")
    with pytest.raises(ValueError, match=r"something else than an interrupted run \(no run.json"):
        quantize(tiny_vit, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "words"
    with pytest.raises(FileNotFoundError, match="does not exist"):
        quantize(tiny_vit, tmp_path / "no" / "run")
    folder = tmp_path / "run"
    interrupted(monkeypatch, tiny_vit, folder)
    stage = folder / "stage-000.safetensors"
    content = stage.read_bytes()
    stage.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"stage-000.safetensors is damaged"):
        quantize(tiny_vit, folder)
    (folder / "run.json").write_text(json.dumps([]))
    with pytest.raises(ValueError, match=r"run.json is damaged"):
        quantize(tiny_vit, folder)
