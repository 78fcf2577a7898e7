"""Commands under torchrun: one group, of which nothing is left, and one process that writes."""

import json
import os
import sys

import pytest
import torch
import torch.distributed as dist
from beside import TORCHRUN, python

from fairseq.cli.distributed import processes_together

SCRIPT = """
import os, sys
from pathlib import Path
from fairseq.cli.distributed import processes_together
from fairseq.cli.main import main
folder, *words = sys.argv[1:]
seen = [None, None]
if words:
    seen = main(words)
else:
    with processes_together("auto"):
        import torch.distributed as dist
        import torch.distributed.nn  # as transformers does
        dist.all_gather_object(seen, dist.get_rank())
names = {(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()}
(Path(folder) / os.environ["RANK"]).write_text(f"{seen} {sorted(n for n in names if 'gloo' in n)}")
"""


def in_two_processes(folder, *words):
    """What each of them noted, and what ``python`` gives."""
    (folder / "script.py").write_text(SCRIPT)
    done = python(*TORCHRUN, folder / "script.py", folder, *words)
    assert done.returncode == 0, done.stderr
    return [(folder / rank).read_text() for rank in "01"], done


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="names of threads are read from /proc")
def test_no_thread_of_the_group_outlives_it(tmp_path):
    """Python 3.11 aborts where one of gloo's wants its lock when the process has almost ended."""
    assert in_two_processes(tmp_path)[0] == ["[0, 1] []"] * 2


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="names of threads are read from /proc")
def test_distill_in_two_processes(models, pictures, tmp_path):
    words = ("--bits", 3, "--epochs", 1, "--batch-size", 8, "--calibration", 32, "--json", "-o", tmp_path / "out")
    noted, done = in_two_processes(tmp_path, "distill", models / "vit", "--images", pictures, *words)
    assert noted == ["0 []"] * 2
    assert json.loads(done.stdout)["path"] == str(tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert not (tmp_path / "out.checkpoints").exists()


def test_what_the_library_says_is_not_on_stdout(monkeypatch, capfd):
    """The gloo of torch 2.9 greets there, before the JSON that someone wants to read."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(dist, "init_process_group", lambda backend: os.write(1, b"[Gloo] connected"))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    with processes_together("cpu"):
        os.write(1, b"result")
    assert capfd.readouterr() == ("result", "[Gloo] connected")


def test_gloo_where_the_model_is_on_the_cpu(monkeypatch):
    """GPUs that are there, but not to be used, have no say: NCCL moves nothing that is on a CPU."""
    begun = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(dist, "init_process_group", begun.append)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    for device in ("auto", "cpu"):
        with processes_together(device):
            pass
    assert begun == ["nccl", "gloo"]
