"""Which kernels run a packed layer: one table, the one function that chooses from it, and the check of each."""

from __future__ import annotations

import functools
import logging
import os
import threading
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fairseq.modules.quantization.context import plain_context
from fairseq.modules.quantization.packed.config import BACKENDS, LinearConfig
from fairseq.modules.quantization.packed.input_grid import InputGrid, correction
from fairseq.modules.quantization.packed.kernels import (
    arguments,
    cpu,
    cuda,
    functional,
    library,
    native,
    native_calls,
    reference,
)
from fairseq.modules.quantization.packed.kernels.triton import linear as triton
from fairseq.modules.quantization.packed.kernels.triton.support import reason_not_on
from fairseq.modules.quantization.packed.weight import PackedWeight, pack_codes, to_codes
from fairseq.modules.quantization.scalar.weights import observe_weight, weight_to_int

logger = logging.getLogger(__name__)

ENVIRONMENT = "FAIRSEQ_QUANTIZATION_BACKEND"


class Kernels(NamedTuple):
    """One backend.

    Attributes:
        name: as it is forced.
        device: the type of device that it runs on, or None for any.
        product: int8 (M, K), int8 (N, K) -> int32 (M, N), exact.
        integer: x (M, in), weight, bias, grid -> (M, out), x quantized on the grid.
        weight_only: x, weight, bias -> (M, out), with the weight dequantized.
    """

    name: str
    device: str | None
    product: Callable[[Tensor, Tensor], Tensor]
    integer: Callable[[Tensor, PackedWeight, Tensor | None, InputGrid], Tensor]
    weight_only: Callable[[Tensor, PackedWeight, Tensor | None], Tensor]


TABLE = {
    "reference": Kernels("reference", None, reference.product, reference.integer, reference.weight_only),
    "cpu": Kernels("cpu", "cpu", cpu.product, cpu.integer, cpu.weight_only),
    "floats": Kernels("floats", "cpu", cpu.product_of_floats, cpu.integer_of_floats, cpu.weight_only),
    "cuda": Kernels("cuda", "cuda", cuda.product, cuda.integer, cuda.weight_only),
    "triton": Kernels("triton", "cuda", triton.product, triton.integer, triton.weight_only),
    # The native kernels take a layer's tensors, not these arguments; these run where one is recorded into a graph.
    "native": Kernels("native", "cpu", cpu.product, cpu.integer, cpu.weight_only),
}

_checked: dict[tuple[str, str], str | None] = {}
_lock = threading.Lock()


def choose(device: torch.device, backend: str = "auto", in_panels: bool = False) -> Kernels:
    """The kernels for tensors on ``device``.

    Args:
        device: where the layer is.
        backend: "auto" takes what the environment variable ``FAIRSEQ_QUANTIZATION_BACKEND`` says, and else the
            kernels for this type of device if they agree with the reference, which is checked once per process. A name
            is taken at its word.
        in_panels: whether the layer's integers lie in panels. Where they do, and nothing is said against it, the
            native kernels run; from rows "native" runs what "auto" does on the CPU.

    Raises:
        ValueError: an unknown name, or kernels of another type of device.
        RuntimeError: the kernels asked for disagree with the reference.
    """
    wanted, origin = _wanted(backend)
    if wanted not in BACKENDS:
        raise ValueError(f"{origin} must be one of {', '.join(BACKENDS)}; got {wanted!r}")
    if in_panels and runs_native(backend):
        usual = _best(device) if functional.recording() else TABLE["cpu"]
        return TABLE["native"] if usual.name == "cpu" else usual
    if wanted == "auto":
        return _best(device)
    kernels = TABLE[wanted]
    if kernels.device not in (None, device.type):
        raise ValueError(f"{origin}={wanted!r} runs on {kernels.device}, but the layer is on {device}")
    if wanted == "native":
        return _best(device)
    problem = reason_not_on(device) if wanted == "triton" else None
    if problem := problem or disagreement(kernels, device):
        raise RuntimeError(f"{origin}={wanted!r} cannot be used: {problem}")
    return kernels


def _best(device: torch.device) -> Kernels:
    """The first of the kernels for that type of device that agree with the reference, or that."""
    usual = _usual(device, functional.capturing())
    right = (name for name in usual if disagreement(TABLE[name], device) is None)
    return TABLE[next(right, "reference")]


def _usual(device: torch.device, recorded: bool) -> tuple[str, ...]:
    """The kernels for that type of device, the best first; a graph may run on another processor."""
    if device.type == "cpu":
        integers = recorded or functional.observed() or not cpu.floats_are_faster()
        return ("cpu", "floats") if integers else ("floats", "cpu")
    if device.type != "cuda":
        return ()
    reason = reason_not_on(device)
    if reason is None:
        return "triton", "cuda"
    _say_once(f"the triton kernels of packed layers are not used on {device}: {reason}")
    return ("cuda",)


_usual._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as below


