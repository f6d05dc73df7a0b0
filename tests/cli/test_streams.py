"""Standard streams that are closed, full, left by their reader, or of a poor encoding."""

import json
import os
import subprocess
import sys

import pytest

SELAB = f'"{sys.executable}" -m selab'


def shell(line, **environment):
    """Run a line of the shell; `selab` in it is the program."""
    return subprocess.run(
        line.replace("selab ", f"{SELAB} "),
        shell=True,
        executable="/bin/bash",
        capture_output=True,
        check=False,
        env={**os.environ, "COLUMNS": "80", **environment},
    )


def ascii_locale():
    return {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": ""}


@pytest.mark.parametrize(
    ("line", "status", "error"),
    [
        ("selab archs > /dev/full", 1, b"error: standard output: cannot be written: No space left on device\n"),
        (
            "selab archs --json - > /dev/full",
            1,
            b"error: standard output: cannot be written: No space left on device\n",
        ),
        ("selab --version > /dev/full", 1, b"error: standard output: cannot be written: No space left on device\n"),
        ("selab archs >&-", 1, b"error: standard output: cannot be written: Bad file descriptor\n"),
        ("selab archs nope >&-", 1, b"error: archs nope: no such architecture"),
        ("selab archs --json /dev/null <&- 2>&-", 0, b""),
        ("selab archs nope 2>/dev/full", 1, b""),
        ("selab archs nope <&- >&- 2>&-", 1, b""),
        ("selab archs 2>/dev/full >/dev/null", 0, b""),
        ("set -o pipefail; selab archs --json - | true", 1, b""),
        ("selab archs nope 2>&1 | true", 0, b""),
    ],
)
def test_streams(line, status, error):
    done = shell(line)
    assert done.returncode == status, done
    assert done.stderr.startswith(error)
    assert done.stderr.count(b"\n") == error.count(b"\n") or not error.endswith(b"\n"), done.stderr


def test_a_file_never_gets_the_number_of_a_closed_stream(tmp_path):
    done = shell(f"selab archs resnet18 --json {tmp_path / 'a.json'} >&- 2>&-")
    assert done.returncode == 0
    assert [one["name"] for one in json.loads((tmp_path / "a.json").read_bytes())] == [
        *("preresnet18", "se_preresnet18"),
        *("resnet18", "se_resnet18", "resnet18_cifar", "se_resnet18_cifar"),
    ]


def test_an_encoding_without_most_characters(tmp_path):
    name = tmp_path / "ü→.toml"
    done = shell(f"selab table reduction; selab archs --format rich; selab count --arch '{name}:x'", **ascii_locale())
    assert b"Traceback" not in done.stderr
    assert done.stdout.decode("ascii")
    assert b"\\u2500" not in done.stdout  # lines of tables have a plain spelling
    assert done.stderr.decode("ascii").startswith("error: ")


def test_json_on_an_ascii_stream_holds_the_same_values():
    poor, rich = (shell("selab archs --json -", **more) for more in (ascii_locale(), {"PYTHONUTF8": "1"}))
    assert poor.stdout.decode("ascii") != rich.stdout.decode()
    assert json.loads(poor.stdout) == json.loads(rich.stdout)


@pytest.mark.parametrize(
    "environment",
    [
        {"COLUMNS": "0"},
        {"COLUMNS": "-1"},
        {"COLUMNS": "wide"},
        {"COLUMNS": "1", "LINES": "0"},
        {"TERM": "dumb"},
        {"TERM": "", "NO_COLOR": "1"},
        {"FORCE_COLOR": "1", "TERM": "nonsense"},
        {"HOME": "/no/such", "XDG_CACHE_HOME": "/dev/null", "XDG_CONFIG_HOME": "\n"},
        {"LANG": "nonsense", "LC_ALL": "xx_YY.ZZZ"},
        {"WORLD_SIZE": "abc", "RANK": "-1"},
        {"PYTHONIOENCODING": "latin-1"},
        {"SELAB_DEBUG": "0"},
    ],
    ids=lambda one: "+".join(one),
)
def test_an_odd_environment(environment):
    done = shell("selab archs resnet18 && selab archs nope", **environment)
    assert b"resnet" in done.stdout
    assert (done.returncode, b"Traceback" in done.stderr, done.stderr.count(b"error:")) == (1, False, 1)
