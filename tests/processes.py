"""Two processes of one gloo group, which run a function of a test."""

import importlib
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist


def together(function, *arguments, count=2):
    """What ``function`` returns in each of ``count`` new processes, which are one group."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        torch.save((function.__module__, function.__qualname__, sys.path, arguments), path / "call.pt")
        torch.multiprocessing.spawn(_one, (count, folder), nprocs=count)
        return [torch.load(path / f"{rank}.pt", weights_only=False) for rank in range(count)]


def _one(rank, count, folder):
    path = Path(folder)
    module, name, places, arguments = torch.load(path / "call.pt", weights_only=False)
    sys.path[:] = [*places, str(Path(__file__).parents[1])]  # tests are modules of a package, whatever started pytest
    torch.set_num_threads(1)
    importlib.import_module("torch.distributed.nn")  # see fairseq/quantization/calibration/processes.py
    function = getattr(importlib.import_module(module), name)
    dist.init_process_group("gloo", init_method=f"file://{path / 'group'}", rank=rank, world_size=count)
    try:
        torch.save(function(*arguments), path / f"{rank}.pt")
    finally:
        dist.destroy_process_group()
