"""The first loops of tests/soak.py, which has thousands."""

import pytest
from soak import PROCESS, differences, soak


@pytest.mark.skipif(not (PROCESS / "status").is_file(), reason="what a process has is read from Linux' /proc")
def test_nothing_grows():
    before, after = soak(loops=24, warm_up=12)
    grown = set(differences(before, after))
    assert not grown - {"megabytes"}  # of a process that ran other tests, memory moves by more than a hundredth
    assert after.megabytes < 1.05 * before.megabytes
