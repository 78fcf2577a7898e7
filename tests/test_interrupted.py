"""Some of the moments of tests/interrupted.py, which has the others; in a process of its own, that can be forked."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no processes that begin where this one is")
def test_a_signal_leaves_the_old_or_the_new():
    script = Path(__file__).with_name("interrupted.py")
    command = [sys.executable, str(script), "quantize", "save_pretrained", "--moments", "2", "--seed", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert [line.partition(":")[0] for line in ran.stdout.splitlines()] == ["quantize", "save_pretrained"]
