"""Weights that layers share are rounded once: packed, emulated and the report tell of the same integers."""

import pytest
import torch
from families import pictures
from torch import nn

from fairseq.models.vit_quantization import ViTQuantizer
from fairseq.modules.quantization.packed import PackedLinear
from fairseq.modules.quantization.scalar.weights import weight_to_real
from fairseq.quantization.rounding.quality import sqnr

pytestmark = pytest.mark.filterwarnings("ignore:calibrating on")


def blocks(model):
    return model.vit.encoder.layer if hasattr(model.vit, "encoder") else model.vit.layers


def attention(model, i):
    block = blocks(model)[i].attention
    return getattr(block, "attention", block)


def names(model):
    role = "query" if hasattr(attention(model, 0), "query") else "q_proj"
    found = {id(attention(model, i).get_submodule(role)) for i in range(2)}
    return [name for name, module in model.named_modules() if id(module) in found]


def tie(model):
    """Both blocks' queries with one weight, the biases their own."""
    first, second = (model.get_submodule(name) for name in names(model))
    second.weight = first.weight
    return model


@pytest.mark.parametrize("calibrated", [False, True], ids=["nearest", "gptaq"])
@pytest.mark.parametrize("settings", [{"bits": 4, "method": "tensor"}, {"bits": 3, "method": "channel"}], ids=str)
def test_one_rounding(tiny_vit, settings, calibrated):
    model, images = tie(tiny_vit), pictures(8, 5) if calibrated else None
    first, second = names(model)
    found = {}
    for execution in ("packed", "emulated"):
        quantizer = ViTQuantizer(**settings, execution=execution)
        quantized = quantizer.quantize_model(model, calibration=images)
        one, other = (quantized.get_submodule(name) for name in (first, second))
        assert torch.equal(one.integers(), other.integers())
        assert torch.equal(one.scale, other.scale)
        if execution == "emulated":
            assert one.weight is other.weight
        records = {layer.name: layer for layer in quantizer.report.layers}
        real = weight_to_real(one.integers(), one.scale, one.zero_point)
        for name in (first, second):
            assert records[name].weight_sqnr == pytest.approx(sqnr(model.get_submodule(first).weight, real), abs=1e-4)
        found[execution] = {n: m.integers() for n, m in quantized.named_modules() if hasattr(m, "integers")}
    assert found["packed"].keys() == found["emulated"].keys()
    # calibrated, later layers see what the layers before them give, in integers or in float
    same = (first, second) if calibrated else found["packed"]
    assert all(torch.equal(found["packed"][name], found["emulated"][name]) for name in same)


@pytest.mark.parametrize("execution", ["packed", "emulated"])
@pytest.mark.parametrize("rest", ["skip", "other bits", "embedding"])
def test_what_is_rounded_otherwise_keeps_its_own_weight(tiny_vit, execution, rest):
    model = tie(tiny_vit)
    first, second = names(model)
    weight = model.get_submodule(first).weight
    overrides = {"skip": {second: {"skip": True}}, "other bits": {second: {"bits": 8}}}.get(rest, {})
    if rest == "embedding":
        model.table = nn.Embedding(24, 24)
        model.table.weight = weight
    before = weight.detach().clone()
    settings = {"rounding": "gptq", "overrides": overrides}  # which moves no weight for the sake of its inputs
    quantizer = ViTQuantizer(bits=2, method="channel", execution=execution, **settings)
    quantized = quantizer.quantize_model(model, calibration=pictures(8, 5))
    assert torch.equal(weight, before)
    one, other = (quantized.get_submodule(name) for name in (first, second))
    if rest == "skip":
        assert type(other) is nn.Linear
        assert torch.equal(other.weight, before)
    elif rest == "other bits":
        assert (int(one.integers().max()), other.integers().max() > 3) == (3, True)
        records = {layer.name: layer for layer in quantizer.report.layers}
        assert records[second].weight_sqnr > 30 > records[first].weight_sqnr
        reals = [weight_to_real(m.integers(), m.scale, m.zero_point) for m in (one, other)]
        assert sqnr(before, reals[1]) > 30 > sqnr(before, reals[0])
    else:
        assert torch.equal(quantized.table.weight, before)
    if execution == "emulated":  # what is multiplied is the integers that the report tells of
        assert torch.equal(one.quantized_weight().detach(), weight_to_real(one.integers(), one.scale, one.zero_point))


def test_packed_integers_of_a_tied_weight_are_in_memory_once(tiny_vit):
    quantized = ViTQuantizer(bits=4).quantize_model(tie(tiny_vit), engine="layers")
    first, second = (quantized.get_submodule(name) for name in names(tiny_vit))
    assert isinstance(first, PackedLinear)
    assert first.weight_codes.data_ptr() == second.weight_codes.data_ptr()
