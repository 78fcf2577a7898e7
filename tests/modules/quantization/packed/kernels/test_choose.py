"""The function that chooses the kernels of a layer, and the check of those that it chooses from."""

import time
import warnings

import pytest
import torch
from broken_kernels import break_cpu, choosing, nudged, wrong_product
from torch import nn

from fairseq.modules.quantization.packed import LinearConfig, PackedLinear, kernels
from fairseq.modules.quantization.packed.kernels import choose, cpu, library, native, reference
from fairseq.modules.quantization.packed.kernels.triton import support

CPU = torch.device("cpu")
needs_native = pytest.mark.skipif(not native.levels(), reason="no native kernels: there was no C++ compiler")


def make(**settings):
    torch.manual_seed(0)
    return PackedLinear.from_float(nn.Linear(75, 21), LinearConfig(**{"method": "channel", **settings}), "query").eval()


def failing(*arguments):
    raise NotImplementedError("no such instruction")


def nudged_if_static(x, weight, bias, grid):
    return reference.integer(x, weight, bias, grid) + (0.01 if grid.scale is not None else 0)


BROKEN = {
    "product": ("product", wrong_product, "their integer product differs from the reference's"),
    "dynamic": ("integer", nudged, "at 8 bits, dynamic, they are off by 0.01"),
    "static": ("integer", nudged_if_static, "at 8 bits, static, they are off by 0.01"),
    "weight_only": ("weight_only", nudged, "at 8 bits, weight_only, they are off by"),
}


@pytest.mark.usefixtures("fresh")
def test_auto_takes_the_kernels_of_the_device():
    assert choose(CPU).name == "cpu"
    assert make().backend == "cpu"


@pytest.mark.usefixtures("fresh")
def test_where_products_of_floats_are_faster_they_run(monkeypatch):
    monkeypatch.setattr(cpu, "floats_are_faster", lambda: True)
    layer, x = make(), torch.randn(3, 75)
    assert choose(CPU).name == layer.backend == "floats"
    assert torch.equal(layer(x), reference.integer(x, layer.weight_matrix, layer.bias, layer.input_grid))
    monkeypatch.setenv(kernels.ENVIRONMENT, "cpu")
    assert layer.backend == "cpu"


@pytest.mark.parametrize("slow", ["product", "product_of_floats"])
def test_which_products_are_faster_is_measured(monkeypatch, slow):
    original = getattr(cpu, slow)
    monkeypatch.setattr(cpu, slow, lambda *arguments: time.sleep(0.02) or original(*arguments))
    assert cpu.floats_are_faster.__wrapped__() == (slow == "product")


@pytest.mark.usefixtures("fresh")
def test_a_device_without_kernels_gets_the_reference():
    assert choose(torch.device("meta")).name == "reference"


@pytest.mark.parametrize("name", ["reference", "cpu", "floats"])
@pytest.mark.usefixtures("fresh")
def test_the_environment_forces(monkeypatch, name):
    layer = make()
    monkeypatch.setenv(kernels.ENVIRONMENT, name)
    assert choose(CPU).name == layer.backend == name


@pytest.mark.parametrize("name", ["", "auto"])
@pytest.mark.usefixtures("fresh")
def test_the_environment_may_leave_the_choice(monkeypatch, name):
    monkeypatch.setenv(kernels.ENVIRONMENT, name)
    assert choose(CPU).name == "cpu"


@pytest.mark.usefixtures("fresh")
def test_the_argument_wins_over_the_environment(monkeypatch):
    layer = make(backend="reference")
    monkeypatch.setenv(kernels.ENVIRONMENT, "cpu")
    assert choose(CPU, "reference").name == layer.backend == "reference"
    monkeypatch.setenv(kernels.ENVIRONMENT, "nonsense")
    assert choose(CPU, "cpu").name == "cpu"


@pytest.mark.usefixtures("fresh")
def test_the_forced_kernels_are_those_that_run(monkeypatch):
    layer, x = make(), torch.randn(3, 75)
    monkeypatch.setitem(choosing.TABLE, "reference", choosing.TABLE["reference"]._replace(integer=nudged))
    monkeypatch.setenv(kernels.ENVIRONMENT, "reference")
    assert torch.equal(layer(x), nudged(x, layer.weight_matrix, layer.bias))


@needs_native
@pytest.mark.usefixtures("fresh")
def test_the_native_kernels_run_what_lies_in_panels(monkeypatch):
    layer = make()
    layer.use_native()
    names = {"auto": "native", "native": "native", "reference": "reference", "cpu": "cpu"}
    for name, expected in names.items():
        monkeypatch.setenv(kernels.ENVIRONMENT, name)
        assert layer.backend == choose(CPU, "auto", in_panels=True).name == expected
        assert choose(CPU, name, in_panels=True).name == expected
    monkeypatch.setenv(kernels.ENVIRONMENT, "native")
    rows = make()  # nobody laid it out
    assert rows.backend == "cpu"
    break_cpu(monkeypatch, integer=nudged)  # to be told from the others
    x = torch.randn(3, 75)
    assert torch.equal(rows(x), nudged(x, rows.weight_matrix, rows.bias, rows.input_grid))


