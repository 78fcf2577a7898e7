"""float_product: x w^T to the rounding of its sums, for any strides, by oneDNN where MKL would be slow."""

import pytest
import torch
from bounds import sum_error
from torch.utils._python_dispatch import TorchDispatchMode

from fairseq.modules.quantization import float_product as module
from fairseq.modules.quantization.float_product import float_product


class Seen(TorchDispatchMode):
    """The operators that run inside, with their arguments."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls.append((function, args))
        return function(*args, **(kwargs or {}))

    def names(self):
        return [str(function) for function, _ in self.calls]


def dense(m, k):
    return torch.randn(m, k, generator=torch.Generator().manual_seed(m * k))


LAYOUTS = {
    "rows": dense,
    "columns": lambda m, k: dense(k, m).t(),
    "part": lambda m, k: dense(m, k + 7)[:, 3 : k + 3],
    "part of columns": lambda m, k: dense(k + 7, m + 5)[3 : k + 3, 2 : m + 2].t(),
    "every other": lambda m, k: dense(2 * m, 2 * k)[::2, ::2],
    "the same row": lambda m, k: dense(1, k).expand(m, k),
}
ONEDNN = "mkldnn._linear_pointwise.default"


@pytest.mark.parametrize("w", LAYOUTS)
@pytest.mark.parametrize("x", LAYOUTS)
def test_it_is_the_product_whatever_the_strides(x, w):
    x, w = LAYOUTS[x](40, 33), LAYOUTS[w](21, 33)
    wanted = x.double() @ w.double().t()
    magnitude = x.abs().double() @ w.abs().double().t()
    got, out = float_product(x, w), torch.full((40, 50), torch.nan)[:, 4:25]
    assert ((got.double() - wanted).abs() <= sum_error(33, magnitude)).all()
    float_product(x, w, out=out)
    assert torch.equal(out, got)


@pytest.mark.parametrize("shape", [(31, 5, 7), (40, 1, 7), (40, 5, 1), (0, 5, 7), (40, 0, 7), (40, 5, 0)])
def test_thin_and_empty_ones_are_not_onednns(shape):
    m, k, n = shape
    x, w = torch.arange(m * k).view(m, k).float(), torch.arange(n * k).view(n, k).float()
    with Seen() as seen:
        got = float_product(x, w)
    assert torch.equal(got, x @ w.t())
    assert ONEDNN not in seen.names()


@pytest.mark.parametrize("rows", [1, 32, 33, 511, 512, 788, 1200])
def test_any_number_of_rows_is_multiplied_in_few_shapes(rows):
    """Of which oneDNN keeps a program each: no others than these, however many pictures a batch has."""
    x, w = torch.arange(rows * 3).view(rows, 3).float() % 17, dense(21, 3).round()
    with Seen() as seen:
        got = float_product(x, w)
    assert torch.equal(got, x @ w.t())
    shapes = [len(args[0]) for function, args in seen.calls if str(function) == ONEDNN]
    assert set(shapes) <= set(module.ROWS)
    assert sum(shapes) == (rows // 32 * 32 if module._has_both() else 0)


@pytest.mark.parametrize("learns", ["x", "w"])
def test_a_gradient_is_not_lost_without_a_word(learns):
    """Of 64 rows, none of which is torch.mm's."""
    x, w = dense(64, 33).requires_grad_(learns == "x"), dense(21, 33).requires_grad_(learns == "w")
    with pytest.raises(RuntimeError, match="grad"):
        float_product(x, w)
    with torch.no_grad():
        assert not float_product(x, w).requires_grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_multiplied_as_ever(dtype):
    x, w = dense(40, 33).to(dtype), dense(21, 33).to(dtype)
    with Seen() as seen:
        got = float_product(x, w)
    assert torch.equal(got, torch.mm(x, w.t()))
    assert ONEDNN not in seen.names()


@pytest.mark.skipif(not module._has_both(), reason="this PyTorch has no MKL, or no oneDNN: an ARM processor's")
@pytest.mark.parametrize("w", LAYOUTS)
def test_onednn_gets_weights_without_gaps(w):
    with Seen() as seen:
        float_product(dense(40, 33), LAYOUTS[w](21, 33))
    (args,) = (args for function, args in seen.calls if str(function) == ONEDNN)
    assert args[1].is_contiguous() or args[1].t().is_contiguous()


@pytest.mark.parametrize("without", ["both", "oneDNN"])
def test_without_onednn_it_is_a_plain_product(monkeypatch, without):
    if without == "both":
        monkeypatch.setattr(module, "_has_both", lambda: False)
    else:
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
        monkeypatch.setattr(module, "_has_both", module._has_both.__wrapped__)
    with Seen() as seen:
        got = float_product(dense(40, 33), dense(21, 33))
    assert ONEDNN not in seen.names()
    assert torch.equal(got, dense(40, 33) @ dense(21, 33).t())


@pytest.mark.filterwarnings("ignore:TF32 acceleration")
def test_onednn_may_be_switched_off():
    with torch.backends.mkldnn.flags(enabled=False), Seen() as seen:
        float_product(dense(40, 33), dense(21, 33))
    assert ONEDNN not in seen.names()


@pytest.mark.parametrize("both", [True, False])
def test_autocast_rounds_nothing(monkeypatch, both):
    if not both:
        monkeypatch.setattr(module, "_has_both", lambda: False)
    x, w = dense(40, 33), dense(21, 33)
    plain = float_product(x, w)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(float_product(x, w), plain)
