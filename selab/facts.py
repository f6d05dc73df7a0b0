"""TOML files of facts: tables of one kind, read strictly, each mistake told with its place and what is allowed."""

import re
import tomllib
from collections.abc import Collection
from pathlib import Path
from typing import TypeVar

import msgspec

from selab.errors import SpecError

_T = TypeVar("_T", bound=msgspec.Struct)


def read_tables(path: Path, header: str) -> dict[str, object]:
    """The `[HEADER.NAME]` tables of a file, by name.

    Raises:
        SpecError: the file cannot be read, is no TOML, or holds something else.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise SpecError(f"{path}: cannot be read: {reason}") from None
    return parse_tables(text, header, origin=str(path))


def parse_tables(text: str, header: str, *, origin: str) -> dict[str, object]:
    """The same of a file's content.

    Args:
        text: TOML.
        header: the one table that the file holds.
        origin: the file's name, for messages.

    Raises:
        SpecError: it is no TOML, or holds something else.
    """
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise SpecError(f"{origin}: not TOML: {error}") from None
    found = data.pop(header, None)
    if not isinstance(found, dict) or not found or data:
        beside = f", and nothing beside: {', '.join(data)}" if data else ""
        raise SpecError(f"{origin}: must hold [{header}.NAME] tables{beside}")
    return found


def converted(table: object, kind: type[_T], *, place: str, **given: object) -> _T:
    """A table as a value of this type; its keys are the fields.

    Args:
        table: as TOML gives it.
        kind: a strict type.
        place: file and table, for the message.
        given: fields that the table may not have, and their values.

    Raises:
        SpecError: an unknown or missing key, a wrong type, or a value out of its range.
    """
    if not isinstance(table, dict) or not given.keys().isdisjoint(table):
        raise SpecError(f"{place}: must be a table{f', whose header gives its {next(iter(given))}' if given else ''}")
    try:
        return msgspec.convert({**table, **given}, kind)
    except msgspec.ValidationError as error:
        raise SpecError(_explained(str(error), kind, place, given)) from None


def _explained(message: str, kind: type[msgspec.Struct], place: str, given: Collection[str]) -> str:
    """Turns `Expected `float` > 0.0 - at `$.lr`` into `x.toml: recipes.y.lr: expected float > 0.0`."""
    text, _, at = message.partition(" - at ")
    path = at.strip("`").removeprefix("$").removeprefix(".")
    place = f"{place}.{path}" if path else place
    unknown = re.search(r"unknown field `(\w+)`", text)
    if unknown:
        allowed = [key for key in _type_at(kind, path).__struct_fields__ if path or key not in given]
        return f"{place}.{unknown[1]}: unknown key; allowed: {', '.join(allowed)}"
    missing = re.search(r"missing required field `(\w+)`", text)
    if missing:
        return f"{place}.{missing[1]}: missing"
    table, _, key = path.rpartition(".")
    types = {field.name: field.type for field in msgspec.structs.fields(_type_at(kind, table))}
    words = getattr(types.get(key), "__args__", ())
    choices = f"; allowed: {', '.join(words)}" if words and all(isinstance(word, str) for word in words) else ""
    return f"{place}: {text[0].lower()}{text[1:].replace('`', '')}{choices}"


def _type_at(kind: type[msgspec.Struct], path: str) -> type[msgspec.Struct]:
    """The type of the table that a path leads to: `image` of a recipe."""
    for key in re.findall(r"[a-z_]\w*", path):
        types = {field.name: field.type for field in msgspec.structs.fields(kind)}
        inner = (types.get(key), *getattr(types.get(key), "__args__", ()))
        tables = [one for one in inner if isinstance(one, type) and issubclass(one, msgspec.Struct)]
        if not tables:
            break
        kind = tables[0]
    return kind
