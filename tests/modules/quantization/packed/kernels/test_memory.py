"""Memory of results: taken again when nobody holds it, and not before."""

import gc
import os
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from fairseq.modules.quantization.packed.kernels import memory

SHAPE = (2, memory.LARGE // 4)


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    monkeypatch.setattr(memory, "_free", [])


def test_it_is_taken_again():
    first = memory.empty(SHAPE)
    assert first.shape == SHAPE
    assert first.dtype == torch.float32
    assert first.is_contiguous()
    address = first.data_ptr()
    del first
    gc.collect()
    again = memory.empty((SHAPE[1], 2))
    assert again.data_ptr() == address
    assert memory.empty(SHAPE).data_ptr() != address
    assert memory.empty((3,)).shape == (3,)
    assert memory.empty((0, 5)).numel() == 0


HOLD = {
    "view": lambda t: t[1:],
    "alias": lambda t: t.detach(),
    "numpy": lambda t: t.numpy()[1],
    "storage": lambda t: t.untyped_storage(),
    "dlpack": torch.utils.dlpack.to_dlpack,
    "graph": lambda t: (t * t.detach().requires_grad_()).sum(),
}


@pytest.mark.parametrize("hold", HOLD.values(), ids=HOLD)
def test_whoever_holds_a_part_keeps_it(hold):
    held = memory.empty(SHAPE)
    address = held.data_ptr()
    held = hold(held)
    others = [memory.empty(SHAPE) for _ in range(3)]
    assert all(other.data_ptr() != address for other in others)
    del held
    gc.collect()
    assert memory.empty(SHAPE).data_ptr() == address


def test_little_is_kept():
    for count in (1, 2, 3, 4):
        held = [memory.empty((memory.KEPT // 8 - count,)) for _ in range(5)]
        del held
    assert 0 < sum(map(len, memory._free)) <= memory.KEPT
    assert len(memory._take(memory.LARGE)) == memory.LARGE  # not one of those, too large for it


def test_it_is_a_tensor_like_any_other(tmp_path):
    tensor = memory.empty(SHAPE).fill_(3)
    with torch.inference_mode():
        assert memory.empty(SHAPE).is_inference()
    assert torch.equal(pickle.loads(pickle.dumps(tensor)), tensor)
    torch.save(tensor, tmp_path / "tensor.pt")
    assert torch.equal(torch.load(tmp_path / "tensor.pt"), tensor)
    version = tensor._version
    tensor.add_(1)
    assert tensor._version == version + 1
    tensor.share_memory_()
    assert tensor.unique().tolist() == [4]


def test_threads_never_hold_the_same():
    def alone(number):
        pairs = ((memory.empty(SHAPE).fill_(number), memory.empty(SHAPE).fill_(-number)) for _ in range(200))
        return all(one.min() == number and two.max() == -number for one, two in pairs)

    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(alone, (1, 2, 3)))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_child_has_its_own():
    tensor = memory.empty(SHAPE).fill_(1)
    child = os.fork()
    if child == 0:
        tensor[0, 0] = 2  # one number: threads of the parent are not there
        os._exit(0 if memory.empty(SHAPE).data_ptr() != tensor.data_ptr() else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert tensor.unique().tolist() == [1]


def test_weights_lie_on_large_pages():
    sizes = [memory.PAGE, 100, memory.PAGE // 2, 1]
    tensors = memory.on_large_pages(sizes)
    assert [tensor.numel() for tensor in tensors] == sizes
    assert tensors[0].data_ptr() % memory.PAGE == 0
    assert all(tensor.data_ptr() % memory.ALIGNED == 0 for tensor in tensors)
    for number, tensor in enumerate(tensors):
        tensor.fill_(number)
    assert [tensor.unique().tolist() for tensor in tensors] == [[0], [1], [2], [3]]
    assert [tensor.numel() for tensor in memory.on_large_pages([3, 5])] == [3, 5]
    assert memory.on_large_pages([]) == []
