"""What a forward pass shows: names are not believed, who reads what is seen."""

import copy

import pytest
import torch
from families import build
from torch import nn

from fairseq.quantization.architectures.blocks import block_plan, class_of
from fairseq.quantization.architectures.layers import linear_layers
from fairseq.quantization.architectures.observe import folds, observe
from fairseq.quantization.architectures.plan import resolve
from fairseq.quantization.config import QuantizationConfig

TENSOR = QuantizationConfig(bits=4, method="tensor")


class Attention(nn.Module):
    """Three projections with the usual names, called in one way or another."""

    def __init__(self, edit):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(8, 8) for _ in range(4))
        self.edit = edit

    def forward(self, x):
        q, k = self.q_proj(x), self.k_proj(x)
        v = self.v_proj(self.edit(x))
        return self.o_proj((q @ k.transpose(1, 2)).softmax(-1) @ v)


class Net(nn.Module):
    def __init__(self, edit):
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"attn": Attention(edit), "fc": nn.Linear(8, 8)}) for _ in range(2))

    def forward(self, pixel_values):
        x = pixel_values.flatten(2).transpose(1, 2)[..., :1].expand(-1, -1, 8).contiguous()
        for block in self.blocks:
            x = x + block["fc"](block["attn"](x.clone()))
        return x


def in_place(x):
    return x.add_(1)


def behind_its_back(x):
    x.data += 1
    return x


@pytest.mark.parametrize(
    ("edit", "shared"),
    [
        (lambda x: x, {"q_proj", "k_proj", "v_proj"}),
        (lambda x: x.view(x.shape), {"q_proj", "k_proj", "v_proj"}),
        (lambda x: x + 1, {"q_proj", "k_proj"}),
        (in_place, {"q_proj", "k_proj"}),
        (behind_its_back, {"q_proj", "k_proj"}),
    ],
    ids=["one tensor", "a view of it", "another", "edited in place", "edited through .data"],
)
def test_layers_share_an_input_if_they_are_called_with_one_tensor(edit, shared):
    model = Net(edit)
    names = list(linear_layers(model))
    seen = observe(model, names, [], torch.randn(2, 3, 4, 4))
    assert seen.failure is None
    for i in range(2):
        prefix = f"blocks.{i}.attn"
        together = {n for n in names if n.startswith(prefix) and seen.source(n) == f"{prefix}.q_proj"}
        assert together == {f"{prefix}.{role}" for role in shared}
    assert seen.reached == set(names)


def test_a_layer_that_is_called_twice_or_never_reads_a_tensor_of_its_own():
    model = Net(lambda x: x)
    model.blocks[1]["attn"].k_proj = model.blocks[1]["attn"].q_proj  # one layer, two calls
    model.unused = nn.Linear(8, 8)
    names = list(linear_layers(model))
    seen = observe(model, names, [], torch.randn(1, 3, 4, 4))
    assert "blocks.1.attn.q_proj" not in seen.shares
    assert seen.source("blocks.0.attn.v_proj") == "blocks.0.attn.q_proj"
    assert seen.reached == set(names) - {"unused"}


def test_the_model_and_the_random_state_are_left_as_they_were():
    model = build("vit-mae").train()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    seen = observe(model, list(linear_layers(model)), [])
    assert seen.failure is None
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_model_that_cannot_be_run_shows_nothing_and_says_why():
    model = nn.Sequential(nn.Linear(5, 5))
    seen = observe(model, ["0"], [])
    assert "RuntimeError" in seen.failure
    assert seen.source("0") == "0"
    assert not seen.calls


@pytest.mark.parametrize("name", ["vit", "swin", "clip", "timm-vit", "siglip2-vision"])
def test_on_the_meta_device_the_same_is_seen(name):
    model = build(name)
    layers = list(linear_layers(model))
    blocks = resolve(model, QuantizationConfig(method="channel")).blocks()
    real, meta = observe(model, layers, blocks), observe(copy.deepcopy(model).to("meta"), layers, blocks)
    if meta.failure is None:
        assert meta.shares == real.shares
        assert meta.calls.keys() == real.calls.keys()
    else:
        assert name == "siglip2-vision"  # asks a tensor for its numbers


# Whether the factors that equalization moves cancel.


def block_of(name="vit"):
    model = build(name)
    plan = resolve(model, TENSOR)
    first = plan.blocks()[0]
    block = model.get_submodule(first)
    return block, block_plan(block, class_of(type(block))), plan.observed.calls[first]


def test_a_block_as_it_is_folds():
    for name in ("vit", "beit", "swin", "dinov2", "clip-vision", "timm-vit"):
        assert folds(*block_of(name)), name
    for name in ("vit", "clip-vision", "timm-vit"):  # by noise: blocks that take hidden states alone
        block, plan, _ = block_of(name)
        assert folds(block, plan, None), name


@pytest.mark.parametrize("strength", [1.0, 0.01])
def test_an_adapter_that_reads_the_norm_too_does_not_fold(strength):
    block, plan, call = block_of()
    hook = block.layernorm_after.register_forward_hook(lambda m, a, y: None)
    assert not folds(block, plan, call)  # whatever it sees may be read elsewhere
    hook.remove()
    adapter, seen = nn.Linear(24, 24), []
    block.layernorm_after.register_forward_hook(lambda m, a, y: seen.append(y))
    block.register_forward_hook(lambda m, a, y: (y[0] if isinstance(y, tuple) else y) + strength * adapter(seen.pop()))
    assert not folds(block, plan, call)


def test_other_readers_do_not_fold():
    for change in ("norm", "value", "half"):
        block, plan, call = block_of()
        if change == "norm":  # attention also adds what it reads
            block.attention.register_forward_hook(
                lambda m, a, y: (y[0] + a[0], *y[1:]) if isinstance(y, tuple) else y + a[0]
            )
        elif change == "value":  # the output projection reads something else than averages of the values
            block.get_submodule(plan.layers["output"]).register_forward_pre_hook(lambda m, a: (a[0].tanh(), *a[1:]))
        else:
            block.half()
            assert folds(block, plan, tuple_half(call))  # powers of two are exact in half precision, too
            continue
        assert not folds(block, plan, call), change


def tuple_half(call):
    args, keywords = call
    return tuple(a.half() if isinstance(a, torch.Tensor) else a for a in args), keywords


def test_folding_leaves_the_block_alone():
    block, plan, call = block_of()
    before = copy.deepcopy(block.state_dict())
    folds(block, plan, call)
    assert all(torch.equal(before[key], value) for key, value in block.state_dict().items())


def test_only_the_class_of_transformers_itself_is_known():
    block, _, _ = block_of()
    kind = type(block)
    assert class_of(kind) is not None
    assert class_of(type(kind.__name__, (kind,), {})) is None
    fake = type(kind.__name__, (nn.Module,), {"__module__": kind.__module__, "__qualname__": kind.__qualname__})
    assert class_of(fake) is None


def test_a_look_without_numbers_leaves_nothing_in_the_model():
    """BEiT keeps an index that it computes once; one without numbers would stay with a model that is loaded."""
    model = build("beit").to("meta")
    assert observe(model, list(linear_layers(model)), []).failure is None
    loaded = model.to_empty(device="cpu")
    loaded.load_state_dict(build("beit").state_dict())
    with torch.no_grad():
        assert loaded(torch.zeros(1, 3, 16, 16)).logits.device.type == "cpu"
