"""Commands under ``torchrun`` or ``accelerate launch``: one process group, and one process that speaks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def processes_together() -> Iterator[None]:
    """Inside, the processes that a launcher started are one group, as its environment variables say; without any, none.

    NCCL where each process of this machine has a GPU of its own, gloo otherwise.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield
        return
    import torch
    import torch.distributed as dist

    local = int(os.environ.get("LOCAL_RANK", "0"))
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    own_gpu = gpus >= int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
    if own_gpu:
        torch.cuda.set_device(local)
    begun = not dist.is_initialized()
    if begun:
        dist.init_process_group("nccl" if own_gpu else "gloo")
    try:
        yield
    finally:
        if begun:
            dist.destroy_process_group()


def speaks() -> bool:
    """Whether this process is the one that prints and writes."""
    return os.environ.get("RANK", "0") == "0"
