"""The kernels of packed layers as in a fresh process."""

import pytest
from broken_kernels import RIGHT, choosing

from fairseq.modules.quantization.packed import kernels


@pytest.fixture
def fresh(monkeypatch):
    """No environment variable, nothing checked so far, and in the place of the CPU's kernels some that are right."""
    monkeypatch.delenv(kernels.ENVIRONMENT, raising=False)
    monkeypatch.setattr(choosing, "_checked", {})
    monkeypatch.setitem(choosing.TABLE, "cpu", RIGHT)