@pytest.mark.parametrize(
    ("settings", "scale", "reason"),
    [
        ({}, torch.float32, None),
        ({"activations": "static"}, torch.float32, None),
        ({"backend": "cpu"}, torch.float32, "backend='cpu', or what FAIRSEQ_QUANTIZATION_BACKEND says"),
        ({"activations": None}, torch.float32, None),
        ({"activation_bits": 7}, torch.float32, None),
        ({"method": "channel", "group_size": 48}, torch.float32, None),
        ({"method": "channel", "group_size": 64, "activations": None}, torch.float32, None),
        ({"method": "channel", "group_size": 40}, torch.float32, "group_size=40, which is no multiple of 16 up to 128"),
        ({"method": "channel", "group_size": 48, "activations": None}, torch.float32,
         "group_size=48, which is no multiple of 32 up to 128"),
        ({}, torch.float64, "a scale of torch.float64"),
    ],
)  # fmt: skip
@needs_native
@pytest.mark.usefixtures("fresh")
def test_the_reason_why_a_layer_does_not_run_natively(monkeypatch, settings, scale, reason):
    config = LinearConfig(**settings)
    assert kernels.reason_not_native(config, scale) == reason
    monkeypatch.setenv(kernels.ENVIRONMENT, "reference")
    assert (kernels.runs_native("native"), kernels.runs_native("auto")) == (True, False)
    assert "what FAIRSEQ_QUANTIZATION_BACKEND says" in kernels.reason_not_native(config, scale)
    monkeypatch.setattr(native, "levels", lambda: ())
    assert kernels.reason_not_native(config, scale) == library.NOT_BUILT


@pytest.mark.usefixtures("fresh")
def test_unknown_names_are_refused(monkeypatch):
    with pytest.raises(
        ValueError, match=r"^backend must be one of auto, reference, cpu, floats, cuda, triton, native; got 'gpu'"
    ):
        choose(CPU, "gpu")
    monkeypatch.setenv(kernels.ENVIRONMENT, "gpu")
    with pytest.raises(ValueError, match=f"^{kernels.ENVIRONMENT} must be one of auto, .*; got 'gpu'"):
        choose(CPU)


@pytest.mark.usefixtures("fresh")
def test_cuda_kernels_on_a_cpu_layer_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="backend='cuda' runs on cuda, but the layer is on cpu"):
        make(backend="cuda")  # when it is made, not at the first forward
    monkeypatch.setenv(kernels.ENVIRONMENT, "cuda")
    with pytest.raises(ValueError, match=f"{kernels.ENVIRONMENT}='cuda' runs on cuda, but the layer is on cpu"):
        choose(CPU)


@pytest.mark.parametrize("part", BROKEN)
@pytest.mark.usefixtures("fresh")
def test_kernels_with_wrong_numbers_are_left_out_with_one_warning(monkeypatch, part):
    field, function, message = BROKEN[part]
    break_cpu(monkeypatch, **{field: function})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        layer, x = make(), torch.randn(3, 75)
        for _ in range(3):
            assert torch.equal(layer(x), reference.integer(x, layer.weight_matrix, layer.bias, layer.input_grid))
            assert layer.backend == "floats"
    assert len(caught) == 1
    assert f"the cpu kernels of packed layers are not used: {message}" in str(caught[0].message)


@pytest.mark.filterwarnings("ignore:the (cpu|floats) kernels")
@pytest.mark.usefixtures("fresh")
def test_where_all_kernels_have_wrong_numbers_the_reference_runs(monkeypatch):
    break_cpu(monkeypatch, product=wrong_product)
    monkeypatch.setitem(choosing.TABLE, "floats", choosing.TABLE["floats"]._replace(integer=nudged))
    layer, x = make(), torch.randn(3, 75)
    assert layer.backend == "reference"
    assert torch.equal(layer(x), reference.integer(x, layer.weight_matrix, layer.bias, layer.input_grid))


@pytest.mark.usefixtures("fresh")
def test_native_kernels_do_not_ask_for_those_of_the_cpu(monkeypatch):
    """What they cannot run is as with "auto": it is no error that torch._int_mm saturates."""
    layer, x = make(group_size=32), torch.randn(3, 75)
    break_cpu(monkeypatch, product=wrong_product)
    choosing._checked.clear()
    monkeypatch.setenv(kernels.ENVIRONMENT, "native")
    with pytest.warns(UserWarning, match="the cpu kernels of packed layers are not used"):
        assert layer.backend == "floats"
    assert torch.equal(layer(x), reference.integer(x, layer.weight_matrix, layer.bias, layer.input_grid))
    with pytest.raises(ValueError, match="='native' runs on cpu, but the layer is on meta"):
        choose(torch.device("meta"))


@pytest.mark.parametrize("error", [NotImplementedError, RuntimeError, TypeError])
@pytest.mark.usefixtures("fresh")
def test_kernels_that_fail_are_left_out(monkeypatch, error):
    def failing(*arguments):
        raise error("no such instruction")

    break_cpu(monkeypatch, product=failing)
    with pytest.warns(UserWarning, match=f"they fail with {error.__name__}: no such instruction"):
        assert choose(CPU).name == "floats"


