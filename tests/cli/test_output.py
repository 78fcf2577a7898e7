"""What a command says while it works: progress as lines where there is no terminal."""

import pytest
from tqdm import tqdm

from fairseq.cli import output


@pytest.mark.parametrize("hidden", [None, "quiet", "TQDM_DISABLE", "bar"])
def test_progress_is_lines_from_time_to_time_where_there_is_no_terminal(monkeypatch, capsys, hidden):
    monkeypatch.setattr(output, "SECONDS_OF_A_LINE", 1e-9)
    monkeypatch.setattr(output, "NO_PROGRESS", hidden == "TQDM_DISABLE")
    with output.working(quiet=hidden == "quiet"):
        for _ in tqdm(range(4), desc="Quantizing", unit="layer", disable=True if hidden == "bar" else None, miniters=1):
            pass
    out, err = capsys.readouterr()
    lines = [line[: len("Quantizing:  75%")] for line in err.split("\n")]
    assert lines == ([""] if hidden else [*(f"Quantizing: {k:>3}%" for k in (25, 50, 75, 100)), ""])
    assert "\r" not in err
    assert not out


def test_no_line_before_its_time(monkeypatch, capsys):
    monkeypatch.setattr(output, "NO_PROGRESS", False)
    with output.working(quiet=False):
        assert list(tqdm(range(100), desc="Quantizing")) == list(range(100))
    assert capsys.readouterr().err == ""


def test_bars_are_as_they_were_afterwards(capsys):
    before = tqdm.__init__
    with output.working(quiet=False):
        assert tqdm.__init__ is not before
    assert tqdm.__init__ is before
