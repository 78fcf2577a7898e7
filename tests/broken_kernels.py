"""Kernels in the place of the CPU's: some that are right on every processor, and some that are wrong on every one."""

import sys

from fairseq.modules.quantization.packed.input_grid import InputGrid
from fairseq.modules.quantization.packed.kernels import choose, functional, reference

choosing = sys.modules[choose.__module__]  # the package has the function by that name
RIGHT = choosing.TABLE["reference"]._replace(name="cpu", device="cpu")
"""Kernels that pass the check on every processor; those of this one may not."""


def wrong_product(q, codes):
    return reference.product(q, codes) + (codes.shape[0] > 1)


def wrong_integers(x, weight, bias, grid):
    return functional.integer(x, weight, bias, grid, wrong_product)


def nudged(x, weight, bias, *grid):
    return reference.integer(x, weight, bias, *(grid or [InputGrid()])) + 0.01


def break_cpu(monkeypatch, **functions):
    monkeypatch.setitem(choosing.TABLE, "cpu", RIGHT._replace(**functions))
