"""The ambient state in which integers are decided and kernels are checked, whatever the caller has set."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch

EXACT = ("ieee", "none")
"""Precisions that leave a float32 product a float32 product; others round its operands (bf16, tf32)."""

_lock = threading.Lock()
_inside = 0
_undo: list[Callable[[], None]] = []


@contextmanager
def plain_context(device: torch.device | str = "cpu") -> Iterator[None]:
    """float32 by default, on ``device`` by default, no autocast, no inference mode, no gradients, exact products, and
    oneDNN, where there is one.

    Inside, a quantization gives the integers that it gives in a fresh process. What the caller had is back afterwards.
    The default dtype and the precision of products belong to the whole process: other threads see them, too, from when
    the first of them enters to when the last one leaves.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        for kind in ("cpu", "cuda"):
            stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(on_device(device))
        stack.enter_context(_plain_process())
        yield


def on_device(device: torch.device | str) -> AbstractContextManager[object]:
    """``device`` by default; nothing where it is already, since PyTorch looks at every call under such a context."""
    wanted = torch.device(device)
    return nullcontext() if default_device() == wanted else wanted


def default_device() -> torch.device:
    """Where a new tensor goes; ``torch.get_default_device`` of 2.9 fails after ``set_default_device(None)``."""
    return torch.empty(0).device


@contextmanager
def _plain_process() -> Iterator[None]:
    """What is plain for the whole process at once."""
    global _inside
    with _lock:
        _inside += 1
        if _inside == 1:
            _make_plain()
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            while not _inside and _undo:
                _undo.pop()()


def _make_plain() -> None:
    dtype = torch.get_default_dtype()
    if dtype != torch.float32:
        torch.set_default_dtype(torch.float32)
        _undo.append(lambda: torch.set_default_dtype(dtype))
    mkldnn: Any = torch.backends.mkldnn
    if not mkldnn.enabled:  # torch.export turns it off, for all threads
        mkldnn.enabled = True
        _undo.append(lambda: setattr(mkldnn, "enabled", False))
    for backend in (mkldnn.matmul, mkldnn.conv, torch.backends.cuda.matmul):
        _make_exact(backend)


def _make_exact(backend: Any) -> None:
    """Full float32 products of one backend: ``set_float32_matmul_precision("medium")`` rounds them to bfloat16."""
    before = backend.fp32_precision
    if before in EXACT:
        return
    general: Any = torch.backends
    inherited = before == general.fp32_precision  # which it follows again afterwards
    backend.fp32_precision = "ieee"
    _undo.append(lambda: setattr(backend, "fp32_precision", "none" if inherited else before))
