"""The cases that stand for a product hold every pair of values, and are few."""

import itertools

import pytest
from pairwise import all_pairs


@pytest.mark.parametrize(
    "sizes", [(1,), (2, 2), (5, 5), (2, 3, 4), (5, 5, 2, 5, 4), (7, 5, 2, 5, 2, 2, 4, 2), (3,) * 13]
)
def test_every_value_meets_every_other(sizes):
    values = {f"p{number}": range(size) for number, size in enumerate(sizes)}
    cases = all_pairs(**values)
    for i, j in itertools.combinations(range(len(sizes)), 2):
        assert {(case[i], case[j]) for case in cases} == set(itertools.product(range(sizes[i]), range(sizes[j])))
    assert all(value in range(size) for case in cases for value, size in zip(case, sizes, strict=True))
    least = max([a * b for a, b in itertools.combinations(sizes, 2)] or sizes)
    assert least <= len(cases) <= 1.5 * least + 12  # at best each case has a pair of the two largest that is new
    assert cases == all_pairs(**values)
