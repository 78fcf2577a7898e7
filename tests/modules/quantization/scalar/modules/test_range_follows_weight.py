"""A range belongs to one weight: evaluation never sees a weight through another one's, and a chosen grid is kept."""

import copy
import pickle
from functools import partial

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from fairseq.modules.quantization.scalar.modules import (
    ActivationQuantizer,
    EmulatedLinear,
    IntConv2d,
    IntEmbedding,
    IntLinear,
)

LAYERS = {
    "tensor": lambda: IntLinear(6, 5, bits=4, method="tensor", p=1, update_step=3),
    "conv": lambda: IntConv2d(4, 6, 3, bits=3, method="channel", p=1, update_step=3),
    "table": lambda: IntEmbedding(9, 5, bits=4, method="histogram", p=1, update_step=3),
    "groups": lambda: EmulatedLinear.from_linear(
        nn.Linear(40, 6), 4, "channel", 32, activations="dynamic", update_step=3
    ),
}


def inputs(layer):
    torch.manual_seed(1)
    if isinstance(layer, IntConv2d):
        return torch.randn(2, 4, 5, 5)
    return (
        torch.tensor([[1, 2, 0], [8, 1, 1]]) if isinstance(layer, IntEmbedding) else torch.randn(3, layer.in_features)
    )


def make(kind, seed=0):
    torch.manual_seed(seed)
    return LAYERS[kind]()


def other_weight(layer):
    return 3 * torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(7))


def anew(layer):
    """A layer with the weight of ``layer`` that has observed nothing yet, in eval mode."""
    fresh = copy.deepcopy(layer).eval()
    fresh.load_state_dict({k: v for k, v in layer.state_dict().items() if k not in ("scale", "zero_point")})
    return fresh


def in_place(layer, w):
    with torch.no_grad():
        layer.weight.copy_(w)


def in_inference_mode(layer, w):
    with torch.inference_mode():
        layer.weight.copy_(w)


def through_data(layer, w):
    layer.weight.data.copy_(w)


def new_data(layer, w):
    layer.weight.data = w


def new_parameter(layer, w):
    layer.weight = nn.Parameter(w)


def load(layer, w):
    layer.load_state_dict({"weight": w, **({"bias": layer.bias} if hasattr(layer, "bias") else {})})


def merge(layer, w):
    """As LoRA does: a product of two thin matrices is added to the weight."""
    rank = torch.randn(len(w), 2) @ torch.randn(2, w[0].numel())
    layer.weight.data += rank.view(w.shape)


def permute(layer, w):
    layer.weight.data = layer.weight.data.flip(0)


def optimizer_step(layer, w):
    optimizer = torch.optim.SGD([layer.weight], lr=1.0)
    layer(inputs(layer)).square().sum().backward()
    optimizer.step()


def average(layer, w):
    twin = copy.deepcopy(layer)
    through_data(twin, w)
    averaged = AveragedModel(layer)
    averaged.module = layer  # average into the layer itself
    averaged.update_parameters(twin)
    averaged.update_parameters(twin)


EDITS = [
    in_place, in_inference_mode, through_data, new_data, new_parameter, load, merge, permute, optimizer_step, average,
]  # fmt: skip


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("edit", EDITS, ids=lambda e: e.__name__)
def test_eval_sees_a_weight_through_its_own_range(edit, kind):
    layer = make(kind).eval()
    x = inputs(layer)
    before, scale = layer(x), layer.scale
    edit(layer, other_weight(layer))
    expected = anew(layer)
    assert torch.equal(layer(x), expected(x))
    assert not torch.equal(layer(x), before)
    assert torch.equal(layer.scale, expected.scale)
    assert not torch.equal(layer.scale, scale) or (edit is permute and scale.numel() == 1)


@pytest.mark.parametrize("kind", LAYERS)
def test_a_weight_edited_before_the_first_forward_after_loading(kind):
    saved, layer = make(kind).eval(), make(kind, seed=5).eval()
    saved(inputs(saved))
    layer.load_state_dict(saved.state_dict())
    merge(layer, other_weight(layer))
    assert torch.equal(layer(inputs(layer)), anew(layer)(inputs(layer)))


