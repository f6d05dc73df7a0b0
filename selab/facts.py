"""TOML files of facts: tables of one kind, read strictly, each mistake told with its place and what is allowed."""

import re
import tomllib
from pathlib import Path
from typing import TypeVar

import msgspec

from selab.errors import SpecError

_T = TypeVar("_T", bound=msgspec.Struct)


def tables(path: Path, header: str) -> dict[str, object]:
    """The `[HEADER.NAME]` tables of a file, by name.

    Raises:
        SpecError: the file cannot be read, is no TOML, or holds something else.
    """
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise SpecError(f"{path}: cannot be read: {reason}") from None
    except tomllib.TOMLDecodeError as error:
        raise SpecError(f"{path}: not TOML: {error}") from None
    found = data.pop(header, None)
    if not isinstance(found, dict) or not found or data:
        beside = f", and nothing beside: {', '.join(data)}" if data else ""
        raise SpecError(f"{path}: must hold [{header}.NAME] tables{beside}")
    return found


def converted(table: object, kind: type[_T], *, place: str) -> _T:
    """A table as a value of this type; its keys are the fields.

    Args:
        table: as TOML gives it.
        kind: a strict type.
        place: file and table, for the message.

    Raises:
        SpecError: an unknown or missing key, a wrong type, or a value out of its range.
    """
    if not isinstance(table, dict):
        raise SpecError(f"{place}: must be a table")
    try:
        return msgspec.convert(table, kind)
    except msgspec.ValidationError as error:
        raise SpecError(_explained(str(error), kind, place)) from None


def _explained(message: str, kind: type[msgspec.Struct], place: str) -> str:
    """Turns `Expected `float` > 0.0 - at `$.lr`` into `x.toml: recipes.y.lr: expected float > 0.0`."""
    text, _, at = message.partition(" - at ")
    path = at.strip("`").removeprefix("$").removeprefix(".")
    place = f"{place}.{path}" if path else place
    unknown = re.search(r"unknown field `(\w+)`", text)
    if unknown:
        return f"{place}.{unknown[1]}: unknown key; allowed: {', '.join(kind.__struct_fields__)}"
    missing = re.search(r"missing required field `(\w+)`", text)
    if missing:
        return f"{place}.{missing[1]}: missing"
    types = {field.name: field.type for field in msgspec.structs.fields(kind)}
    words = getattr(types.get(path.rpartition(".")[2]), "__args__", ())
    choices = f"; allowed: {', '.join(words)}" if words and all(isinstance(word, str) for word in words) else ""
    return f"{place}: {text[0].lower()}{text[1:].replace('`', '')}{choices}"
