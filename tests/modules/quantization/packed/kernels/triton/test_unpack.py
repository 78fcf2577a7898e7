"""Packed weights to bytes: on a GPU, or interpreted on the CPU."""

import pytest
import torch

from fairseq.modules.quantization.packed.packing import PLANES, pack

pytest.importorskip("triton")

from fairseq.modules.quantization.packed.kernels.triton import unpack


@pytest.mark.parametrize("inputs", [1, 7, 75, 768, 1030])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_it_undoes_packing(bits, inputs, device):
    q = torch.randint(0, 2**bits, (3, inputs), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    codes = unpack.run(pack(q, bits).to(device), PLANES[bits], inputs)
    assert codes.dtype == torch.int8
    assert torch.equal(codes.cpu(), q.view(torch.int8))
