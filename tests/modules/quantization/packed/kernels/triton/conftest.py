"""On a GPU the kernels run there; without one Triton interprets them, which old versions cannot with a new NumPy."""

from pathlib import Path

import pytest
import torch


@pytest.fixture
def device():
    """Where the kernels run."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pytest_collection_modifyitems(items):
    triton = pytest.importorskip("triton")
    version = tuple(map(int, triton.__version__.split(".")[:2]))
    if torch.cuda.is_available() or version >= (3, 6):
        return
    for item in items:
        if item.path.parent == Path(__file__).parent and item.path.name != "test_compiled.py":
            item.add_marker(pytest.mark.skip(reason=f"Triton {triton.__version__} cannot interpret with this NumPy"))
