"""Several processes: which pictures are whose, and sums and lists over all of them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

if dist.is_available() and os.environ.get("WORLD_SIZE", "1") != "1":
    # The group at the time of its import is its functions' default argument. Imported later, as transformers does, it
    # holds the group past destroy_process_group, and gloo's threads may then abort a process that ends. Not where there
    # is no launcher: before torch 2.10 it makes a temporary folder.
    import torch.distributed.nn

SHARE = 16
"""Pictures that one process takes together: of 128 pictures, up to 8 processes have some."""


_alone: ContextVar[bool] = ContextVar("alone", default=False)


def count() -> int:
    """How many processes work together: those of torch.distributed's default group, 1 if there is none."""
    return 1 if _alone.get() or not (dist.is_available() and dist.is_initialized()) else dist.get_world_size()


@contextmanager
def alone() -> Iterator[None]:
    """Inside, this process does everything itself, and so do the others if they do the same."""
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


def rank() -> int:
    """Which of them this one is, from 0."""
    return dist.get_rank() if count() > 1 else 0


def share(pictures: int) -> range:
    """The numbers of the pictures of this process: whole :data:`SHARE` of them, in order, and as many as others have.

    Args:
        pictures: how many there are in all.
    """
    shares = -(-pictures // SHARE)
    start, stop = (-(-shares * r // count()) * SHARE for r in (rank(), rank() + 1))  # the first has some, always
    return range(min(start, pictures), min(stop, pictures))


def total(x: Tensor) -> Tensor:
    """The sum of the tensors of all processes, in each of them; ``x`` is written."""
    if count() == 1:
        return x
    place = x if dist.get_backend() == "nccl" or not x.is_cuda else x.cpu()
    if dist.get_backend() == "nccl" and not x.is_cuda:
        place = x.cuda()
    dist.all_reduce(place)
    return x if place is x else x.copy_(place)


def gathered(value: Any) -> list[Any]:
    """What each process has, in their order; anything that pickle takes, tensors on the CPU."""
    if count() == 1:
        return [value]
    values: list[Any] = [None] * count()
    dist.all_gather_object(values, value)
    return values


def first(value: Any) -> Any:
    """What the first process has, in each of them."""
    if count() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def concatenated(x: Tensor | None) -> Tensor | None:
    """The tensors of all processes one after the other, on the device of ``x``; None where none has any."""
    if count() == 1:
        return x
    parts = [part for part in gathered(None if x is None else x.cpu()) if part is not None]
    if not parts:
        return None
    whole = torch.cat(parts)
    return whole if x is None else whole.to(x.device)
