"""knapsack: the choice is the optimum, against every assignment there is."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fairseq.quantization.bit_allocation.assignment import assign_bits


@st.composite
def problems(draw):
    names = [f"layer.{i}" for i in range(draw(st.integers(1, 4)))]
    widths = draw(st.lists(st.sampled_from((2, 3, 4, 5, 6, 8)), min_size=1, max_size=4, unique=True))
    error = st.sampled_from((0.0, 1e-6, 0.25, 0.5, 1.0)) | st.floats(0, 10)
    errors = {name: {bits: draw(error) for bits in widths} for name in names}
    return errors, {name: draw(st.integers(1, 9)) * draw(st.sampled_from((1, 7, 1000))) for name in names}


def every_assignment(errors, sizes):
    """(summed error, size) of each; a width counts as no worse than a narrower one."""
    for bits in itertools.product(*(layer for layer in errors.values())):
        chosen = list(zip(errors, bits))
        yield (
            sum(min(e for b, e in errors[n].items() if b <= bits) for n, bits in chosen),
            sum(bits * sizes[n] for n, bits in chosen),
        )


@given(problems(), st.floats(0, 1))
def test_the_assignment_for_a_size_is_the_best(problem, share):
    errors, sizes = problem
    total = sum(sizes.values())
    low, high = (f(size for _, size in every_assignment(errors, sizes)) / total for f in (min, max))
    average = min(high, low + share * (high - low))
    got = assign_bits(errors, sizes, average_bits=average)
    fits = [(error, size) for error, size in every_assignment(errors, sizes) if size <= average * total + 1e-6]
    error = min(error for error, _ in fits)
    assert got.average_bits <= average + 1e-9
    assert got.predicted_error == pytest.approx(error, abs=1e-8)
    assert got.average_bits * total <= max(s for e, s in fits if e <= error + 1e-8) + 1e-6


@given(problems(), st.floats(0, 1))
def test_the_assignment_for_an_error_is_the_smallest(problem, share):
    errors, sizes = problem
    low, high = (f(error for error, _ in every_assignment(errors, sizes)) for f in (min, max))
    limit = low + share * (high - low)
    got = assign_bits(errors, sizes, max_error=limit)
    smallest = min(size for error, size in every_assignment(errors, sizes) if error <= limit * (1 + 1e-9))
    assert got.predicted_error <= limit * (1 + 1e-8)
    assert got.average_bits * sum(sizes.values()) == pytest.approx(smallest)


@pytest.mark.parametrize("step", [1, 36864])
def test_more_bits_never_predict_a_larger_error(step):
    """With sizes of no common divisor too, where the table is coarser than the sizes."""
    draw = torch.Generator().manual_seed(0)
    sizes = {f"layer.{i}": step * int(torch.randint(1, 900_000 // step, (), generator=draw)) for i in range(40)}
    errors = {name: {b: torch.rand((), generator=draw).item() * 4.0**-b for b in (2, 3, 4, 6, 8)} for name in sizes}
    averages = [2, 2.01, 2.5, 3, 3.7, 4, 5, 6.3, 7.9, 8]
    assigned = [assign_bits(errors, sizes, average_bits=average) for average in averages]
    for average, got in zip(averages, assigned):
        assert got.average_bits <= average + 1e-9
    assert all(a.predicted_error >= b.predicted_error for a, b in itertools.pairwise(assigned))
    assert assigned[4].average_bits > 3.68
    limited = assign_bits(errors, sizes, max_error=assigned[4].predicted_error)
    assert limited.average_bits <= assigned[4].average_bits + 1e-9


def test_equal_errors_take_fewer_bits():
    errors = {"a": {2: 1.0, 4: 0.5, 8: 0.5}, "b": {2: 0.1, 4: 0.3, 8: 0.1}}
    assert assign_bits(errors, {"a": 10, "b": 10}, average_bits=8).bits == {"a": 4, "b": 2}


@pytest.mark.parametrize(
    ("limits", "error", "match"),
    [
        ({}, ValueError, "exactly one of average_bits and max_error"),
        ({"average_bits": 4, "max_error": 1.0}, ValueError, "exactly one"),
        ({"average_bits": 1.5}, ValueError, "average_bits must be from 2 to 8, what the choices allow; got 1.5"),
        ({"average_bits": 8.1}, ValueError, "from 2 to 8"),
        ({"average_bits": "4"}, TypeError, "average_bits must be a number"),
        ({"average_bits": math.nan}, ValueError, "average_bits must be finite"),
        ({"max_error": -1.0}, ValueError, "max_error must be finite and not negative"),
        ({"max_error": 0.01}, ValueError, r"max_error=0.01 cannot be kept: .* summed error of 0.5"),
        ({"average_bits": 4, "sizes": {"a": 4}}, ValueError, r"same layers.*\['b'\]"),
        ({"average_bits": 4, "sizes": {"a": 4, "b": 0}}, ValueError, "b: the number of weights"),
        ({"average_bits": 4, "errors": {"a": {}, "b": {4: 1.0}}}, ValueError, "a: errors must be finite"),
        ({"average_bits": 4, "errors": {"a": {4: math.nan}, "b": {4: 1.0}}}, ValueError, "a: errors must be finite"),
        ({"average_bits": 4, "errors": {"a": {4: 1.0}, "b": {9: 1.0}}}, ValueError, "9"),
    ],
)
def test_assign_bits_refuses(limits, error, match):
    arguments = {"errors": {"a": {2: 1.0, 8: 0.25}, "b": {2: 1.0, 8: 0.25}}, "sizes": {"a": 4, "b": 4}, **limits}
    with pytest.raises(error, match=match):
        assign_bits(**arguments)
