"""Commands under ``torchrun`` or ``accelerate launch``: one process group, and one process that speaks."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from fairseq.cli.output import UserError


def check_launcher() -> None:
    """UserError where ``accelerate launch --cpu`` was told of several processes: it starts one, and says nothing.

    For several it sets where they meet, and then, without MPI, neither their number nor their ranks.
    """
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1")
    if on_cpu and "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
        raise UserError(
            "accelerate launch --cpu starts one process, whatever --num_processes says; torchrun --nproc-per-node 2, "
            "or accelerate launch --multi_gpu --num_processes 2, starts two, on CPUs as well"
        )


@contextmanager
def processes_together(device: str) -> Iterator[None]:
    """Inside, the processes that a launcher started are one group, as its environment variables say; without any, none.

    NCCL where each process of this machine has a GPU of its own, and ``device`` is not "cpu"; gloo otherwise. UserError
    as :func:`check_launcher`.
    """
    check_launcher()
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield
        return
    import torch
    import torch.distributed as dist

    import fairseq.quantization.calibration.processes  # noqa: F401 - before there is a group, see there

    local = int(os.environ.get("LOCAL_RANK", "0"))
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    own_gpu = device != "cpu" and gpus >= int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
    if own_gpu:
        torch.cuda.set_device(local)
    begun = not dist.is_initialized()
    if begun:
        with _nothing_on_stdout():
            dist.init_process_group("nccl" if own_gpu else "gloo")
    try:
        yield
    finally:
        if begun:
            dist.destroy_process_group()


@contextmanager
def _nothing_on_stdout() -> Iterator[None]:
    """Inside, what is written to the file of stdout goes to that of stderr: the gloo of torch 2.9 greets there."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def speaks() -> bool:
    """Whether this process is the one that prints and writes."""
    return os.environ.get("RANK", "0") == "0"
