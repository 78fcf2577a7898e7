"""Files: written whole by whoever comes first, and looked at before they are read."""

import os
import signal
import threading
import time
import zipfile
from pathlib import Path

import pytest
import torch

from fairseq.quantization import files
from fairseq.quantization.files import check_stored, folder_beside, plain_file, replacing, uninterrupted


def test_what_is_a_plain_file(tmp_path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "0123").write_text("x")
    (tmp_path / "link").symlink_to("blobs/0123")  # as in HuggingFace's cache
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "to pipe").symlink_to("pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    assert plain_file(tmp_path / "link") == tmp_path / "link"
    for name, said in {"pipe": "a pipe", "to pipe": "a pipe", "zero": "a device", "blobs": "a folder"}.items():
        with pytest.raises(ValueError, match=f"{name} must be a plain file; it is {said}"):
            plain_file(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="nothing: no such file"):
        plain_file(tmp_path / "nothing")
    with pytest.raises(OSError, match="symbolic links"):
        plain_file(tmp_path / "loop")
    with pytest.raises(ValueError, match="no name of a file"):
        plain_file("a\0b")


def test_a_zip_file_that_inflates_is_refused(tmp_path):
    torch.save({"a": torch.zeros(1000)}, tmp_path / "good.pt")
    check_stored(tmp_path / "good.pt")
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10**7))
    with pytest.raises(ValueError, match=r"bomb.pt is no file of torch.save: .*10,000,000 when it is unpacked"):
        check_stored(tmp_path / "bomb.pt")
    (tmp_path / "text.pt").write_text("x")
    with pytest.raises(ValueError, match="is damaged"):
        check_stored(tmp_path / "text.pt")


OURS = "fairseq-0123456789a"


def test_what_a_killed_process_left_goes_and_what_another_writes_stays(tmp_path):
    for name in ("model", "model2"):
        (tmp_path / f".{name}.{OURS}0.tmp").mkdir()
        (tmp_path / f".{name}.{OURS}0.tmp" / "half").write_text("x")
        os.utime(tmp_path / f".{name}.{OURS}0.tmp", (0, 0))
    with folder_beside(tmp_path / "model") as held:
        os.utime(held, (0, 0))
        with replacing(tmp_path / "model") as file:
            file.write_text("x")
            assert held.is_dir()
        young, own = tmp_path / f".model.{OURS}1.tmp", tmp_path / ".model.fine-tuned.tmp"
        own.mkdir()  # somebody's
        os.utime(own, (0, 0))
        young.mkdir()
        with folder_beside(tmp_path / "model"):
            assert young.is_dir()
            assert held.is_dir()
        young.rmdir()
    assert sorted(os.listdir(tmp_path)) == [".model.fine-tuned.tmp", f".model2.{OURS}0.tmp", "model"]


def test_the_folder_of_another_is_never_taken_away(tmp_path, monkeypatch):
    monkeypatch.setattr(files.secrets, "token_hex", lambda size: "0" * 2 * size)
    other = tmp_path / ".model.fairseq-000000000000.tmp"
    other.mkdir()
    with pytest.raises(FileExistsError), folder_beside(tmp_path / "model"):
        pass
    assert other.is_dir()


def test_signals_wait_until_the_block_is_done():
    done = []

    def interrupted():
        with uninterrupted():
            with uninterrupted():
                signal.raise_signal(signal.SIGINT)
            done.append("inner")
        done.append("never")

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert done == ["inner"]
    came = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: came.append(number))
    try:
        with uninterrupted():
            signal.raise_signal(signal.SIGTERM)
            assert not came
        assert came == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_threads_that_write_one_file_do_not_share_a_temporary_one(tmp_path):
    begun = threading.Barrier(2)

    def write(text):
        with replacing(tmp_path / "file") as temporary:
            for part in text:
                begun.wait()
                with temporary.open("a") as opened:
                    opened.write(part)
            time.sleep(0.01)

    threads = [threading.Thread(target=write, args=(text,)) for text in ("aaa", "bbb")]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert (tmp_path / "file").read_text() in ("aaa", "bbb")
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("moment", ["made", "left"])
def test_a_signal_in_the_moment_a_folder_is_made_or_left(monkeypatch, tmp_path, moment):
    real = Path.mkdir

    def mkdir(self, *args, **keywords):
        real(self, *args, **keywords)
        signal.raise_signal(signal.SIGINT)

    def interrupted():
        raise KeyboardInterrupt

    def use():
        with folder_beside(tmp_path / "out") as folder:
            (folder / "file").write_text("half")
            patched.setattr(files, "uninterrupted", interrupted)  # its first step, as it were

    with monkeypatch.context() as patched:
        if moment == "made":
            patched.setattr(Path, "mkdir", mkdir)
        with pytest.raises(KeyboardInterrupt):
            use()
    assert list(tmp_path.iterdir()) == []
