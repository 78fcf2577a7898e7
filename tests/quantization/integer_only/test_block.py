"""The residual stream saturates at 22 bits, wherever something is added to it."""

import torch

from fairseq.modules.quantization.integer.dyadic import Requantize
from fairseq.quantization.integer_only.block import add
from fairseq.quantization.integer_only.layers import IntegerLinear
from fairseq.quantization.integer_only.model import IntegerViT

LOW, HIGH = -(2**21), 2**21 - 1


def test_sums_saturate():
    h, branch = torch.tensor([HIGH, LOW, 5, HIGH]), torch.tensor([1, -1, 6, LOW])
    assert add(h, branch).tolist() == [HIGH, LOW, 11, -1]


def test_embeddings_saturate():
    weight = torch.tensor([[127], [-127]])
    patches = IntegerLinear(weight, Requantize(torch.full((2,), 100.0).double(), None, 22))
    constants = torch.tensor([[HIGH, LOW], [HIGH, LOW], [0, 0]])
    grid = torch.zeros(1), torch.ones(1)
    model = IntegerViT(None, (1, 2), (1, 1), 16, grid, patches, constants, [], torch.nn.Identity())
    h = model.embed(torch.tensor([[[[255, 129]]]], dtype=torch.uint8))
    assert h.tolist() == [[[HIGH, LOW], [HIGH, LOW], [12700, -12700]]]
