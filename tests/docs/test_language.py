"""Sentences of the docs are short: about one idea each."""

import re

import pytest

MEAN_WORDS = 18
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "docs/*.md")


def sentences(markdown):
    """Sentences of the prose: no code, headings, tables or pictures; an item of a list ends a sentence."""
    text = re.sub(r"<!-- table .*?<!-- /table -->", "", markdown, flags=re.DOTALL)
    text = re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"!\[[^\]]*\]\([^)]*\)", "", text)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    lines = [line for line in text.splitlines() if not re.match(r"\s*(#|\||:::|<)", line)]
    blocks = re.split(r"\n\s*\n|\n(?=\s*(?:[*-]|\d+\.)\s)", "\n".join(lines))
    found = []
    for block in blocks:
        words = re.sub(r"^\s*(?:[*-]|\d+\.)\s", "", block).replace("\n", " ").strip()
        found += [one for one in re.split(r"(?<=[.!?])[*\"')`]*\s+", words) if len(one.split()) > 1]
    return found


def mean_words(markdown):
    lengths = [len(one.split()) for one in sentences(markdown)]
    return sum(lengths) / len(lengths) if lengths else 0


def pages(root):
    return [path for pattern in PAGES for path in sorted(root.glob(pattern))]


def test_sentences_are_found_in_prose_only():
    page = "# A heading\n\nOne two. Three\nfour five!\n\n* item one\n* item two\n\n```\ncode here\n```\n| a b |\n"
    assert sentences(page) == ["One two.", "Three four five!", "item one", "item two"]
    assert mean_words(page) == 2.25


def test_a_page_of_long_sentences_is_too_long():
    assert mean_words("word " * 40 + ".") > MEAN_WORDS


def test_sentences_are_short(root):
    means = {path.name: mean_words(path.read_text(encoding="utf-8")) for path in pages(root)}
    assert len(means) > 15
    assert {name: round(mean, 1) for name, mean in means.items() if mean > MEAN_WORDS} == {}


@pytest.mark.parametrize("phrase", ["what is no ", "be told", "is told", "befall", "beside the least", "care"])
def test_phrases_that_read_as_translated_are_gone(root, phrase):
    prose = {path.name: " ".join(sentences(path.read_text(encoding="utf-8"))) for path in pages(root)}
    assert [name for name, text in prose.items() if re.search(rf"\b{phrase}\b", text)] == []
