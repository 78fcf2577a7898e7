"""Kernels that are recorded into a graph, which runs without the library: they are checked before, as others are."""

import functools

import pytest
import torch
from bounds import agrees
from broken_kernels import break_cpu, choosing, nudged, wrong_integers, wrong_product
from packed_layers import IN, make, tokens

from fairseq.modules.quantization.packed.kernels import choose, functional, native, reference

CPU = torch.device("cpu")
needs_native = pytest.mark.skipif(not native.levels(), reason="no native kernels: there was no C++ compiler")


def traced(layer, x):
    return torch.jit.trace(layer, x, check_trace=False)


def compiled(layer, x):
    return torch.compile(layer, backend="eager", fullgraph=True)


def exported(layer, x):
    return torch.export.export(layer, (x,)).module()


def exported_strictly(layer, x):
    return torch.export.export(layer, (x,), strict=True).module()


tracing = pytest.mark.filterwarnings("ignore:.*torch.jit.trace:FutureWarning", "ignore::torch.jit.TracerWarning")
each_graph = pytest.mark.parametrize("record", [traced, compiled, exported, exported_strictly])


@tracing
@each_graph
@pytest.mark.usefixtures("fresh", "clean_compiler")
def test_wrong_kernels_are_not_recorded_on_first_use(monkeypatch, record):
    layer, x = make(), tokens(3, IN)
    break_cpu(monkeypatch, product=wrong_product, integer=wrong_integers)
    choosing._checked.clear()
    with torch.no_grad(), pytest.warns(UserWarning, match="the cpu kernels of packed layers are not used"):
        got = record(layer, x)(x)
    assert agrees(got, layer, x)


@tracing
@each_graph
@pytest.mark.filterwarnings("ignore:the cpu kernels")
@pytest.mark.usefixtures("clean_compiler")
def test_what_is_recorded_on_first_use_is_right_on_this_processor(monkeypatch, record):
    layer, x = make(), tokens(3, IN)
    monkeypatch.setattr(choosing, "_checked", {})
    with torch.no_grad():
        assert agrees(record(layer, x)(x), layer, x)


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("enabled", [True, False])
def test_the_check_is_with_onednn_which_exporting_turns_off(monkeypatch, enabled):
    seen, onednn = [], torch.backends.mkldnn
    monkeypatch.setattr(onednn, "enabled", enabled)
    break_cpu(monkeypatch, product=lambda *a: seen.append(onednn.enabled) or reference.product(*a))
    assert choose(CPU).name == "cpu"
    assert (seen, onednn.enabled) == ([True], enabled)


@pytest.mark.usefixtures("fresh")
def test_a_check_while_exporting_does_not_stand_for_all_of_them(monkeypatch):
    """A graph has only the products, so that nothing else is checked, and its own way of scaling."""
    layer, x = make(), tokens(3, IN)
    right = functools.partial(functional.integer, product=reference.product)
    break_cpu(monkeypatch, integer=lambda *a: (right if functional.capturing() else nudged)(*a))
    choosing._checked.clear()
    assert agrees(exported(layer, x)(x), layer, x)
    with pytest.warns(UserWarning, match="at 8 bits, dynamic, they are off by 0.01"):
        assert layer.backend == "floats"


@needs_native
@tracing
@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("backend", ["auto", "native"])
def test_a_layer_in_panels_is_traced_with_products_that_are_right(monkeypatch, backend):
    layer, x = make(backend=backend), tokens(3, IN)
    layer.use_native()
    choosing._checked.clear()
    break_cpu(monkeypatch, product=wrong_product, integer=wrong_integers)
    monkeypatch.setitem(choosing.TABLE, "native", choosing.TABLE["native"]._replace(integer=wrong_integers))
    with pytest.warns(UserWarning, match="the cpu kernels of packed layers are not used"):
        got = traced(layer, x)(x)
    assert agrees(got, layer, x)
    assert layer.backend == "native"