@functools.cache
def _say_once(sentence: str) -> None:
    logger.info(sentence)


def _wanted(backend: str) -> tuple[str, str]:
    """The backend asked for, and what asks: the setting, or the environment in the place of "auto"."""
    return (os.environ.get(ENVIRONMENT) or "auto", ENVIRONMENT) if backend == "auto" else (backend, "backend")


def runs_native(backend: str) -> bool:
    """Whether a layer with that setting may run on the native kernels: the setting or the environment can forbid it."""
    return _wanted(backend)[0] in ("auto", "native")


def reason_not_native(config: LinearConfig, scale: torch.dtype) -> str | None:
    """Why the native kernels cannot run a layer with these settings and that dtype of its scale; None if they can."""
    if not native.levels():
        return library.NOT_BUILT
    if not runs_native(config.backend):
        return f"backend={config.backend!r}, or what {ENVIRONMENT} says"
    if config.activations is None and native_calls.attention_is_exact():
        return f"activations=None: its products are of bfloat16, which {native_calls.ATTENTION}=float32 rules out"
    group_size = config.group_size
    if group_size and (reason := arguments.reason_not_grouped(group_size, config.activations is None)):
        return reason
    return None if scale == torch.float32 else f"a scale of {scale}"


def reason_not_triton(config: LinearConfig, scale: torch.dtype) -> str | None:
    """Why the fused kernels for CUDA cannot run a layer with these settings and that dtype of its scale, or None."""
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    if reason := reason_not_on(torch.device("cuda")):
        return reason
    if _wanted(config.backend)[0] not in ("auto", "triton"):
        return f"backend={config.backend!r}, or what {ENVIRONMENT} says"
    if config.activations is None:
        return "activations=None"
    return triton.reason_not_runnable(config.activation_bits, scale, config.group_size)


def disagreement(kernels: Kernels, device: torch.device) -> str | None:
    """How ``kernels`` differ from the reference on a small case, or None; found out once, with one warning."""
    return None if kernels.name == "reference" else _disagreement(kernels.name, device.type)


def _disagreement(name: str, device: str) -> str | None:
    key = (name, device)
    if key in _checked or torch.onnx.is_in_onnx_export():  # in ONNX the products of all kernels are the same
        return _checked.get(key)
    return functional.aside(_check, *key)


# Dynamo calls it and takes what it returns, instead of recording its operations. It is what
# torch.compiler.assume_constant_result does, which would import Dynamo, and that takes seconds.
_disagreement._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _check(name: str, device: str) -> str | None:
    with _lock:
        if (name, device) in _checked:
            return _checked[name, device]
        try:
            problem = _compare(TABLE[name], torch.device(device))
        except Exception as error:  # Triton's own are of many classes: there may be no compiler, no driver that fits
            problem = f"they fail with {type(error).__name__}: {error}"
        if problem:
            warnings.warn(f"the {name} kernels of packed layers are not used: {problem}", stacklevel=5)
        if problem or not functional.capturing():  # torch.export says so in all threads: then only products were run
            _checked[name, device] = problem
        return problem


@plain_context()
def _compare(kernels: Kernels, device: torch.device) -> str | None:
    generator = torch.Generator().manual_seed(0)
    q, codes = (torch.randint(-128, 128, shape, generator=generator).to(torch.int8) for shape in ((19, 70), (40, 70)))
    q[0], codes[0] = 127, -128  # the largest products, which saturate where sums are kept in 16 bits
    q, codes = q.to(device), codes.to(device)
    if not torch.equal(kernels.product(q, codes), reference.product(q, codes)):
        return "their integer product differs from the reference's"
    x, w, bias = (torch.randn(shape, generator=generator) for shape in ((19, 70), (40, 70), (40,)))
    w[3] += 2
    for bits, method in ((8, "channel"), (4, "tensor")):
        scale, zero_point = observe_weight(w, bits, method)
        codes = to_codes(weight_to_int(w, scale, zero_point, bits), bits)
        weight = PackedWeight(
            pack_codes(codes, bits).to(device) if bits < 8 else codes.to(device),
            scale.to(device), zero_point.to(device, torch.uint8), bits, 70, None, False,
        )  # fmt: skip
        given = x.to(device), weight, bias.to(device)
        fixed = torch.tensor([0.02], device=device), torch.tensor([-64], dtype=torch.int32, device=device)
        static = InputGrid(8, *fixed, correction(weight, *fixed))  # from -1.28 to 3.82, so that some saturate
        for form, grid in (("dynamic", InputGrid()), ("static", static), ("weight_only", None)):
            got, expected = (
                k.weight_only(*given) if grid is None else k.integer(*given, grid)
                for k in (kernels, TABLE["reference"])
            )
            if not torch.allclose(got, expected, rtol=1e-4, atol=1e-3):
                error = (got - expected).abs().max().item()
                return f"at {bits} bits, {form}, they are off by {error:.2g}"
    return None
