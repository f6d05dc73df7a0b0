"""Records and budgets on standard input."""

import json
import subprocess
import sys

import pytest


def run(*words, given):
    command = [sys.executable, "-m", "selab", *map(str, words)]
    done = subprocess.run(command, input=given, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def record(selab, tmp_path):
    assert selab("count", "--arch", "small_cnn", "--out", tmp_path)[0] == 0
    return tmp_path / "small_cnn.json"


def test_a_record_on_standard_input(record):
    text = record.read_text()
    for words in (["-", record], [record, "-"]):
        status, out, error = run("diff", *words, "--json", "-", given=text)
        assert (status, error) == (0, "")
        found = json.loads(out)
        assert [found["before"], found["after"]] == [str(one) for one in words]
        assert found["worse"] == []
    with record.open() as opened:
        command = [sys.executable, "-m", "selab", "diff", "-", str(record)]
        assert subprocess.run(command, stdin=opened, capture_output=True, check=False).returncode == 0


def test_standard_input_for_both_records(selab, one_line):
    status, _, error = selab("diff", "-", "-")
    assert status == 2
    assert "diff: standard input can be read once only; name a file for one of the two records" in one_line(error)


@pytest.mark.parametrize(
    ("words", "given", "message"),
    [
        (["diff", "-", "-x.json"], "[]", "no such option"),
        (["diff", "-", "x.json"], "[]", "/dev/stdin: schema is None, which no record of selab has"),
        (["check", "-"], "[other]\n", "/dev/stdin: "),
        (["plot", "curves", "--record", "-", "--json", "-"], "{}", "/dev/stdin: schema is None"),
    ],
)
def test_what_is_wrong_with_standard_input(one_line, words, given, message):
    status, _, error = run(*words, given=given)
    assert status != 0
    assert message in one_line(error)
