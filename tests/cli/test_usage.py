"""Wrong usage of every command is one line: where, what, what is allowed, and the next step."""

import os
import subprocess
import sys

import pytest
import typer

from selab.cli.main import app
from selab.cli.usage import Command


def _commands(group, before=()):
    for name, one in group.commands.items():
        if hasattr(one, "commands"):
            yield from _commands(one, (*before, name))
        else:
            yield (*before, name), one


COMMANDS = dict(_commands(typer.main.get_command(app)))
OPTIONS = {
    words: [max(each.opts, key=len) for each in command.params if each.param_type_name == "option" and not each.is_flag]
    for words, command in COMMANDS.items()
}
EVERY = pytest.mark.parametrize("words", COMMANDS, ids=" ".join)


@pytest.fixture
def wrong(selab, one_line):
    """The line of wrong usage, without `error: `."""

    def run(*words):
        status, out, error = selab(*words)
        assert (status, out) == (2, ""), error
        line = one_line(error).removeprefix("error: ")
        assert "Usage" not in line
        assert "│" not in line
        return line

    return run


def test_every_command_is_checked():
    assert len(COMMANDS) >= 20
    assert all(isinstance(one, Command) for one in COMMANDS.values())


@EVERY
def test_an_unknown_option_with_the_nearest_one(wrong, words):
    nearest = max((each for one in COMMANDS[words].params for each in one.opts if each.startswith("--")), key=len)
    name = " ".join(words)
    line = wrong(*words, f"{nearest[:4]}{nearest[5:]}")
    assert line.startswith(f"{name}: {nearest[:4]}{nearest[5:]}: no such option; did you mean ")
    assert nearest in line
    assert line.endswith(f"(`selab {name} --help` lists all)")


@EVERY
def test_an_unknown_option_like_no_other(wrong, words):
    name = " ".join(words)
    assert wrong(*words, "--qqqqqq") == f"{name}: --qqqqqq: no such option; see `selab {name} --help`"


@EVERY
def test_one_argument_too_many(wrong, words):
    arguments = [one for one in COMMANDS[words].params if one.param_type_name == "argument"]
    network = next((one for one in COMMANDS[words].params if "--arch" in one.opts and not arguments), None)
    if any(one.nargs != 1 for one in arguments) or (network and network.multiple):
        pytest.skip("takes any number")
    given = ["a"] * len(arguments)
    required = [word for one in COMMANDS[words].params if (one.required or one is network) and one.opts[0][0] == "-"
                for word in (one.opts[0], "x")]  # fmt: skip
    line = wrong(*words, *given, *required, "onemore")
    assert line.startswith(f"{' '.join(words)}: 'onemore': ")
    expected = "too many; allowed: " if arguments else "one network too many; " if network else "takes options only; "
    assert expected in line


def test_a_word_without_an_option_is_the_network(selab):
    status, named, _ = selab("count", "--arch", "small_cnn", "--arch", "se_small_cnn", "--format", "csv")
    assert status == 0
    assert selab("count", "small_cnn", "--format", "csv", "se_small_cnn")[:2] == (0, named)
    assert selab("count", "--arch", "small_cnn", "se_small_cnn", "--format", "csv")[:2] == (0, named)
    assert selab("sites", "small_cnn")[1] == selab("sites", "--arch", "small_cnn")[1]
    line = selab("sites", "smal_cnn")[2]
    assert line.startswith("error: --arch smal_cnn: ")
    assert selab("sites", "smal_cnn", "--depth", "x")[0] == 2


def test_the_usage_names_the_network(selab):
    assert "selab sites [OPTIONS] [NAME] " in selab("sites", "--help")[1]
    assert "selab count [OPTIONS] [NAME]..." in selab("count", "--help")[1]
    assert "[NAME]" not in selab("machine", "--help")[1]


@EVERY
def test_what_is_missing(wrong, words):
    required = [one for one in COMMANDS[words].params if one.required]
    if not required:
        pytest.skip("nothing is required")
    line = wrong(*words)
    assert line.startswith(f"{' '.join(words)}: ")
    assert ": missing; give " in line


@EVERY
def test_an_empty_value(wrong, words):
    for option in OPTIONS[words]:
        line = wrong(*words, option, "")
        assert line.startswith(f"{' '.join(words)}: {option}: is empty; give {option} ")
        assert wrong(*words, f"{option}=") == line


