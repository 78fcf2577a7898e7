"""LoRA on a packed model: trains, as beside the emulated one; integers stay; adapters are saved and loaded."""

import copy
import sys

import pytest
import torch
from bounds import EXACT

from fairseq.models.vit_quantization import ViTQuantizer
from fairseq.modules.quantization.packed import PackedLinear
from fairseq.quantization.training.lora import add_lora, load_lora


def config(peft, model, **more):
    targets = [n for n, _ in model.named_modules() if n.endswith((".query", ".value", ".q_proj", ".v_proj"))]
    return peft.LoraConfig(r=4, target_modules=targets, **more)


def random(adapters, dtype=torch.float32):
    """The adapters' weights, none of them 0, by name."""
    generator = torch.Generator().manual_seed(3)
    names = sorted(name for name, _ in adapters.named_parameters() if ".lora_" in name)
    weights = {name: adapters.get_parameter(name) for name in names}
    with torch.no_grad():
        for weight in weights.values():
            weight.copy_(torch.randn(weight.shape, generator=generator).to(dtype) * 0.2)
    return weights


def test_the_gradient_is_that_beside_the_emulated_model(tiny_vit, pixels):
    peft = pytest.importorskip("peft")
    x = pixels.double()
    emulated = ViTQuantizer(bits=4, method="channel", execution="emulated").quantize_model(tiny_vit.double())
    packed = ViTQuantizer.pack_model(emulated, engine="layers")
    sides = [peft.get_peft_model(emulated, config(peft, emulated)), add_lora(packed, config(peft, packed))]
    gradients = []
    for side in sides:
        weights = random(side.double(), torch.float64)
        side.eval()(pixel_values=x, labels=torch.arange(5)).loss.backward()
        gradients.append({name: weight.grad for name, weight in weights.items()})
        assert all(bool((gradient != 0).any()) for gradient in gradients[-1].values())
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[1].items():
        torch.testing.assert_close(gradient, gradients[0][name], **EXACT, msg=name)


def test_it_trains_on_a_fused_model_and_its_adapter_is_saved_and_loaded(tiny_vit, pixels, tmp_path):
    peft = pytest.importorskip("peft")
    packed = ViTQuantizer(bits=4, method="channel", exclude=["classifier"]).quantize_model(tiny_vit)
    base = copy.deepcopy(packed)
    integers = {n: m.integers().clone() for n, m in packed.named_modules() if isinstance(m, PackedLinear)}
    with torch.no_grad():
        before = packed(pixels).logits
    adapted = add_lora(packed, config(peft, packed, modules_to_save=["classifier"]))
    kinds = ("lora_A", "lora_B", "modules_to_save")
    trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert [sum(kind in name for kind in kinds) for name in trained] == [1] * len(trained) == [1] * (8 + 2)
    optimizer = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(8):
        loss = adapted.eval()(pixel_values=pixels, labels=torch.arange(5)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    now = {n: m.integers() for n, m in adapted.get_base_model().named_modules() if isinstance(m, PackedLinear)}
    assert len(now) == len(integers) == 12
    for name, value in now.items():
        assert torch.equal(value, integers[name.replace(".base_layer", "")]), name
    assert not any("qweight" in vars(m) for m in adapted.modules())
    adapted.save_pretrained(tmp_path)
    loaded = load_lora(base, tmp_path)
    with torch.no_grad():
        expected = adapted(pixels).logits
        assert torch.equal(loaded(pixels).logits, expected)
        assert not torch.allclose(expected, before)
        with adapted.disable_adapter():
            off = adapted(pixels).logits
    assert off.shape == before.shape
    with pytest.raises(ValueError, match="cannot be merged into the integers of vit"):
        adapted.merge_and_unload()


def test_several_adapters_are_switched_saved_and_loaded(tiny_vit, pixels, tmp_path):
    peft = pytest.importorskip("peft")
    packed = ViTQuantizer(bits=4, method="channel").quantize_model(tiny_vit)
    base = copy.deepcopy(packed)
    adapted = add_lora(packed, config(peft, packed, init_lora_weights=False), "first").eval()
    more = [name for name, _ in packed.named_modules() if name.endswith((".query", ".q_proj", "classifier"))]
    second = peft.LoraConfig(r=3, target_modules=more, init_lora_weights=False)  # on a layer that had none, too
    assert add_lora(adapted, second, "second") is adapted
    expected = {}
    with torch.no_grad():
        for name in ("first", "second", "first"):
            adapted.set_adapter(name)
            assert torch.equal(expected.setdefault(name, adapted(pixels).logits), adapted(pixels).logits)
        rows = adapted(pixels, adapter_names=["first", "second", "first", "second", "second"]).logits
    for row, name in enumerate(["first", "second", "first", "second", "second"]):
        torch.testing.assert_close(rows[row], expected[name][row])
    assert not torch.allclose(expected["first"], expected["second"])
    adapted.save_pretrained(tmp_path)
    loaded = load_lora(base, tmp_path / "first", adapter_name="first")
    assert load_lora(loaded, tmp_path / "second", adapter_name="second") is loaded
    assert loaded.active_adapter == "first"
    with pytest.raises(ValueError, match="already exists"):
        load_lora(loaded, tmp_path / "second", adapter_name="second")
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    load_lora(loaded, tmp_path / "second", trainable=True, adapter_name="third")
    assert not loaded.training
    for training in (True, False):
        assert load_lora(loaded.train(training), tmp_path / "second", adapter_name=f"{training}").training == training
    narrow = copy.deepcopy(adapted.peft_config["second"])
    narrow.r = 2
    narrow.save_pretrained(tmp_path / "second")
    with pytest.raises(RuntimeError, match="size mismatch"):
        load_lora(loaded, tmp_path / "second", adapter_name="narrow")
    assert "narrow" not in loaded.peft_config
    loaded.set_adapter("third")
    loaded(pixels).logits.sum().backward()
    assert {name.split(".")[-2] for name, weight in loaded.named_parameters() if weight.grad is not None} == {"third"}
    with torch.no_grad():
        for name in expected:
            loaded.set_adapter(name)
            assert torch.equal(loaded(pixels).logits, expected[name]), name


def test_what_cannot_be_adapted(tiny_vit, monkeypatch):
    peft = pytest.importorskip("peft")
    settings = config(peft, tiny_vit)
    with pytest.raises(ValueError, match="nothing in the model is packed; peft itself adds"):
        add_lora(tiny_vit, settings)
    packed = ViTQuantizer(bits=4).quantize_model(tiny_vit)
    with pytest.raises(ValueError, match=r"config must be a peft\.LoraConfig, got dict"):
        add_lora(packed, {})
    with pytest.raises(ValueError, match="use_dora=True"):
        add_lora(packed, config(peft, packed, use_dora=True))


def test_without_peft_it_says_what_to_install(tiny_vit, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r'adapters need peft; install it with: pip install -e "\.\[lora\]"'):
        add_lora(tiny_vit, None)
