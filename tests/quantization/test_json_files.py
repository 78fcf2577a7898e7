"""JSON of others: refused in a sentence, before it takes memory."""

import resource

import pytest

from fairseq.quantization.bit_allocation.assignment import BitAssignment
from fairseq.quantization.bit_allocation.pareto import Pareto
from fairseq.quantization.evaluation.layer_report import LayerReport
from fairseq.quantization.evaluation.report import QuantizationReport
from fairseq.quantization.json_files import MOST_BYTES, MOST_DEPTH, parse_json, read_json, record

BAD = {
    "[" * 10_000 + "]" * 10_000: "nested deeper than",
    '{"a":' * (MOST_DEPTH + 1) + "1" + "}" * (MOST_DEPTH + 1): "nested deeper than",
    '{"a": {"b": 1, "b": 2}}': "'b' is twice in one object",
    "[NaN]": "NaN is no finite number",
    "[-Infinity]": "-Infinity is no finite number",
    "[1e999]": "1e999 is no finite number",
    "[" + "9" * 5000 + "]": "is damaged",
    "{": "is damaged",
    "\xff": "is damaged",
}


@pytest.mark.parametrize("text", BAD, ids=lambda text: text[:20])
@pytest.mark.parametrize("load", [read_json, QuantizationReport.from_json, BitAssignment.load, Pareto.load])
def test_bad_json(text, load, tmp_path):
    path = tmp_path / "bad.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"bad\.json") as caught:
        load(path)
    message = str(caught.value)
    assert "\n" not in message
    assert load is not read_json or BAD[text] in message


def test_what_is_too_large_takes_no_memory(tmp_path):
    path = tmp_path / "large.json"
    path.write_text("[" + "{}," * 2**22 + "1]")  # some 300 MB of objects
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r"large\.json is too large"):
        read_json(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000
    with pytest.raises(ValueError, match="too large"):
        parse_json(" " * (MOST_BYTES + 1), "x")


def test_just_deep_enough_and_infinite_where_asked(tmp_path):
    deep = "[" * MOST_DEPTH + "]" * MOST_DEPTH
    assert parse_json(deep, "x") is not None
    assert parse_json("[1.5, Infinity]", "x", finite=False)[1] == float("inf")


def test_records_have_the_types_of_their_fields():
    good = {"name": "a", "component": None, "shape": (3, 4), "bytes_before": 8, "bytes_after": 2, "clip": 1}
    assert record(LayerReport, good) == LayerReport(**good)
    for change in ({"bits": "4"}, {"bits": True}, {"shape": (3,)}, {"name": 3}, {"bytes_after": 2**63}, {"clip": []}):
        (key,) = change
        with pytest.raises(ValueError, match=f"{key} must be of type"):
            record(LayerReport, {**good, **change})
    with pytest.raises(ValueError, match="LayerReport has no 'speed'"):
        record(LayerReport, {**good, "speed": 1})
    with pytest.raises(ValueError, match="expected an object"):
        record(LayerReport, [1])
