"""Commands under torchrun: one group, of which nothing is left, and one process that writes."""

import json
import sys

import pytest
from beside import python

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)
GROUP_OF = """
import os, sys
from pathlib import Path
from fairseq.cli.distributed import processes_together
with processes_together():
    import torch.distributed as dist
    import torch.distributed.nn  # as transformers does
    seen = [None, None]
    dist.all_gather_object(seen, dist.get_rank())
names = {(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()}
(Path(sys.argv[1]) / os.environ["RANK"]).write_text(f"{seen} {sorted(n for n in names if 'gloo' in n)}")
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="names of threads are read from /proc")
def test_no_thread_of_the_group_outlives_it(tmp_path):
    """Python 3.11 aborts where one of gloo's wants its lock when the process has almost ended."""
    (tmp_path / "group_of.py").write_text(GROUP_OF)
    done = python(*TORCHRUN, tmp_path / "group_of.py", tmp_path)
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["[0, 1] []"] * 2


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="torchrun with gloo was not tried on Windows")
def test_distill_in_two_processes(models, pictures, tmp_path):
    words = ("--bits", 3, "--epochs", 1, "--batch-size", 8, "--calibration", 32, "--json", "-o", tmp_path / "out")
    done = python(*TORCHRUN, "-m", "fairseq.cli", "distill", models / "vit", "--images", pictures, *words)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["path"] == str(tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert not (tmp_path / "out.checkpoints").exists()
