"""Models on which a forward was replaced, or tensors are computed: a copy shares nothing with them, or is refused."""

import functools
from types import MethodType

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from fairseq.models.vit_quantization import ViTQuantizer
from fairseq.modules.quantization.packed import PackedLinear
from fairseq.quantization.architectures.copies import copied


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Sequential(nn.Linear(3, 2)))


def in_a_closure(module):
    before = module.forward
    return lambda x: 2 * before(x)


def in_a_default(module):
    return lambda x, before=module.forward: 2 * before(x)


def in_a_list(module):
    held = [{"module": module}]
    return lambda x: held[0]["module"](x)


def two_functions_deep(module):
    inner = in_a_closure(module)
    return lambda x: inner(x)


def compiled(module):
    return torch.compile(module.forward, backend="eager")


def wrapped(module):
    before = module.forward

    @functools.wraps(before)
    def forward(*args, **kwargs):
        return before(*args, **kwargs)

    return forward


def in_a_global(module):
    scope = {"before": module.forward}
    exec("def forward(x):\n    return helper(x)\ndef helper(x):\n    return 2 * before(x)\n", scope)  # as a script does
    return scope["forward"]


def of_another_closure(module):
    return MethodType(lambda self, x, inner=module: inner(x), module)


def in_a_comprehension(module):
    scope = {"before": module.forward}
    exec("def forward(x):\n    return [before(x) for _ in range(2)][0]\n", scope)
    return scope["forward"]


class Doubled:
    """As accelerate's convert_outputs_to_fp32."""

    def __init__(self, inner):
        self.inner = inner

    def __call__(self, x):
        return 2 * self.inner(x)


def in_an_object(module):
    inner = Doubled(module.forward)
    return lambda x: inner(x)


def in_an_argument(module):
    return functools.partial(lambda inner, x: inner(x), in_a_closure(module))


def an_object(module):
    return Doubled(in_a_closure(module))


@pytest.mark.parametrize(
    "replacement",
    [
        in_a_closure,
        in_a_default,
        in_a_list,
        two_functions_deep,
        compiled,
        wrapped,
        in_a_global,
        of_another_closure,
        in_a_comprehension,
        in_an_object,
        in_an_argument,
        an_object,
    ],
)
@pytest.mark.parametrize("path", ["", "2", "2.0"])
def test_a_forward_that_calls_the_original_is_refused(replacement, path):
    net = model()
    part = net.get_submodule(path)
    part.forward = replacement(part)
    where = f"{path}.forward" if path else "forward"
    with pytest.raises(ValueError, match=f"^{where} was replaced .*take it away \\(del model.{where}\\)"):
        copied(net)
    del part.forward
    assert torch.equal(copied(net)(torch.ones(1, 3)), net(torch.ones(1, 3)))


def twice(module, x):
    return 2 * type(module).forward(module, x)


@pytest.mark.parametrize("bind", [lambda f, module: MethodType(f, module), functools.partial])
def test_a_forward_that_is_bound_goes_with_the_copy(bind):
    net = model()
    net[2].forward = bind(twice, net[2])
    expected = net(torch.ones(1, 3))
    other = copied(net)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    assert torch.equal(other(torch.ones(1, 3)), expected)
    assert bool((expected != 0).any())


def bound_to_what_a_script_also_names(module):
    scope = {"relu": module[1], "MethodType": MethodType}
    exec("def forward(self, x):\n    return 2 * type(self).forward(self, x) + self.relu.inplace\n", scope)
    module.relu = module[1]
    return MethodType(scope["forward"], module)


def an_object_of_a_method(module):
    return Doubled(functools.partial(nn.Sequential.forward, module))


@pytest.mark.parametrize("replacement", [bound_to_what_a_script_also_names, an_object_of_a_method])
def test_what_a_copy_makes_its_own_is_copied(replacement):
    net = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    net.forward = replacement(net)
    expected, other = net(torch.ones(1, 3)), copied(net)
    nn.init.zeros_(net[0].weight)
    assert torch.equal(other(torch.ones(1, 3)), expected)


def test_a_compiled_model_is_copied():
    net = model()
    expected, other = net(torch.ones(1, 3)), copied(torch.compile(net, backend="eager"))
    nn.init.zeros_(net[0].weight)
    assert torch.equal(other(torch.ones(1, 3)), expected)


@pytest.mark.parametrize("kind", ["no_grad", "grad"])
def test_what_pruning_computes_is_copied_as_it_is(kind):
    net = model()
    prune.l1_unstructured(net[0], "weight", amount=0.5)
    with torch.set_grad_enabled(kind == "grad"):
        expected = net(torch.ones(1, 3)).detach()
    other = copied(net)
    assert torch.equal(other(torch.ones(1, 3)), expected)
    assert torch.equal(other[0].weight, net[0].weight)


def test_a_wrapped_model_is_refused_wherever_it_would_be_copied(tiny_vit, tmp_path, pixels):
    packed = ViTQuantizer(bits=8).quantize_model(tiny_vit, engine="layers")
    ViTQuantizer.save(packed, tmp_path / "q.safetensors")
    student = ViTQuantizer(bits=8, execution="emulated").quantize_model(tiny_vit)
    for wraps in (tiny_vit, packed, student):
        wraps.forward = in_a_closure(wraps)
    for copies in (
        lambda: ViTQuantizer(bits=8).quantize_model(tiny_vit),
        lambda: ViTQuantizer(bits=8, method="channel").quantize_model(tiny_vit, calibration=pixels.repeat(4, 1, 1, 1)),
        lambda: ViTQuantizer.load(tmp_path / "q.safetensors", tiny_vit),
        lambda: ViTQuantizer.optimize(packed, engine="layers"),
        lambda: ViTQuantizer.dequantize_model(packed),
        lambda: ViTQuantizer.pack_model(student),
    ):
        with pytest.raises(ValueError, match="by a function that calls the model which it was made for"):
            copies()


def test_layers_whose_forward_or_bias_is_not_their_own_stay_in_float(tiny_vit, pixels):
    layers = {name: module for name, module in tiny_vit.named_modules() if type(module) is nn.Linear}
    scaled, pruned, *_ = layers
    layers[scaled].forward = functools.partial(twice, layers[scaled])
    prune.l1_unstructured(layers[pruned], "bias", amount=0.5)
    quantizer = ViTQuantizer(bits=8, method="channel")
    result = quantizer.quantize_model(tiny_vit)
    left = {layer.name: layer.skipped for layer in quantizer.report.layers if layer.skipped}
    assert {name: reason.split(",")[0] for name, reason in left.items()} == {
        scaled: "its forward was replaced",
        pruned: "its bias is computed",
    }
    assert sum(isinstance(module, PackedLinear) for module in result.modules()) == len(layers) - 2
    with torch.no_grad():
        expected, got = (net(pixels).logits for net in (tiny_vit, result))
    assert float((got - expected).norm() / expected.norm()) < 0.1
