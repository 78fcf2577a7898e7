"""Hooks that a replacement takes over, and layers that cannot be replaced."""

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from fairseq.modules.quantization.scalar import quantize_model_
from fairseq.modules.quantization.scalar.modules.replace import carry_hooks, reason_not_quantizable


def test_every_kind_of_hook_is_carried():
    calls = []
    old = nn.Linear(3, 3)
    old.register_forward_hook(lambda m, args, kwargs, out: calls.append("forward"), with_kwargs=True)
    old.register_forward_pre_hook(lambda m, args, kwargs: calls.append("pre"), with_kwargs=True)
    old.register_full_backward_hook(lambda m, gi, go: calls.append("backward"))
    old.register_full_backward_pre_hook(lambda m, go: calls.append("backward pre"))
    old.register_state_dict_post_hook(lambda *args: calls.append("state"))
    new = nn.Linear(3, 3)
    carry_hooks(old, new)
    new(torch.ones(1, 3)).sum().backward()
    new.state_dict()
    assert calls == ["pre", "forward", "backward pre", "backward", "state"]


def test_quantize_model_keeps_hooks():
    calls = []
    model = nn.Sequential(nn.Linear(3, 3))
    model[0].register_forward_hook(lambda *args: calls.append("forward"))
    quantize_model_(model)
    model(torch.ones(1, 3))
    assert calls == ["forward"]


def test_reasons_not_to_quantize():
    assert reason_not_quantizable(nn.Linear(2, 2)) is None
    assert "computed" in reason_not_quantizable(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)))
    assert "computed" in reason_not_quantizable(prune.l1_unstructured(nn.Linear(2, 2), "weight", 0.5))
    moved = nn.Linear(2, 2)
    moved._hf_hook = object()
    assert "accelerate" in reason_not_quantizable(moved)


def test_an_error_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Linear(4, 4), nn.Embedding(4, 4, sparse=True))
    with pytest.raises(ValueError, match="1: IntEmbedding has no sparse gradients"):
        quantize_model_(model)
    assert [type(m) for m in model] == [nn.Linear, nn.Embedding]
