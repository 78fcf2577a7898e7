"""Some of the moments of tests/interrupted.py, which has the others."""

import os
import random

import pytest
import torch
from interrupted import commands


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no processes that begin where this one is")
@pytest.mark.parametrize(("name", "moments"), [("quantize", 1), ("save_pretrained", 3)])
def test_a_signal_leaves_the_old_or_the_new(name, moments, tmp_path, monkeypatch):
    (tmp_path / "temporary").mkdir()
    (tmp_path / "models").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr("fairseq.quantization.files.SECONDS_TO_LOCK", 0)
    torch.manual_seed(0)
    found = commands(tmp_path / "models")[name].interrupt(moments, random.Random(1), every=moments, runs=1)
    assert found.total() == 2 * moments