def selective(fn, x):
    """Saves the products and runs the rest again."""
    products = [torch.ops.aten.addmm.default, torch.ops.aten.mm.default]
    contexts = partial(create_selective_checkpoint_contexts, products)
    return checkpoint(fn, x, use_reentrant=False, context_fn=contexts)


CHECKPOINTS = {
    "reentrant": partial(checkpoint, use_reentrant=True),
    "non-reentrant": partial(checkpoint, use_reentrant=False),
    "selective": selective,
}


@pytest.mark.parametrize("mode", CHECKPOINTS)
@pytest.mark.parametrize("kind", LAYERS)
def test_gradient_checkpointing_changes_nothing(kind, mode):
    """Ranges are observed in steps 0, 3 and 6; what is run again in the backward pass neither observes nor counts."""
    layers = [nn.ModuleDict({"layer": make(kind), "before": nn.Identity()}).train() for _ in range(2)]
    for model in layers:
        ActivationQuantizer(model["before"], p=1, update_step=2, bits=4, method="tensor")
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.3) for model in layers]
    x = inputs(layers[0]["layer"])
    for step in range(7):
        for model, optimizer, checkpointed in zip(layers, optimizers, (True, False), strict=True):

            def forward(x, model=model):
                return model["before"](model["layer"](x)) * 1.0

            start = (x * (1 + step)).requires_grad_() if x.is_floating_point() else x
            needs_gradient = start.requires_grad or mode != "reentrant"  # of its input, else it gives none to weights
            y = CHECKPOINTS[mode](forward, start) if checkpointed and needs_gradient else forward(start)
            optimizer.zero_grad()
            y.square().mean().backward()
            optimizer.step()
        for one, two in zip(layers[0].parameters(), layers[1].parameters(), strict=True):
            assert torch.equal(one.grad, two.grad)
        for one, two in zip(layers[0].buffers(), layers[1].buffers(), strict=True):
            assert torch.equal(one, two)
    assert layers[0]["layer"].steps == layers[1]["layer"].steps == 7


def test_training_goes_on_with_its_own_range_after_other_weights_were_evaluated():
    """An average is copied in, evaluated, and the trained weight is put back, as trainers do."""
    layer = make("tensor").train()
    layer.update_step = 1000
    x = inputs(layer)
    layer(x)
    trained, scale = layer.weight.detach().clone(), layer.scale
    through_data(layer.eval(), other_weight(layer))
    layer(x)
    assert not torch.equal(layer.scale, scale)
    through_data(layer, trained)
    layer.train()(x)
    assert torch.equal(layer.scale, scale)


def test_evaluating_with_the_weights_of_another_model():
    layer, x = make("tensor").eval(), inputs(make("tensor"))
    expected, other = layer(x), other_weight(layer)
    got = torch.func.functional_call(layer, {"weight": other}, (x,))
    twin = make("tensor").eval()
    through_data(twin, other)
    assert torch.equal(got, twin(x))
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("kind", LAYERS)
def test_a_state_dict_holds_the_range_of_the_weight_in_it(kind):
    """Saved in the midst of training, between two observations."""
    layer = make(kind).train()
    layer(inputs(layer))
    lagging = layer.scale
    merge(layer, other_weight(layer))
    state = layer.state_dict()
    assert layer.scale is lagging  # saving changes nothing
    assert torch.equal(state["scale"], anew(layer)._grid()[0])
    fresh = make(kind, seed=5)
    fresh.load_state_dict(state)
    assert torch.equal(fresh.eval()(inputs(layer)), anew(layer)(inputs(layer)))


@pytest.mark.parametrize("kind", LAYERS)
def test_graphs_are_recorded_with_the_range_that_is_there(kind):
    layer = make(kind).eval()
    x = inputs(layer)
    expected = layer(x)
    recorded = torch.export.export(layer, (x,)).module()(x)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)(x)
    assert torch.equal(recorded, expected)
    assert torch.equal(compiled, expected)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        assert layer(fake.from_tensor(x)).shape == expected.shape
    assert layer.to("meta")(x.to("meta")).shape == expected.shape


