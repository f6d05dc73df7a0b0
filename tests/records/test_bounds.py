"""Bounds where texts are parsed: depth, digits and ranges of TOML and JSON."""

import msgspec
import pytest

from selab.errors import RecordError, SpecError
from selab.experiments.profiling import count_record
from selab.records.bounds import MOST_LEVELS, fault_of
from selab.records.toml import parse
from selab.records.types import from_json, to_json


def nested(levels, innermost=0):
    for _ in range(levels):
        innermost = [innermost]
    return innermost


@pytest.mark.parametrize("value", [0, -(2**63), 2**63 - 1, 1e308, "text" * 1000, None, True, nested(MOST_LEVELS - 1)])
def test_within(value):
    assert fault_of({"a": value}) == ""
    assert fault_of(value) == ""


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        (2**63, "a.b: an integer of 64 bits"),
        (10**400, "a.b: an integer of 1329 bits; at most 64"),
        (float("inf"), "a.b: inf; must be a finite number"),
        (float("nan"), "a.b: nan; must be a finite number"),
        (nested(MOST_LEVELS), "nested too deeply; at most 32 levels"),
        (nested(100_000), "nested too deeply"),
    ],
)
def test_out_of_bounds(value, fault):
    assert fault in fault_of({"a": {"b": value}})


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("a = " + "[" * 5000 + "]" * 5000, "nested too deeply"),
        ("a = " + "[" * 40 + "]" * 40, "nested too deeply"),
        ("a." * 3000 + "a = 1", "nested too deeply"),
        ("[" + "a." * 3000 + "a]", "nested too deeply"),
        ("a = " + "1" * 5000, "4300 digits"),
        ("a = 0x" + "f" * 6000, "bits; at most 64"),
        (f"a = {10**400}", "a: an integer of 1329 bits"),
        ("a = [1, {b = 1e400}]", "a.1.b: inf"),
        ("a = -nan", "a: nan"),
        ("a = 2020-13-40", "not TOML"),
        ("a = \0", "not TOML"),
    ],
)
def test_toml(text, fault):
    with pytest.raises(SpecError, match=r"^x\.toml: ") as caught:
        parse(text, origin="x.toml")
    assert fault in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "value", [b"[" * 100_000 + b"]" * 100_000, b"1" * 5000, b"1" + b"0" * 400, b"[" * 40 + b"]" * 40]
)
def test_json(value):
    record = msgspec.json.decode(to_json(count_record("se_small_cnn", batch=1, counters=False)))
    record["extra"] = msgspec.Raw(value)
    with pytest.raises(RecordError, match=r"^x\.json: not a record: ") as caught:
        from_json(msgspec.json.encode(record), where="x.json")
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("text", "escape"),
    [
        (r'{"a": "\ud800"}', r"\ud800"),
        (r'{"\uDFFF": 1}', r"\uDFFF"),
        (r'["\ud83d\ude00\ud83d"]', r"\ud83d"),
        (r'["\ud83dx\ude00"]', r"\ud83d"),
        (r'["\ude00\ud83d"]', r"\ude00"),
        (r'["\\\ud800"]', r"\ud800"),
    ],
)
def test_half_a_surrogate_pair_is_named(text, escape):
    with pytest.raises(RecordError, match="not a record") as caught:
        from_json(text.encode(), where="x.json")
    assert f"x.json: not a record: {escape} is half of a surrogate pair, which is no character; " in str(caught.value)


@pytest.mark.parametrize("text", [r'["\ud83d\ude00", "\\ud800"', '{"a": 1', ""])
def test_what_is_truncated_is_called_so(text):
    with pytest.raises(RecordError, match="truncated"):
        from_json(text.encode(), where="x.json")
