"""How long layers of each width, and whole models, take on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fairseq.quantization.bit_allocation.replay import batches, run
from fairseq.quantization.bit_allocation.twins import Twins

ROUNDS = 21
"""How often each is run, in turns; the least time counts, as whatever else a machine does only adds to it."""


def layer_times(twins: Twins, pixel_values: Tensor, batch_size: int) -> dict[str, dict[int, int]]:
    """Layer name -> width -> nanoseconds for ``batch_size`` pictures; layers of one shape and kind are timed once.

    Args:
        twins: of the model.
        pixel_values: pictures, at least one, which are repeated as often as needed.
        batch_size: pictures per run.
    """
    kinds: dict[str, object] = {}
    read: dict[object, Tensor] = {}  # by the first layer of each kind

    def keep(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        own = twins.layers[name]
        some = next(iter(own.values()))
        shape = args[0].shape, some.out_features
        kinds[name] = kind = (shape, replace(some.config, bits=8), some.input_factor is None, *own)
        if kind not in read:
            read[kind] = args[0].detach().clone()

    handles = [twins.model.get_submodule(name).register_forward_pre_hook(partial(keep, name)) for name in twins.layers]
    try:
        run(twins.model, _batch(twins.model, pixel_values, batch_size))
    finally:
        for handle in handles:
            handle.remove()
    known: dict[object, dict[int, int]] = {}
    times = {}
    for name, own in twins.layers.items():
        kind = kinds.get(name)
        if kind is None:  # no picture reaches it
            times[name] = dict.fromkeys(own, 0)
            continue
        if kind not in known:
            known[kind] = least({bits: partial(layer, read[kind]) for bits, layer in own.items()}, read[kind].device)
        times[name] = known[kind]
    return times


def model_time(model: nn.Module, pixel_values: Tensor, batch_size: int) -> int:
    """Nanoseconds of a model for ``batch_size`` pictures."""
    inputs = _batch(model, pixel_values, batch_size)
    return least({0: partial(run, model, inputs)}, inputs["pixel_values"].device)[0]


@torch.no_grad()
def least(calls: Mapping[int, Callable[[], object]], device: torch.device) -> dict[int, int]:
    """The least nanoseconds of each of some calls, which take turns."""
    times: dict[int, int] = {}
    for turn in range(ROUNDS):
        for key, call in calls.items():
            _wait(device)
            started = time.perf_counter_ns()
            call()
            _wait(device)
            taken = time.perf_counter_ns() - started
            if turn:  # the first warms up
                times[key] = min(taken, times.get(key, taken))
    return times


def _batch(model: nn.Module, pixel_values: Tensor, batch_size: int) -> dict[str, Tensor]:
    chosen = torch.arange(batch_size) % len(pixel_values)
    return batches(model, pixel_values[chosen], batch_size)[0]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
