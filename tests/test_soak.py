"""The first loops of tests/soak.py, which has thousands."""

import pytest
from soak import PROCESS, differences, soak


@pytest.mark.slow
@pytest.mark.skipif(not (PROCESS / "status").is_file(), reason="what a process has is read from Linux' /proc")
def test_nothing_grows():
    before, after = soak(loops=24, warm_up=12)
    # after so few loops, and in a process that ran other tests, memory and objects still move by more than is noise
    assert not set(differences(before, after)) - {"megabytes", "objects"}
    assert after.megabytes < 1.05 * before.megabytes
    assert after.objects < before.objects + 2000  # a tiny model has more
