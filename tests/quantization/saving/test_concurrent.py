"""One model or folder, many threads and processes: each gets what one alone would get."""

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
import transformers
from families import build
from transformers import AutoModelForImageClassification

from fairseq.models.vit_quantization import ViTQuantizer

WORKERS, TURNS = 8, 4


@pytest.fixture(scope="module")
def model():
    return build("vit")


@pytest.fixture(scope="module")
def inputs():
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(1 + k % 3, 3, 16, 16, generator=generator) for k in range(WORKERS)]


@pytest.fixture(scope="module")
def packed(model):
    return ViTQuantizer(bits=4, method="channel").quantize_model(model)


def together(work):
    """What ``work(k)`` returns in each of eight threads that begin at once; as much is interleaved as can be."""
    barrier = Barrier(WORKERS)

    def begin(k):
        barrier.wait()
        return work(k)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(WORKERS) as pool:
            return list(pool.map(begin, range(WORKERS)))
    finally:
        sys.setswitchinterval(interval)


@torch.no_grad()
def logits(model, pixels):
    return model(pixels).logits


KINDS = {
    "fused": ({"bits": 4, "method": "channel"}, {}),
    "layers": ({"bits": 8, "method": "channel"}, {"engine": "layers"}),
    "integers": ({"bits": 8, "method": "channel", "arithmetic": "integer"}, {}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_threads_that_call_one_model(model, inputs, kind):
    settings, keywords = KINDS[kind]
    if "arithmetic" in settings:
        keywords = {**keywords, "calibration": torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))}
    quantized = ViTQuantizer(**settings).quantize_model(model, **keywords)
    found = together(lambda k: [logits(quantized, inputs[k]) for _ in range(TURNS)])  # the first calls, too
    for k, results in enumerate(found):
        expected = logits(quantized, inputs[k])
        assert all(torch.equal(result, expected) for result in results)


@pytest.mark.skipif(
    int(transformers.__version__.split(".")[0]) < 5,
    reason="from_pretrained of transformers 4 changes torch for all threads",
)
def test_threads_that_load_one_folder(model, packed, inputs, tmp_path):
    packed.save_pretrained(tmp_path / "packed")
    ViTQuantizer.save(packed, tmp_path / "packed.safetensors")

    def load(k):
        if k % 2:
            return ViTQuantizer.load(tmp_path / "packed.safetensors", model)
        return AutoModelForImageClassification.from_pretrained(tmp_path / "packed").eval()

    expected = logits(packed, inputs[0])
    assert all(torch.equal(logits(loaded, inputs[0]), expected) for loaded in together(load))


def test_threads_that_save_to_one_name(packed, model, inputs, tmp_path):
    path = tmp_path / "packed.safetensors"
    others = [ViTQuantizer(bits=bits, method="channel").quantize_model(model) for bits in (4, 8)]
    together(lambda k: ViTQuantizer.save(others[k % 2], path))
    loaded = logits(ViTQuantizer.load(path, model), inputs[0])
    assert any(torch.equal(loaded, logits(other, inputs[0])) for other in others)
    assert os.listdir(tmp_path) == [path.name]


def in_processes(count, work):
    """Exit codes of ``count`` processes, forked from this one, that do ``work`` and wait for nobody."""
    children = []
    for k in range(count):
        child = os.fork()
        if not child:
            code = 1
            try:
                torch.set_num_threads(1)
                code = work(k)
            finally:
                os._exit(code)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="no processes that begin where this one is")


@forks
def test_processes_that_load_and_run_one_folder(packed, inputs, tmp_path):
    packed.save_pretrained(tmp_path)
    expected = logits(packed, inputs[0])

    def work(k):
        loaded = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
        return 0 if torch.equal(logits(loaded, inputs[0]), expected) else 2

    assert in_processes(4, work) == [0] * 4


@forks
@pytest.mark.parametrize("size", ["5GB", "5KB"], ids=["one file", "shards"])
def test_loading_while_another_process_saves(model, packed, inputs, tmp_path, size):
    """Either model comes, or one sentence; never one half of each. Both have the same settings, but other weights."""
    other = build("vit")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    both = [packed, ViTQuantizer(bits=4, method="channel").quantize_model(other)]
    expected = [logits(model, inputs[0]) for model in both]
    packed.save_pretrained(tmp_path, max_shard_size=size)

    def work(k):
        if not k:
            for turn in range(6):
                both[turn % 2].save_pretrained(tmp_path, max_shard_size=size)
            return 0
        for _ in range(3):
            try:
                found = logits(AutoModelForImageClassification.from_pretrained(tmp_path).eval(), inputs[0])
            except (ValueError, OSError):  # it was replaced meanwhile
                continue
            if not any(torch.equal(found, one) for one in expected):
                return 2
        return 0

    assert in_processes(3, work) == [0, 0, 0]
    found = logits(AutoModelForImageClassification.from_pretrained(tmp_path).eval(), inputs[0])
    assert torch.equal(found, expected[1])
