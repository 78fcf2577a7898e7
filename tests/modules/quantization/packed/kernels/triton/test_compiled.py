"""The kernels as machine code for GPUs that are not here: tensor cores for int8, no spills, shared memory that fits."""

import json
import os
import re
import sys
from pathlib import Path

import pytest
from beside import Beside, python

pytest.importorskip("triton")

SHARED = {80: 163, 90: 227, 100: 227}  # KiB that a block of threads may have
MATRIX = {80: r"mma\.sync\.aligned\.m16n8k32\S*\.s8\.s8\.s32", 90: r"wgmma\.mma_async\S*\.s32\.s8\.s8",
          100: r"tcgen05\.mma\S*kind::i8|mma\.sync\.aligned\.m16n8k32\S*\.s8\.s8\.s32"}  # fmt: skip


@Beside
def code():
    """What is in the code of each kernel: compiled in a process that does not interpret them."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)

    def run():
        done = python(Path(__file__).with_name("compiled.py"), *SHARED, env=environment)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


@code
def test_products_run_on_tensor_cores_and_fit():
    found = {name: kernel for name, kernel in code.result().items() if "product" in name}
    assert len(found) == 3 * len(SHARED)
    for name, kernel in found.items():
        capability = int(name.split()[0])
        assert len(kernel["matrix"]) == 1, name
        assert re.fullmatch(MATRIX[capability], kernel["matrix"][0]), name
        assert kernel["shared"] <= 1024 * SHARED[capability], name


@code
def test_nothing_spills_and_memory_is_read_16_bytes_at_a_time():
    for name, kernel in code.result().items():
        assert kernel["stack"] == 0, name
        assert kernel["wide"], name
