"""The codes of a packed layer with a byte for each, as the product reads them."""

from __future__ import annotations

import torch
from torch import Tensor

from fairseq.modules.quantization.packed.packing import PLANES


def byte_codes(codes: Tensor, bits: int, inputs: int) -> Tensor:
    """int8 (N, inputs), from the codes of a packed layer: uint8 planes below 5 bits, int8 (N, inputs) else."""
    if codes.dtype != torch.uint8:
        return codes
    from fairseq.modules.quantization.packed.kernels.triton import unpack  # imports Triton

    return unpack.run(codes, PLANES[bits], inputs)
