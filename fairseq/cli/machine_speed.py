"""What ``fairseq-vit doctor`` measures: the product of one layer of a ViT-Base in four ways, and memory."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fairseq.modules.quantization.packed import LinearConfig, PackedLinear
from fairseq.modules.quantization.packed.kernels import choose

TOKENS, INPUTS, OUTPUTS = 197, 768, 3072  # fc1 of a ViT-Base, one picture
SECONDS, COPYING = 4.5, 0.5  # for the products in turns, and for copies of memory
TURN, PAUSE = 0.04, 0.02  # seconds of a turn, and before it, in which idle threads of the one before stop spinning
CALLS = 3  # of a turn at least, so that one that was interrupted does not count
BUFFER = 256 * 2**20  # bytes, more than caches hold

Candidates = dict[str, Callable[[], Any]]


def measure(native: bool, memory: int | None) -> dict[str, Any]:
    """Of the CPU, with the threads that PyTorch has now, in five to six seconds.

    Args:
        native: whether the native kernels run.
        memory: bytes of the machine, of which a sixteenth is copied at most.

    Returns:
        ``tokens``, ``inputs`` and ``outputs`` of the layer; ``rounds`` of turns; ``kernels`` that ran the integers;
        ``products``: of each candidate the median ``ms``, ``gops`` (10^9 multiplications and additions a second) and
        the medians of the ratios of each round, ``to_float32`` and ``to_bfloat16``, over 1 where the candidate is
        faster; ``copy_gb_per_second``: bytes read and written.
    """
    backend = "native" if native else choose(torch.device("cpu")).name
    with torch.inference_mode():
        times = in_turns(candidates(backend), SECONDS)
        copied = copy_rate(min(BUFFER, (memory or 16 * BUFFER) // 16), COPYING)
    operations = 2 * TOKENS * INPUTS * OUTPUTS
    products = {}
    for name, taken in times.items():
        middle = statistics.median(taken)
        products[name] = {"ms": 1000 * middle, "gops": operations / middle / 1e9} | {
            f"to_{other}": statistics.median(theirs / own for theirs, own in zip(times[other], taken))
            for other in ("float32", "bfloat16")
        }
    return {
        "tokens": TOKENS, "inputs": INPUTS, "outputs": OUTPUTS, "rounds": len(times["float32"]), "kernels": backend,
        "products": products, "copy_gb_per_second": copied / 1e9,
    }  # fmt: skip


def candidates(backend: str) -> Candidates:
    """The same layer in float32, in bfloat16, and packed at 8 and 4 bits for these kernels, as functions."""
    linear = nn.Linear(INPUTS, OUTPUTS, device="cpu", dtype=torch.float32)
    x = torch.randn(TOKENS, INPUTS, device="cpu", dtype=torch.float32)

    def calls(layer: nn.Module, x: Tensor) -> Callable[[], Any]:
        return lambda: layer(x)

    found = {"float32": calls(linear, x), "bfloat16": calls(copy.deepcopy(linear).bfloat16(), x.bfloat16())}
    for bits in (8, 4):
        config = LinearConfig(bits, "channel", backend=backend)
        found[f"{bits} bits"] = calls(PackedLinear.from_float(linear, config), x)
    return found


def in_turns(candidates: Candidates, seconds: float) -> dict[str, list[float]]:
    """Seconds of a call of each candidate in each round, as many rounds as begin in ``seconds``, at least one.

    The time of a turn is the median of its calls, after one that does not count.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    end = time.perf_counter() + seconds
    while True:
        for name, call in candidates.items():
            time.sleep(PAUSE)
            times[name].append(statistics.median(_seconds(call, TURN, CALLS)))
        if time.perf_counter() > end:
            return times


def copy_rate(nbytes: int, seconds: float) -> float:
    """Bytes per second that copying a buffer of ``nbytes`` reads and writes together, the median of the copies."""
    source = torch.ones(nbytes // 4, device="cpu", dtype=torch.float32)
    target = torch.empty_like(source)
    return 2 * source.nbytes / statistics.median(_seconds(lambda: target.copy_(source), seconds, 1))


def _seconds(call: Callable[[], Any], seconds: float, least: int) -> list[float]:
    """What each of the calls takes that begin within ``seconds``, ``least`` at least, after one that does not count."""
    call()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < least or time.perf_counter() < end:
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return times
