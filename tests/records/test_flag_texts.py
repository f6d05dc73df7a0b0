"""The words of flags: every flag that is raised has them, and one cause is said once."""

import ast
import string
from pathlib import Path

import pytest

import selab
from selab.records.flag_texts import CAUSES, FLAGS, causes, flag
from selab.records.types import Flag


def raised():
    """Name → keywords of every `flag("name", ...)` call in the package."""
    for path in Path(selab.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "flag" and node.args:
                yield node.args[0].value, {keyword.arg for keyword in node.keywords}


def test_every_flag_is_raised_with_the_fields_of_its_sentence():
    calls = dict(raised())
    assert set(calls) == set(FLAGS)
    for name, given in calls.items():
        text = FLAGS[name]
        used = {field for part in (text.seen, text.means, text.do) for _, field, _, _ in string.Formatter().parse(part)}
        assert used - {None} <= given, name


def test_no_other_place_writes_the_words_of_a_flag():
    for path in Path(selab.__file__).parent.rglob("*.py"):
        assert 'Flag(name="' not in path.read_text(), path


def test_a_flag_says_what_was_seen_what_it_means_and_what_to_do():
    assert flag("oversubscribed", threads=4, cores=2) == Flag(
        name="oversubscribed",
        detail="4 threads ran on 2 cores; they wait for each other; use --threads 2 or fewer",
    )


def test_every_cause_has_a_sentence_and_a_flag():
    assert {text.cause for text in FLAGS.values()} == set(CAUSES)
    assert all(sentence.endswith(".") and "\n" not in sentence for sentence in CAUSES.values())


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([], []),
        (["dispersion", "contention", "outliers", "stolen_time"], ["busy"]),
        (["unwatched", "drift", "no_steady_state", "neighbours"], ["busy", "unsteady", "unwatched"]),
        (["oversubscribed", "contention"], ["busy", "oversubscribed"]),
        (["clock_asymmetry", "voided", "power_capped"], ["throttled", "gpu_clock"]),
    ],
)
def test_each_cause_is_said_once_and_the_most_important_first(names, expected):
    flags = [Flag(name=name, detail="seen") for name in [*names, *names]]
    assert causes(flags) == [CAUSES[cause] for cause in expected]


def test_a_flag_of_another_version_is_kept():
    unknown = Flag(name="comet", detail="it came near")
    assert causes([unknown, unknown, Flag(name="drift", detail="")]) == [CAUSES["unsteady"], "comet: it came near"]
