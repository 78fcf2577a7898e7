"""What tests of packed layers share."""

import pytest
import torch


@pytest.fixture
def clean_compiler():
    """No compiled code of another test."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
