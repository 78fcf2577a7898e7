"""The roofline of this machine: how fast it multiplies integers and reads memory, and what that allows a model."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from fairseq.modules.quantization.packed import LinearConfig, PackedLinear
from fairseq.modules.quantization.packed.kernels import native, native_calls

PRODUCTS = [(2048, 2048, 2048), (8 * 197, 768, 3072)]  # rows, inputs, outputs; the second is of a ViT-Base
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
LEAST_BUFFER = 256 * 2**20  # bytes; where the last cache is as large or unknown, the buffer may still be in it


class Roofline(NamedTuple):
    """The two limits of a forward pass (Williams, Waterman and Patterson, 2009).

    Attributes:
        peak: integer operations (multiplications and additions) per second.
        product: what was multiplied, and by what, when they were the fastest.
        bandwidth: bytes read from memory per second.
    """

    peak: float
    product: str
    bandwidth: float

    def seconds(self, operations: float, nbytes: float) -> float:
        """What so many operations on so many bytes take at least, with both at once."""
        return max(operations / self.peak, nbytes / self.bandwidth)

    def __str__(self) -> str:
        return f"int8 peak {self.peak / 1e12:.2f} TOPS, memory {self.bandwidth / 1e9:.1f} GB/s"


def measure_roofline(seconds: float = 0.3) -> Roofline:
    """Measured with the threads that PyTorch has now, ``seconds`` for each product and for memory."""
    return Roofline(*int8_peak(seconds), memory_bandwidth(seconds))


def best(measured: list[Roofline]) -> Roofline:
    """The higher of each limit: what a machine that others use, too, was seen to do at its best."""
    return max(measured)._replace(bandwidth=max(one.bandwidth for one in measured))


def int8_peak(seconds: float) -> tuple[float, str]:
    """The fastest integer product that this machine shows, in operations per second, and its name.

    ``torch._int_mm`` takes integers and leaves them; a native layer also rounds its input and scales its output, and is
    the faster of the two all the same where it has better instructions.
    """
    measured = []
    for rows, inputs, outputs in PRODUCTS:
        for name, multiply in products(rows, inputs, outputs).items():
            rate = 2 * rows * inputs * outputs / fastest(multiply, seconds)
            measured.append((rate, f"{name}, {rows} x {inputs} -> {outputs}"))
    return max(measured)


def products(rows: int, inputs: int, outputs: int) -> dict[str, Callable[[], Any]]:
    """The same product by ``torch._int_mm`` and, where there are native kernels, by an 8-bit layer, as functions."""
    q, codes = (torch.randint(-128, 128, shape, dtype=torch.int8) for shape in ((rows, inputs), (outputs, inputs)))
    found: dict[str, Callable[[], Any]] = {"torch._int_mm": lambda: torch._int_mm(q, codes.t())}
    if native.levels():
        layer = PackedLinear.from_float(nn.Linear(inputs, outputs), LinearConfig(8, "channel", backend="native"))
        x, linear, level = torch.randn(rows, inputs), layer.prepared().linear, native.level_number()
        found["native layer"] = lambda: native_calls.run_linear(linear, x, level)
    return found


def memory_bandwidth(seconds: float) -> float:
    """Bytes per second that adding up a buffer reads, which is twice as large as the last cache."""
    buffer = torch.ones(max(LEAST_BUFFER, 2 * last_cache()) // 4)
    return buffer.nbytes / fastest(buffer.sum, seconds)


def last_cache() -> int:
    """Bytes of the largest cache; 0 where the system does not tell."""
    sizes = [file.read_text().strip() for file in CACHES.glob("index*/size")]
    return max((1024 * int(size[:-1]) for size in sizes if size[-1:] == "K"), default=0)


def fastest(function: Callable[[], Any], seconds: float) -> float:
    """Seconds of the fastest of the calls that begin within ``seconds``, after one that does not count."""
    function()
    times, end = [], time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return min(times)


def instruction_set() -> str | None:
    """What the native kernels run on now, by the name of its level; None without them."""
    return native.level_names()[native.level_number()] if native.levels() else None
