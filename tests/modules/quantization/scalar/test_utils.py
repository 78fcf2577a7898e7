"""quantize_model_: replaces in place, changes no original layer, trains."""

import copy

import pytest
import torch
from torch import nn

from fairseq.modules.quantization.scalar import quantize_model_
from fairseq.modules.quantization.scalar.modules import IntConv2d, IntEmbedding, IntLinear


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.conv = nn.Conv2d(1, 2, 3, padding=1)
        self.head = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, ids):  # (B, 5)
        x = self.embed(ids).unsqueeze(1)  # (B, 1, 5, 8)
        return self.head(self.conv(x).transpose(1, 2).flatten(2)).mean(1)  # (B, 3)


IDS = torch.randint(0, 10, (6, 5), generator=torch.Generator().manual_seed(0))


def test_replaces_every_layer_and_keeps_parameters():
    torch.manual_seed(0)
    model = Small()
    originals, parameters = list(model.modules()), dict(model.named_parameters())
    states = [dict(vars(m)) for m in originals]
    names = quantize_model_(model, p=0.3, bits=4, update_step=7)
    assert names == ["embed", "conv", "head.0", "head.2"]
    kinds = [type(model.get_submodule(n)) for n in names]
    assert kinds == [IntEmbedding, IntConv2d, IntLinear, IntLinear]
    layer = model.head[0]
    assert (layer.p, layer.bits, layer.update_step, layer.method) == (0.3, 4, 7, "histogram")
    now = dict(model.named_parameters())
    assert all(now[name] is parameter for name, parameter in parameters.items())
    replaced = [i for i, m in enumerate(originals) if isinstance(m, nn.Linear | nn.Conv2d | nn.Embedding)]
    assert all(vars(originals[i]).keys() == states[i].keys() for i in replaced)
    assert all(not originals[i]._forward_hooks for i in replaced)


def test_eval_quantizes_weights_and_activations_and_state_loads_back():
    torch.manual_seed(0)
    model = Small().eval()
    exact = model(IDS)
    quantize_model_(model, bits=8)
    close = model(IDS)
    assert 0 < (close - exact).abs().max().item() < 0.1
    assert model.head[0].activation_scale is not None
    fresh = Small().eval()
    quantize_model_(fresh, bits=8)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(IDS), close)
    assert torch.equal(copy.deepcopy(model)(IDS), close)


def test_training_lowers_the_loss():
    torch.manual_seed(0)
    model = Small()
    quantize_model_(model, p=0.5, bits=8, update_step=5)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    target = torch.tensor([0, 1, 2, 0, 1, 2])
    losses = []
    for _ in range(60):
        loss = nn.functional.cross_entropy(model.train()(IDS), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


def test_a_shared_layer_stays_shared():
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    assert quantize_model_(model) == ["0", "2"]
    assert model[0] is model[2]


def test_errors():
    with pytest.raises(ValueError, match="Linear cannot be replaced inside itself"):
        quantize_model_(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"no Linear, Conv2d or Embedding.*ReLU"):
        quantize_model_(nn.Sequential(nn.ReLU()))
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="bits must be from 2 to 8, got 9"):
        quantize_model_(model, bits=9)
    assert type(model[0]) is nn.Linear
    quantize_model_(model)
    with pytest.raises(ValueError, match="quantized already: 0"):
        quantize_model_(model)