# A grid that was chosen, as calibrated rounding does.


def calibrated(kind):
    """A layer on a grid that no observation would give."""
    layer = make(kind).eval()
    layer.observe_weight()
    layer.set_range(layer.scale * 0.83, layer.zero_point.clone())
    return layer


def through_state_dict(layer, tmp_path):
    torch.save(layer.state_dict(), tmp_path / "state.pt")
    fresh = copy.deepcopy(layer)
    through_data(fresh, other_weight(layer))
    fresh.observe_weight()
    fresh.load_state_dict(torch.load(tmp_path / "state.pt"))
    return fresh


def through_meta(layer, tmp_path):
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    there = copy.deepcopy(layer).to("meta").to_empty(device="cpu")
    there.load_state_dict(state)
    return there


def through_state_dict_by_assignment(layer, tmp_path):
    fresh = copy.deepcopy(layer)
    fresh.load_state_dict({k: v.clone() for k, v in layer.state_dict().items()}, assign=True)
    return fresh


def from_before_ranges_knew_their_weight(layer, tmp_path):
    state = layer.__getstate__() if hasattr(layer, "__getstate__") else dict(vars(layer))
    fresh = type(layer).__new__(type(layer))
    fresh.__setstate__({k: v for k, v in state.items() if k != "_range_of"})
    return fresh


JOURNEYS = {
    "state dict": through_state_dict,
    "assigned": through_state_dict_by_assignment,
    "meta": through_meta,
    "deepcopy": lambda layer, _: copy.deepcopy(layer),
    "pickle": lambda layer, _: pickle.loads(pickle.dumps(layer)),
    "old pickle": from_before_ranges_knew_their_weight,
    "average": lambda layer, _: AveragedModel(layer).module,
    "eval": lambda layer, _: layer.train().eval(),
    "trained in vain": lambda layer, _: (layer.train(), layer(inputs(layer)), layer.eval())[2],
    "same again": lambda layer, _: (through_data(layer, layer.weight.data.clone()), layer)[1],
}


@pytest.mark.parametrize("kind", ["tensor", "conv", "groups"])
@pytest.mark.parametrize("journey", JOURNEYS)
def test_a_chosen_grid_stays_with_its_weight(journey, kind, tmp_path):
    layer = calibrated(kind)
    scale, expected = layer.scale.clone(), layer(inputs(layer))
    layer = JOURNEYS[journey](layer, tmp_path)
    assert torch.equal(layer(inputs(layer)), expected)
    assert torch.equal(layer.scale, scale)
    merge(layer, other_weight(layer))  # and no longer
    assert torch.equal(layer(inputs(layer)), anew(layer)(inputs(layer)))


@pytest.mark.parametrize("move", [torch.float16, torch.bfloat16, torch.float64, "device"], ids=str)
def test_a_chosen_grid_moves_with_its_weight(move, device):
    layer = calibrated("groups")
    scale = layer.scale.clone()
    layer.to(device if move == "device" else move)
    integers = layer.integers()
    assert torch.equal(layer.scale.cpu(), scale)
    layer.weight.data += 1
    assert not torch.equal(layer.integers(), integers)
    assert torch.equal(layer.integers(), anew(layer).integers())


def test_a_range_that_lags_does_not_pass_for_the_weights_own_by_moving():
    layer = make("tensor").train()
    layer(inputs(layer))
    merge(layer, other_weight(layer))
    layer.double().eval()
    assert torch.equal(layer.quantized_weight(), anew(layer).quantized_weight())


def test_a_grid_of_another_shape_is_refused():
    layer = make("tensor")
    with pytest.raises(ValueError, match=r"one scale and zero point for method='tensor', got \(5,\) and \(5,\)"):
        layer.set_range(torch.ones(5), torch.zeros(5, dtype=torch.int32))
