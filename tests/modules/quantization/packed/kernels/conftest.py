"""The kernels of packed layers as in a fresh process."""

import pytest
from broken_kernels import RIGHT, choosing

from fairseq.modules.quantization.packed import kernels
from fairseq.modules.quantization.packed.kernels import cpu


@pytest.fixture
def fresh(monkeypatch):
    """No environment variable, nothing checked so far, and first among the CPU's kernels some that are right."""
    monkeypatch.delenv(kernels.ENVIRONMENT, raising=False)
    monkeypatch.setattr(choosing, "_checked", {})
    monkeypatch.setattr(cpu, "floats_are_faster", lambda: False)
    monkeypatch.setitem(choosing.TABLE, "cpu", RIGHT)
