"""Pictures by the thousand: the rows are those of the model, whatever holds the pictures and however many workers."""

import io
import os
import pickle
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import families
import numpy as np
import pyarrow
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from transformers import (
    AutoImageProcessor,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from fairseq.models.vit_quantization import ViTQuantizer

FOLDER = Path(__file__).parents[2] / "examples" / "vision_transformer"
SHAPE = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 16, "patch_size": 4}
COUNT = 21


def saved(model, folder):
    ViTQuantizer(bits=4, method="channel").quantize_model(model.eval()).save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    torch.manual_seed(0)
    config = ViTConfig(**SHAPE, intermediate_size=40, id2label={i: f"class {i}" for i in range(5)})
    return saved(ViTForImageClassification(config), tmp_path_factory.mktemp("classifier"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of ``COUNT`` pictures of which one is none, some of them in a folder within."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "more").mkdir()
    random = np.random.default_rng(0)
    for i in range(COUNT):
        path = folder / ("more" if i % 3 else ".") / f"{i:02}.png"
        Image.fromarray(random.integers(0, 256, (20, 24, 3), np.uint8)).save(path)
    (folder / "more" / "07.png").write_bytes(b"not a picture")
    return folder


@pytest.fixture
def embed(monkeypatch, capsys):
    """Run the script in this process: (exit code, standard output, standard error)."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import embed_many

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["embed_many.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            embed_many.run(embed_many.main)
        return stopped.value.code, *capsys.readouterr()

    return call


def names(pictures):
    return sorted(path.relative_to(pictures).as_posix() for path in pictures.rglob("*.png"))


def rows(output):
    return [row for path in sorted(output.glob("part-*.parquet")) for row in parquet.read_table(path).to_pylist()]


def values(output):
    return [{key: value for key, value in row.items() if key not in ("picture", "error")} for row in rows(output)]


def test_classes_are_those_of_the_model(embed, classifier, pictures, tmp_path):
    code, out, _ = embed(classifier, pictures, tmp_path / "out", "--chunk", 8, "--batch-size", 4, "--threads", 1)
    assert code == 0
    assert out.splitlines()[-2] == f"{COUNT} of {COUNT} pictures are in {tmp_path / 'out'}; 1 of them could not be read"
    assert out.splitlines()[-1] == "  more/07.png: not a readable picture"
    found = rows(tmp_path / "out")
    assert [row["picture"] for row in found] == names(pictures)
    assert [row["picture"] for row in found if row["class_index"] is None] == ["more/07.png"]
    processor = AutoImageProcessor.from_pretrained(classifier)
    model = ViTForImageClassification.from_pretrained(classifier)
    assert parquet.read_table(tmp_path / "out").num_rows == COUNT  # as one data set
    for row in found:
        if row["error"] is None:
            with torch.no_grad():
                image = Image.open(pictures / row["picture"])
                wanted = model(**processor(images=image, return_tensors="pt")).logits.softmax(-1)[0]
            assert row["class_index"] == wanted.argmax()
            assert row["label"] == f"class {row['class_index']}"
            assert row["probability"] == pytest.approx(float(wanted.max()), rel=1e-5)


def test_embeddings(embed, pictures, tmp_path):
    torch.manual_seed(0)
    model = saved(Dinov2Model(Dinov2Config(**SHAPE, mlp_ratio=2)), tmp_path / "model")
    code, *_ = embed(model, pictures, tmp_path / "out")
    assert code == 0
    processor, model = AutoImageProcessor.from_pretrained(model), Dinov2Model.from_pretrained(model)
    row = rows(tmp_path / "out")[0]
    with torch.no_grad():
        wanted = model(**processor(images=Image.open(pictures / row["picture"]), return_tensors="pt")).pooler_output[0]
    torch.testing.assert_close(torch.tensor(row["embedding"]), wanted)


def test_a_classifier_can_give_embeddings_and_others_no_classes(embed, classifier, pictures, tmp_path):
    assert embed(classifier, pictures, tmp_path / "out", "--what", "embeddings")[0] == 0
    assert len(rows(tmp_path / "out")[0]["embedding"]) == 24
    torch.manual_seed(0)
    model = saved(Dinov2Model(Dinov2Config(**SHAPE, mlp_ratio=2)), tmp_path / "model")
    code, _, error = embed(model, pictures, tmp_path / "other", "--what", "classes")
    assert code == 2
    assert error.endswith("Dinov2Model has no classes; leave out --what classes\n")
    assert embed(model, pictures, tmp_path / "two", "--what", "classes", "--workers", 2) == (2, "", error)


def test_tar_and_parquet_files_give_the_same_rows(embed, classifier, pictures, tmp_path):
    files = [pictures / name for name in names(pictures)]
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars" / "a.tar", "w") as archive:
        for path in files:
            archive.add(path, path.relative_to(pictures))
            label = tarfile.TarInfo(f"{path.stem}.cls")
            label.size = 1
            archive.addfile(label, io.BytesIO(b"3"))
    content = [{"bytes": path.read_bytes(), "path": path.name} for path in files]
    parquet.write_table(pyarrow.table({"image": content}), tmp_path / "a.parquet", row_group_size=5)
    sources = {"folder": pictures, "tar": tmp_path / "tars", "parquet": tmp_path / "a.parquet"}
    for name, source in sources.items():
        assert embed(classifier, source, tmp_path / name, "--chunk", 8)[0] == 0
    assert values(tmp_path / "folder") == values(tmp_path / "tar") == values(tmp_path / "parquet")
    code, _, error = embed(classifier, tmp_path / "a.parquet", tmp_path / "other", "--column", "img")
    assert (code, error) == (2, f"error: {tmp_path / 'a.parquet'} has no column 'img'; it has image: pass --column\n")


def test_it_goes_on_where_it_stopped_and_mixes_nothing(monkeypatch, embed, classifier, pictures, tmp_path):
    output = tmp_path / "out"
    embed(classifier, pictures, output, "--chunk", 8)
    before = rows(output)
    (output / "part-000001.parquet").unlink()
    kept = {path: path.stat().st_mtime_ns for path in output.glob("part-*")}
    code, out, _ = embed(classifier, pictures, output, "--chunk", 8)
    assert code == 0
    assert out.startswith(f"{COUNT - 8} of {COUNT} pictures were done before\n8 pictures in ")
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    assert rows(output) == before
    with monkeypatch.context() as patch:
        patch.setenv("FAIRSEQ_QUANTIZATION_ATTENTION", "float32")
        code, _, error = embed(classifier, pictures, output, "--chunk", 8)
    wanted = f"error: {output} was begun with other kernels or versions; take another folder, or empty it\n"
    assert (code, error) == (2, wanted)
    code, _, error = embed(classifier, pictures / "more", output, "--chunk", 8)
    assert (code, error) == (2, f"error: {output} was begun with other pictures; take another folder, or empty it\n")
    code, _, error = embed(classifier, pictures, classifier)
    assert code == 2
    assert error == f"error: {classifier} is not empty, and was not made by this script; take another folder\n"


def test_what_would_mix_is_refused(embed, classifier, pictures, tmp_path):
    (tmp_path / "in").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "in" / "a.png")
    code, _, error = embed(classifier, tmp_path / "in", tmp_path / "in" / "out")
    assert code == 2
    assert "would be read as pictures" in error
    (tmp_path / "in" / "b.tar").write_bytes(b"")
    code, _, error = embed(classifier, tmp_path / "in", tmp_path / "out")
    assert code == 2
    assert "holds pictures (a.png) and archives (b.tar)" in error


def test_embeddings_of_a_clip_classifier_are_those_of_its_tower(embed, pictures, tmp_path):
    model = saved(families.build("clip-classifier"), tmp_path / "model")
    assert embed(model, pictures, tmp_path / "out", "--what", "embeddings")[0] == 0
    assert len(rows(tmp_path / "out")[0]["embedding"]) == 24


def test_a_worker_with_other_kernels_is_refused(monkeypatch, embed, classifier, pictures, tmp_path):
    import embed_many
    import embedder

    wanted = embedder.arithmetic()
    assert "with native kernels, attention in bfloat16" in wanted
    for name, value in (("BACKEND", "cpu"), ("ATTENTION", "float32")):
        with monkeypatch.context() as patch:
            patch.setenv(f"FAIRSEQ_QUANTIZATION_{name}", value)
            worker = embedder.Embedder(str(classifier), str(tmp_path), "auto", 1, 1, wanted)
        result = worker({"chunk": pickle.dumps(None)})
        assert result["pictures"] == 0
        assert re.search(
            "has fairseq .*, not fairseq .* with native kernels, .*: its rows would differ", result["refused"]
        )
    monkeypatch.setattr(embed_many, "here", lambda *_: iter([result]))
    code, _, error = embed(classifier, pictures, tmp_path / "out")
    assert (code, error) == (
        2,
        f"error: a worker was refused: {result['refused']}; install and set the same there\n",
    )


@pytest.mark.slow
def test_two_workers_of_which_one_is_killed_lose_nothing(embed, classifier, pictures, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    embed(classifier, pictures, one, "--chunk", 1, "--threads", 1)
    uv = ["uv", "run", "--no-project"]  # which Ray knows: it would start workers elsewhere, without native kernels
    command = [*uv, sys.executable, FOLDER / "embed_many.py", classifier, pictures, two, "--chunk", 1, "--workers", 2]
    # Ray's workers are nice (15): beside two busy processes they took a quarter of an hour.
    environment = os.environ | {"RAY_worker_niceness": "0"}
    running = subprocess.Popen(
        list(map(str, command)), env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    killed = []
    while running.poll() is None and not killed:
        if list(two.glob("part-*")):
            killed = workers_of(running.pid)[:1]
            for pid in killed:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.001)
    out = running.communicate(timeout=500)[0]
    assert killed
    assert running.returncode == 0, out
    assert rows(two) == rows(one)


def workers_of(ancestor):
    """The processes of Ray's actors, of which ``ancestor`` is an ancestor."""
    parents, found = {}, []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            if (folder / "cmdline").read_text().startswith("ray::MapWorker"):
                found.append(int(folder.name))
        except (OSError, ProcessLookupError):
            pass

    def descends(pid):
        return pid == ancestor or (pid in parents and descends(parents[pid]))

    return [pid for pid in found if descends(pid)]
