"""PackedTable: rows within half a step, read singly as all together; embeddings and parameters that are made of it."""

import copy
import pickle

import pytest
import torch
from bounds import eps, is_within
from torch import nn

from fairseq.modules.quantization.packed import LinearConfig
from fairseq.modules.quantization.packed.table import (
    PackedEmbedding,
    PackedParameters,
    PackedTable,
    pack_parameter,
    unpack_parameters,
)

CONFIG = LinearConfig(bits=8, method="channel", activations=None)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("group_size", [None, 32])
def test_rows_are_within_half_a_step(bits, group_size):
    torch.manual_seed(0)
    embedding = nn.Embedding(7, 72)
    config = LinearConfig(bits=bits, method="channel", activations=None, group_size=group_size)
    packed = PackedEmbedding.from_float(embedding, config, "positions")
    step = packed.scale if group_size is None else packed.scale.repeat_interleave(32, 1)[:, :72].T
    assert (step / 2 * 1.001 >= (packed.weight - embedding.weight).abs().T).all()
    assert packed.weight_codes.numel() <= 7 * 72 * {2: 2, 3: 4, 4: 4, 5: 8, 8: 8}[bits] / 8 + 7 * 4
    ids = torch.tensor([[3, 3], [0, 6]])
    assert torch.equal(packed(ids), packed.weight[ids])
    blank = PackedEmbedding(7, 72, config, "positions", device="meta")
    blank.load_state_dict(packed.state_dict(), assign=True)
    assert all(torch.equal(value, packed.state_dict()[key]) for key, value in blank.state_dict().items())


def test_dtype():
    packed = PackedEmbedding.from_float(nn.Embedding(4, 6), CONFIG, "positions").half()
    assert packed.scale.dtype == torch.float32
    assert packed.weight.dtype == packed(torch.tensor([1])).dtype == torch.float16


def test_another_width_is_not_loaded():
    other = PackedTable(4, 6, LinearConfig(bits=5, method="channel"))
    with pytest.raises(ValueError, match=r"saved with 5 bits, .* has 8 bits"):
        PackedTable(4, 6, CONFIG).load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match="method must be 'channel' or 'histogram', got 'tensor'"):
        PackedTable(4, 6, LinearConfig())


class Owner(nn.Module):
    def __init__(self):
        super().__init__()
        self.positions, self.others = nn.Parameter(torch.randn(1, 5, 8)), nn.Parameter(torch.randn(1, 3, 8))
        self.flat = nn.Parameter(torch.randn(5, 8))

    def forward(self, x):
        return x + self.positions


def test_parameters_become_tables_and_come_back():
    torch.manual_seed(0)
    owner = Owner()
    before, x = copy.deepcopy(owner), torch.randn(2, 5, 8)
    for name in ("positions", "others"):
        pack_parameter(owner, name, CONFIG, name)
    assert isinstance(owner, Owner)
    assert isinstance(owner, PackedParameters)
    assert type(owner).__name__ == "Owner"
    assert set(dict(owner.named_parameters())) == {"flat"}
    steps = owner.packed_positions.scale[:, None]
    assert is_within(owner(x), before(x), 1.001 * steps / 2 + eps(torch.float32) * before(x).abs())
    assert not torch.equal(owner(x), before(x))
    for twin in (copy.deepcopy(owner), pickle.loads(pickle.dumps(owner))):
        assert torch.equal(twin(x), owner(x))
        assert type(twin) is type(owner)
    assert owner.half().positions.dtype == torch.float16
    owner.float()
    rounded = owner.others.clone()
    unpack_parameters(owner)
    assert type(owner) is Owner
    assert torch.equal(owner.others, rounded)
    with pytest.raises(
        ValueError, match=r"model.flat must be of shape \(1, rows, columns\) to be packed, got \(5, 8\)"
    ):
        pack_parameter(owner, "flat", CONFIG, "model.flat")