@EVERY
def test_an_option_without_its_value(wrong, words):
    for option in OPTIONS[words]:
        assert wrong(*words, option).startswith(f"{' '.join(words)}: {option}: needs a value; give {option} ")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["profil"], "'profil': no such command; did you mean profile? (`selab --help` lists all)"),
        (["convert"], "'convert': no such command; did you mean weights convert? (`selab --help` lists all)"),
        (["new", "famly"], "new: 'famly': no such command; did you mean family? (`selab new --help` lists all)"),
        (["qqqq"], "'qqqq': no such command; see `selab --help`"),
        (["zz'zz"], "\"zz'zz\": no such command; see `selab --help`"),
        (["--verion"], "--verion: no such option; did you mean --version? (`selab --help` lists all)"),
        (["--arch", "x", "count"], "--arch: stands before the command; write it behind, as in `selab count --arch …`"),
        (
            ["profile", "vgg16", "vgg19"],
            "profile: 'vgg19': one network too many; this command takes one, as --arch NAME or NAME alone",
        ),
        (["show", "--arch", "vgg16"], "show: --arch: no such option; write the name alone: `selab show NAME`"),
        (["count", "--replace=3"], "count: --replace: takes no value; write --replace alone"),
        (["diff", "a", ""], "diff: AFTER: is empty; give AFTER: another, of the same workload, machine and baseline"),
        (["profile", "--arch", "se_small_cnn", "--phase", "foward"],
         "profile: --phase: 'foward' is not one of forward, backward, forward_backward; did you mean forward?"),
        (["count", "--arch", "x", "--on", "tpu"], "count: --on: 'tpu' is not one of fake, cpu; did you mean cpu?"),
        (["count", "--arch", "x", "--batch", "0"],
         "count: --batch: '0' is not a whole number from 1 to 1,000,000,000; see `selab count --help`"),
        (["profile", "--arch", "x", "--budget", "soon"],
         "profile: --budget: 'soon' is not a time from 0.1 to 604,800 seconds; see `selab profile --help`"),
    ],
)  # fmt: skip
def test_lines(wrong, words, line):
    assert wrong(*words) == line


def test_a_group_without_a_command_shows_its_help(selab):
    lines = {
        "": "",
        "new": "error: new: command missing; give one of family, block\n",
        "weights": "error: weights: command missing; give one of list, convert\n",
    }
    for words in ([], ["new"], ["weights"], ["--debug"], ["new", "--debug"]):
        group = "".join(one for one in words if one != "--debug")
        status, out, error = selab(*words)
        assert (status, error) == (2, lines[group])
        assert out.count("Usage: selab") == 1
    for words in (["new", "--help"], ["weights", "-h"]):
        status, out, error = selab(*words)
        assert (status, error) == (0, "")
        assert out.count("Usage: selab") == 1


def test_an_empty_pattern_is_every_architecture(selab):
    assert selab("archs", "", "--json", "-") == selab("archs", "--json", "-")


def test_the_traceback_of_wrong_usage(selab):
    status, _, error = selab("count", "--debug", "--nope")
    assert status == 2
    assert "Traceback" in error
    assert error.splitlines()[-1].startswith("error: count: --nope")


def test_a_reader_of_the_help_that_leaves():
    code = "import sys; sys.argv = ['selab', 'count', '--help']; from selab.cli import main; main()"
    reading = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    reading.stdout.close()
    assert reading.stderr.read() == ""
    reading.stderr.close()
    assert reading.wait() == 1


@pytest.mark.parametrize(
    "words",
    [
        ["count", "--arch", "{}.toml"],
        ["count", "--arch", "{}.py:Net"],
        ["count", "--arch", "{}"],
        ["count", "--arch", "resnet18", "--insert", "auto", "--se", "block={}.py:Block"],
        ["count", "--arch", "resnet18", "--input", "{}"],
        ["table", "latency", "--profiles", "{}"],
        ["diff", "{}", "{}"],
        ["check", "{}.toml"],
        ["plot", "curves", "--record", "{}"],
        ["plot", "tax", "--record", "{}"],
        ["train", "--arch", "small_cnn", "--data", "synthetic", "--recipe", "{}.toml"],
        ["eval", "--arch", "small_cnn", "--data", "synthetic", "--weights", "{}.pth"],
        ["eval", "--arch", "small_cnn", "--data", "synthetic", "--weights", "{}.safetensors"],
        ["eval", "--arch", "small_cnn", "--data", "folder", "--weights", "w.pth", "--data-dir", "{}"],
        ["table", "reduction", "--into", "{}.md"],
    ],
    ids=" ".join,
)
def test_pipes_and_devices_are_no_input(selab, one_line, tmp_path, words):
    """A pipe that nobody writes to, and a device that never ends, are refused before they are opened."""
    for ending in (".toml", ".py", ".pth", ".safetensors", ".md", ""):
        for name in ("pipe", "zero"):
            path = tmp_path / f"{name}{ending}"
            os.mkfifo(path) if name == "pipe" else path.symlink_to("/dev/zero")
    for name in ("pipe", "zero"):
        status, out, error = selab(*(word.format(tmp_path / name) for word in words))
        assert status != 0
        assert out == ""
        assert one_line(error)
