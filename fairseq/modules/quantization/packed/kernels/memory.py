"""Memory of results, taken again once nobody holds it, and of weights, on large pages: new pages cost much."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import mmap
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

LARGE = 2**18
"""Bytes from which on memory is kept; the allocator of C takes such blocks from the system, and gives them back."""
KEPT = 2**26
"""Bytes that are kept for results to come, at most."""

PAGE = 2**21
"""Bytes of a large page."""
ALIGNED = 64
"""Bytes of a line of the cache."""

_free: list[mmap.mmap] = []
_lent: dict[int, weakref.ref[Any]] = {}
"""By the id of a region what a tensor holds of it."""


def empty(shape: Sequence[int]) -> Tensor:
    """A float32 tensor on the CPU, its numbers anything: ``torch.empty`` in memory that is there already, if any is."""
    count = torch.Size(shape).numel()
    if 4 * count < LARGE or not hasattr(mmap, "MAP_ANONYMOUS"):
        return torch.empty(shape, dtype=torch.float32, device="cpu")
    region = _take(4 * count)
    held = _bytes(len(region)).from_buffer(region)
    _lent[id(region)] = weakref.ref(held, functools.partial(_give_back, region))  # when its storage is freed
    return torch.frombuffer(held, dtype=torch.float32, count=count).view(*shape)


def on_large_pages(sizes: Sequence[int]) -> list[Tensor]:
    """uint8 tensors of these sizes, one behind the other, at multiples of 64 bytes.

    Their memory is one region, of pages of 2 MiB where the system gives some: it looks up where a page lies for each 4
    KiB otherwise, which takes as long as a twentieth of all that is done with weights read once.
    """
    places = list(itertools.accumulate((-(-size // ALIGNED) * ALIGNED for size in sizes), initial=0))
    if places[-1] < PAGE or not hasattr(mmap, "MAP_ANONYMOUS"):
        return [torch.empty(size, dtype=torch.uint8, device="cpu") for size in sizes]
    region = mmap.mmap(-1, places[-1] + PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a system that has none
            region.madvise(mmap.MADV_HUGEPAGE)
    everything = torch.frombuffer(region, dtype=torch.uint8)
    first = -everything.data_ptr() % PAGE
    return [everything[first + place :][:size] for place, size in zip(places, sizes)]


def _take(size: int) -> mmap.mmap:
    """A free region of that size, or larger by half at most, or a new one."""
    for index in range(len(_free) - 1, -1, -1):  # the last one freed is the likeliest to be in a cache
        try:
            region = _free.pop(index)
        except IndexError:  # another thread was here
            continue
        if size <= len(region) <= size + size // 2:
            return region
        _free.insert(index, region)
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def _give_back(region: mmap.mmap, _: weakref.ref[Any]) -> None:
    _lent.pop(id(region), None)
    if len(region) > KEPT:
        return
    _free.append(region)
    while sum(map(len, list(_free))) > KEPT:
        try:
            _free.pop(0)  # the one that was not taken for the longest time
        except IndexError:
            return


@functools.lru_cache(64)
def _bytes(size: int) -> Any:
    """A type for so many bytes whose instances can be referred to weakly."""
    return type("Bytes", (ctypes.c_char * size,), {})
