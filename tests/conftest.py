"""Fixtures: every device present, tiny ViTs with random weights, and no network."""

import functools
import gc
import os
import signal
import sys
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read with torch: tests of two threads run beside other workers
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in the background of a script; what tests start inherits it
    signal.signal(signal.SIGINT, signal.default_int_handler)

import beside
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton runs its kernels on the CPU; it is read when they are imported

from hypothesis import settings
from products import in_float64, is_exact_here
from transformers import ViTConfig, ViTForImageClassification

try:
    import openvino
except ImportError:
    pass
else:  # one for all that a process tests: of several, released oldest first, a signal crashes (docs/export.rst)
    openvino.Core = functools.cache(openvino.Core)

from fairseq.modules.quantization.packed.kernels import choose
from fairseq.quantization.export import verify

choosing = sys.modules[choose.__module__]  # the package has the function by that name

settings.register_profile("house", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("house")

if "OMP_NUM_THREADS" not in os.environ:  # tiny tensors: more threads only wait for one another on a busy machine
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start

LONGEST = "test_random_models.py"
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(params=DEVICES)
def device(request):
    """Each device of this machine in turn."""
    return torch.device(request.param)


@pytest.fixture
def two_threads():
    """Whatever the number of processors: some errors need a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def exact_int_mm(monkeypatch):
    """torch._int_mm is exact: this processor's own if it is, else one in float64; so what is built on it is tested.

    What is true of the processor itself is in tests/modules/quantization/packed/kernels/test_kernels.py.
    """
    if not is_exact_here():
        here = torch._int_mm
        monkeypatch.setattr(torch, "_int_mm", lambda a, b, **out: (here if a.is_cuda else in_float64)(a, b, **out))
        monkeypatch.setattr(choosing, "_checked", {})


def pytest_collection_modifyitems(items):
    """The file that takes longest comes first, so that no worker is left alone with it at the end."""
    items.sort(key=lambda item: item.path.name != LONGEST)


def pytest_collection_finish(session):
    """What was imported stays: the garbage collector need not look through it again and again."""
    gc.collect()
    gc.freeze()
    alone = not hasattr(session.config, "workerinput")  # of several workers, each begins what its own tests wait for
    if alone and not session.config.option.collectonly:
        beside.begin(session.items)


def pytest_sessionfinish():
    beside.cancel()


def pytest_unconfigure():
    gc.unfreeze()


def vit_config(**changes):
    settings = {
        "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40, "image_size": 16,
        "patch_size": 4, "encoder_stride": 4, "num_labels": 7, "hidden_dropout_prob": 0.1,
    }  # fmt: skip
    return ViTConfig(**{**settings, **changes})


@pytest.fixture
def tiny_vit():
    """See :func:`make_tiny_vit`."""
    return make_tiny_vit()


def make_tiny_vit():
    """A classifier with 13 Linear layers, dropout, and biases that are not zero; in eval mode."""
    torch.manual_seed(0)
    model = ViTForImageClassification(vit_config())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
            elif parameter.ndim == 2:
                parameter.normal_(std=0.15)
    return model.eval()


@pytest.fixture
def pixels():
    """Five pictures for the tiny models: (5, 3, 16, 16)."""
    return torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def verified_here(monkeypatch):
    """Exported files are verified in this process: a new one, which tests/quantization/export starts, takes seconds."""

    def run(command, **keywords):
        code, *arguments = command[command.index("-c") + 1 :]
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "fairseq", None)
            patch.setattr(sys, "argv", ["-c", *arguments])
            exec(code, {"__name__": "__main__"})
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(verify, "subprocess", SimpleNamespace(run=run))
