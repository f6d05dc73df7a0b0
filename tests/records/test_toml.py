"""TOML files of a package: read in order, each name once."""

import sys

import pytest

from selab.errors import SpecError
from selab.records.toml import parse_tables, read_package


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Write the files of a package named `lab.things`; returns its name."""

    def write(**contents):
        folder = tmp_path / "lab" / "things"
        folder.mkdir(parents=True)
        for parent in (folder, folder.parent):
            (parent / "__init__.py").write_text("")
        (folder / "notes.txt").write_text("not a TOML")
        for name, content in contents.items():
            (folder / f"{name}.toml").write_text(content)
        monkeypatch.syspath_prepend(tmp_path)
        return "lab.things"

    yield write
    for name in ("lab.things", "lab"):
        sys.modules.pop(name, None)


def parse(text, *, origin):
    return parse_tables(text, "things", origin=origin)


def test_files_are_read_in_alphabetical_order(package):
    name = package(b="[things.two]\nsize = 2\n[things.one]\nsize = 1", a="[things.three]\nsize = 3")
    assert list(read_package(name, parse, header="things").items()) == [
        ("three", {"size": 3}),
        ("two", {"size": 2}),
        ("one", {"size": 1}),
    ]


def test_a_name_of_two_files_is_refused(package):
    name = package(a="[things.one]", b="[things.one]")
    with pytest.raises(SpecError, match=r"^things/b\.toml: things\.one: the name is taken by things/a\.toml$"):
        read_package(name, parse, header="things")


def test_a_malformed_file_is_named(package):
    with pytest.raises(SpecError, match=r"^things/a\.toml: not TOML: "):
        read_package(package(a="[things"), parse, header="things")
