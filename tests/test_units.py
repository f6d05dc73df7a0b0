import re

import pytest

from selab import units


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (999, "999"), (1000, "1.000 k"), (4711720, "4.712 M"), (3857973248, "3.858 G"), (-2514944, "-2.515 M")],
)
def test_count(value, text):
    assert units.count(value) == text


@pytest.mark.parametrize(("value", "text"), [(0, "0 B"), (512, "512 B"), (66_232_320, "66.23 MB"), (1e9, "1.000 GB")])
def test_size(value, text):
    assert units.size(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(1.5, "1.500 s"), (0.02451, "24.51 ms"), (1.98e-4, "198.0 µs"), (-0.0024, "-2.400 ms"), (3e-9, "3 ns")],
)
def test_seconds(value, text):
    assert units.seconds(value) == text


def test_percent_is_a_difference():
    assert units.percent(0.1061) == "+10.61 %"
    assert units.percent(-0.002, decimals=1) == "-0.2 %"


@pytest.mark.parametrize(("half_width", "decimals"), [(0.05, 1), (0.01, 1), (0.005, 2), (0.0004, 3), (0.2, 0), (0, 1)])
def test_digits_follow_the_half_width(half_width, decimals):
    assert units.decimals_for(half_width) == decimals


def test_a_number_of_things():
    assert units.counted(0, "block") == "0 blocks"
    assert units.counted(1, "block") == "1 block"
    assert units.counted(1200, "block") == "1,200 blocks"
    assert units.counted(2, "process", "processes") == "2 processes"
    assert units.plural_of(1, "class", "classes") == "class"


def test_plurals_are_formed_in_one_place(root):
    by_hand = re.compile(r"""['"]s['"] (if|\*) |else ['"]s['"]|\}s\b(?!\{)""")
    found = [
        f"{path.name}:{number}"
        for path in sorted((root / "selab").rglob("*.py"))
        if path.name != "units.py"
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if by_hand.search(line) and " else marker" not in line
    ]
    assert found == []
