"""What a command says while it works: progress as lines where there is no terminal."""

import pytest
from tqdm import tqdm

from fairseq.cli import output


@pytest.fixture
def seconds(monkeypatch):
    """A clock that the test sets, for lines about progress."""
    now = [0.0]
    monkeypatch.setattr(output.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(output, "NO_PROGRESS", False)
    return now


def test_progress_is_a_line_every_half_minute_where_there_is_no_terminal(seconds, capsys):
    with output.working(quiet=False):
        bar = tqdm(None, "Quantizing", 100)  # as tqdm takes its arguments by position, too
        for _ in range(100):
            seconds[0] += 1
            bar.update()
            bar.refresh()
            bar.set_postfix(layer="query")
        bar.close()
    out, err = capsys.readouterr()
    assert [line.split("|")[0] for line in err.split("\n")] == [f"Quantizing:  {n}%" for n in (30, 60, 90)] + [""]
    assert "\r" not in err
    assert not out


def test_bars_in_bars_are_lines_too(seconds, capsys):
    with output.working(quiet=False):
        for _ in tqdm(range(2), desc="outer"):
            for _ in tqdm(range(3), desc="inner", leave=False, mininterval=0):
                seconds[0] += 31
    err = capsys.readouterr().err
    assert {line.split(":")[0] for line in err.splitlines()} == {"outer", "inner"}
    assert "\x1b" not in err


@pytest.mark.parametrize("how", ["quiet", "TQDM_DISABLE", "disable"])
def test_or_nothing(seconds, capsys, monkeypatch, how):
    monkeypatch.setattr(output, "NO_PROGRESS", how == "TQDM_DISABLE")
    with output.working(quiet=how == "quiet"):
        for _ in tqdm(range(3), disable=how == "disable" or None, mininterval=0):
            seconds[0] += 31
    assert capsys.readouterr().err == ""


def test_bars_are_as_they_were_afterwards():
    before = vars(tqdm)["__init__"]
    with output.working(quiet=False):
        assert vars(tqdm)["__init__"] is not before
    assert vars(tqdm)["__init__"] is before
