"""Options that are more than a word or a number."""

import pytest

from fairseq.cli.options import parse_batches, parse_bias_correction, parse_overrides
from fairseq.cli.output import UserError


def test_overrides():
    texts = ["*classifier=bits:8,method:channel", "*.0.*=skip", "x*=activations:none,symmetric:true,skip:false"]
    assert parse_overrides(texts) == {
        "*classifier": {"bits": 8, "method": "channel"},
        "*.0.*": {"skip": True},
        "x*": {"activations": None, "symmetric": True, "skip": False},
    }


@pytest.mark.parametrize("text", ["", "*", "=bits:8", "*=", "*=bits", "*=bits:", "*=:8", "*=bits:8,", "*=bits=8"])
def test_overrides_that_are_none(text):
    with pytest.raises(UserError, match="GLOB=key:value"):
        parse_overrides([text])


def test_a_glob_that_comes_twice():
    with pytest.raises(UserError, match="twice"):
        parse_overrides(["*=bits:8", "*=bits:4"])


def test_batches():
    assert parse_batches(["1,8", " 16", "8"]) == [1, 8, 16]
    for text in ("0", "1,", "-1", "x", "1 8"):
        with pytest.raises(UserError, match="--batch"):
            parse_batches([text])


def test_bias_correction():
    assert [parse_bias_correction(text) for text in ("no", "yes", "add")] == [False, True, "add"]
    with pytest.raises(UserError, match="no, yes, add"):
        parse_bias_correction("true")
