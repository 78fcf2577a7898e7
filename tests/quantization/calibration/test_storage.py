"""What is stored comes back, from memory or from a file; what it cannot hold is told."""

import errno
import os
import tempfile

import pytest
import torch

from fairseq.quantization.calibration.storage import Storage


def tensors():
    torch.manual_seed(0)
    return [
        torch.randn(3, 5),
        torch.randn(7).bfloat16(),
        torch.arange(6).view(2, 3),
        torch.empty(0, 4),
        torch.randn(4).half(),
    ]


@pytest.mark.parametrize("limit", [0, 40, 10**6], ids=["file", "some of both", "memory"])
def test_what_is_stored_comes_back(limit):
    stored, expected = Storage("numbers", limit), tensors()
    for x in expected:
        stored.append(x)
        x_before = x.clone()
        x.zero_()  # a copy is stored
        x.copy_(x_before)
    for index, new in ((0, torch.randn(3, 5)), (1, torch.randn(9, 9)), (4, torch.randn(2)), (0, torch.randn(1))):
        stored[index], expected[index] = new, new
    stored.append(torch.ones(100))
    assert len(stored) == 6
    for got, wanted in zip(stored, [*expected, torch.ones(100)], strict=True):
        assert got.dtype == wanted.dtype
        assert torch.equal(got, wanted)


def test_the_file_has_no_name(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    stored = Storage("numbers", 0)
    stored.append(torch.ones(1000))
    assert not list(tmp_path.iterdir())
    assert torch.equal(stored[0], torch.ones(1000))


def test_a_full_disk_is_told(monkeypatch):
    class Full:
        def seek(self, place):
            pass

        def write(self, content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: Full())
    stored = Storage("hidden states of the calibration images", 0)
    with pytest.raises(OSError, match=r"no space left in .* for hidden states of the .*TMPDIR") as error:
        stored.append(torch.ones(1000))
    assert error.value.errno == errno.ENOSPC