@pytest.mark.filterwarnings("ignore:the cpu kernels")
def test_kernels_that_fail_are_left_out_when_their_speed_is_measured(monkeypatch):
    monkeypatch.delenv(kernels.ENVIRONMENT, raising=False)
    monkeypatch.setattr(choosing, "_checked", {})
    monkeypatch.setattr(torch, "_int_mm", failing)
    cpu.floats_are_faster.cache_clear()
    try:
        assert choose(CPU).name == make().backend == "floats"
    finally:
        cpu.floats_are_faster.cache_clear()


@pytest.mark.parametrize("forced_by", ["argument", "environment"])
@pytest.mark.filterwarnings("ignore:the cpu kernels")
@pytest.mark.usefixtures("fresh")
def test_forcing_broken_kernels_is_an_error(monkeypatch, forced_by):
    break_cpu(monkeypatch, product=wrong_product)
    if forced_by == "environment":
        monkeypatch.setenv(kernels.ENVIRONMENT, "cpu")
    origin = "backend" if forced_by == "argument" else kernels.ENVIRONMENT
    for _ in range(2):  # what was found out once is still an error
        with pytest.raises(RuntimeError, match=f"^{origin}='cpu' cannot be used: their integer product differs"):
            choose(CPU, "cpu" if forced_by == "argument" else "auto")


@pytest.mark.usefixtures("fresh")
def test_kernels_are_checked_once(monkeypatch):
    original, calls = choosing._compare, []
    monkeypatch.setattr(choosing, "_compare", lambda *a: calls.append(a) or original(*a))
    layer = make()
    for _ in range(3):
        layer(torch.randn(2, 75))
        choose(CPU), choose(CPU, "cpu")
    assert len(calls) == 1


@pytest.mark.usefixtures("fresh")
def test_the_reference_is_not_checked(monkeypatch):
    monkeypatch.setattr(choosing, "_compare", failing)
    assert choose(CPU, "reference").name == "reference"


def test_the_check_finds_sums_that_saturate_in_16_bits():
    """As processors without VNNI do it: q + 128 as uint8, and two neighbouring products added in 16 bits."""

    def saturating(q, codes):
        pairs = ((q.int()[:, None] + 128) * codes.int()).view(len(q), len(codes), -1, 2).sum(-1)
        return pairs.clamp(-(2**15), 2**15 - 1).sum(-1).int() - 128 * codes.sum(-1, dtype=torch.int32)

    broken = choosing.TABLE["cpu"]._replace(name="saturating", product=saturating)
    assert choosing._compare(broken, CPU) == "their integer product differs from the reference's"


def test_the_check_leaves_the_random_numbers_of_the_process_alone():
    before = torch.get_rng_state()
    choosing._compare(choosing.TABLE["cpu"], CPU)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.fixture
def cuda_device(monkeypatch):
    """A device of a compute capability, which is not there."""

    def of(major, minor):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (major, minor))
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        support._capability.cache_clear()
        monkeypatch.setattr(choosing, "_disagreement", lambda name, device: None)
        return torch.device("cuda", 0)

    yield of
    support._capability.cache_clear()


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)])
@pytest.mark.usefixtures("fresh")
def test_a_gpu_with_tensor_cores_for_int8_gets_triton(monkeypatch, cuda_device, capability):
    monkeypatch.setattr(support, "installed", lambda: True)
    assert choose(cuda_device(*capability)).name == "triton"


@pytest.mark.parametrize(
    ("capability", "installed", "reason"),
    [
        ((7, 5), True, "the device has compute capability 7.5; the kernels need 8.0 or more"),
        ((9, 0), False, "Triton is not installed; it comes with PyTorch for CUDA on Linux"),
    ],
)
@pytest.mark.usefixtures("fresh")
def test_another_gpu_gets_kernels_of_pytorch_and_one_sentence(
    monkeypatch, cuda_device, caplog, capability, installed, reason
):
    monkeypatch.setattr(support, "installed", lambda: installed)
    choosing._say_once.cache_clear()
    device = cuda_device(*capability)
    with caplog.at_level("INFO"):
        assert [choose(device).name, choose(device).name] == ["cuda", "cuda"]
    assert [record.message for record in caplog.records] == [
        f"the triton kernels of packed layers are not used on cuda:0: {reason}"
    ]
    with pytest.raises(RuntimeError, match=f"^backend='triton' cannot be used: {reason}$"):
        choose(device, "triton")


@pytest.mark.usefixtures("fresh")
def test_triton_kernels_that_disagree_leave_those_of_pytorch(monkeypatch, cuda_device):
    monkeypatch.setattr(support, "installed", lambda: True)
    device = cuda_device(9, 0)
    monkeypatch.setattr(choosing, "_disagreement", lambda name, device: "it is wrong" if name == "triton" else None)
    assert choose(device).name == "cuda"
