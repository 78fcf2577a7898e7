"""The ambient state in which integers are decided and kernels are checked, whatever the caller has set."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

EXACT = ("ieee", "none")
"""Precisions that leave a float32 product a float32 product; others round its operands (bf16, tf32)."""


@contextmanager
def plain_context(device: torch.device | str = "cpu") -> Iterator[None]:
    """float32 by default, on ``device`` by default, no autocast, no inference mode, no gradients, exact products.

    Inside, a quantization gives the integers that it gives in a fresh process. What the caller had is back afterwards.
    The default dtype and the precision of products belong to the whole process: other threads see them, too.
    """
    dtype = torch.get_default_dtype()
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        for kind in ("cpu", "cuda"):
            stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(torch.device(device))
        mkldnn: Any = torch.backends.mkldnn
        for backend in (mkldnn.matmul, mkldnn.conv, torch.backends.cuda.matmul):
            stack.enter_context(_exact(backend))
        if dtype != torch.float32:
            torch.set_default_dtype(torch.float32)
            stack.callback(torch.set_default_dtype, dtype)
        yield


@contextmanager
def _exact(backend: Any) -> Iterator[None]:
    """Full float32 products of one backend: ``set_float32_matmul_precision("medium")`` rounds them to bfloat16."""
    before = backend.fp32_precision
    if before in EXACT:
        yield
        return
    backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        backend.fp32_precision = before
