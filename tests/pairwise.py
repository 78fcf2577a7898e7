"""All pairs: few cases in which every value of each parameter meets every value of each other one."""

import itertools
from collections.abc import Sequence

import pytest
import torch


def all_pairs(**values: Sequence) -> list[tuple]:
    """Cases, a value for each parameter in the order given; the same ones each time.

    Most faults need one setting, and nearly all others two that meet; a product of all settings tests those again and
    again. A case begins with a pair that is still to come, and each further value is the one that brings the most of
    those, or else the one used least so far.
    """
    sizes = [len(choices) for choices in values.values()]
    if len(sizes) == 1:
        return [(choice,) for choices in values.values() for choice in choices]
    missing = {
        (i, a, j, b): None
        for i, j in itertools.combinations(range(len(sizes)), 2)
        for a, b in itertools.product(range(sizes[i]), range(sizes[j]))
    }
    used = [[0] * size for size in sizes]
    cases = []
    while missing:
        i, a, j, b = next(iter(missing))
        case = {i: a, j: b}
        for k in range(len(sizes)):
            if k not in case:
                case[k] = max(range(sizes[k]), key=lambda v: (len(_new(k, v, case, missing)), -used[k][v], -v))
        for k, v in case.items():
            used[k][v] += 1
            for pair in _new(k, v, case, missing):
                del missing[pair]
        cases.append(tuple(choices[case[k]] for k, choices in enumerate(values.values())))
    return cases


def _new(k, v, case, missing):
    """The pairs still to come that value ``v`` of parameter ``k`` makes with what is in ``case``."""
    pairs = (((k, v, j, b) if k < j else (j, b, k, v)) for j, b in case.items() if j != k)
    return [pair for pair in pairs if pair in missing]


def pairwise(**values: Sequence) -> pytest.MarkDecorator:
    """``pytest.mark.parametrize`` with :func:`all_pairs` of these values."""
    names = list(values)
    cases = all_pairs(**values)
    return pytest.mark.parametrize(names, cases, ids=["-".join(map(_short, case)) for case in cases])


def _short(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return "tensor"
    return getattr(value, "__name__", None) or str(value).removeprefix("torch.")
