"""Tokens rounded and back in one native call, for layers that only emulate integers."""

from __future__ import annotations

import torch
from torch import Tensor

from fairseq.modules.quantization.packed.kernels import functional, native, native_calls
from fairseq.modules.quantization.packed.kernels.choose import runs_native


def round_tokens(x: Tensor, bits: int) -> Tensor | None:
    """Each token rounded and back: float32 (..., features) -> the same, with the bits of ``scalar/tokens.py``.

    None where those have to do it: on another device or in another dtype, while operations are recorded, and where the
    native kernels were not built or are not wanted.
    """
    if functional.capturing() or not functional.plain(x) or x.device.type != "cpu" or x.dtype != torch.float32:
        return None
    if x.numel() == 0 or not runs_native("auto") or not native.levels():
        return None
    rows = x.detach().reshape(-1, x.shape[-1]).contiguous()
    return native_calls.round_tokens(rows, bits, native.level_number()).view(x.shape)
