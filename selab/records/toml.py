"""Read TOML files strictly: tables of one kind; a message names the place of a mistake and the allowed values."""

import re
import tomllib
from collections.abc import Collection, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, Protocol, TypeVar, get_args

import msgspec

from selab.errors import RecordError, SpecError
from selab.records.bounds import MOST_LEVELS, fault_of
from selab.records.files import read_text

_MOST_BYTES = 16 << 20
_T = TypeVar("_T", bound=msgspec.Struct)
_Value = TypeVar("_Value")
_Value_co = TypeVar("_Value_co", covariant=True)


def read_tables(path: Path, header: str) -> dict[str, object]:
    """Return the `[HEADER.NAME]` tables of a file, by name.

    Raises:
        SpecError: the file cannot be read, is no TOML, or holds something else.
    """
    return parse_tables(read_toml_text(path), header, origin=str(path))


def read_toml_text(path: Path) -> str:
    """Return the text of a TOML file.

    Raises:
        SpecError: it cannot be read, is not UTF-8, or is larger than any configuration.
    """
    try:
        return read_text(path, most=_MOST_BYTES)
    except RecordError as error:
        raise SpecError(str(error)) from None


def read_package(package: str, parse: "Parse[_Value]", *, header: str) -> dict[str, _Value]:
    """Read every TOML file of a package, in alphabetical order.

    Args:
        package: the package's name; messages call its files by the last part of it, `archs/resnet.toml`.
        parse: reads one file's text; returns its values by name.
        header: what the tables of a file are called, for messages.

    Returns:
        The values of all files, by name.

    Raises:
        SpecError: a file is malformed, or two files use one name.
    """
    found: dict[str, _Value] = {}
    places: dict[str, str] = {}
    for entry in sorted(files(package).iterdir(), key=lambda entry: entry.name):
        if not entry.name.endswith(".toml"):
            continue
        origin = f"{package.rpartition('.')[2]}/{entry.name}"
        for name, value in parse(entry.read_text(encoding="utf-8"), origin=origin).items():
            if name in found:
                raise SpecError(f"{origin}: {header}.{name}: the name is taken by {places[name]}")
            found[name], places[name] = value, origin
    return found


class Parse(Protocol[_Value_co]):
    """A function that reads the text of a TOML file; `origin` is the file's name, for messages."""

    def __call__(self, text: str, *, origin: str) -> Mapping[str, _Value_co]:
        """Return the values of a text by name."""
        ...


def parse_tables(text: str, header: str, *, origin: str) -> dict[str, object]:
    """Return the `[HEADER.NAME]` tables of a file's content, by name.

    Args:
        text: TOML.
        header: the one table that the file holds.
        origin: the file's name, for messages.

    Raises:
        SpecError: it is no TOML, or holds something else.
    """
    data = parse(text, origin=origin)
    found = data.pop(header, None)
    if not isinstance(found, dict) or not found or data:
        beside = f", and nothing beside: {', '.join(data)}" if data else ""
        raise SpecError(f"{origin}: must hold [{header}.NAME] tables{beside}")
    return found


def parse(text: str, *, origin: str) -> dict[str, Any]:
    """Return the content of a TOML text, within bounds: its depth, and the range of its numbers.

    Args:
        text: TOML.
        origin: the file's name, for messages.

    Raises:
        SpecError: it is no TOML, is nested too deeply, or has a number that is not finite or has more than 64 bits.
    """
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise SpecError(f"{origin}: not TOML: {error}") from None
    except RecursionError:
        raise SpecError(f"{origin}: not TOML: nested too deeply; at most {MOST_LEVELS} levels") from None
    except ValueError as error:
        # A number with thousands of digits, or a date that does not exist.
        raise SpecError(f"{origin}: not TOML: {str(error).partition(';')[0]}") from None
    fault = fault_of(data)
    if fault:
        raise SpecError(f"{origin}: {fault}")
    return data


def converted(table: object, kind: type[_T], *, place: str, **given: object) -> _T:
    """Convert a table to a value of this type; its keys are the fields.

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
    return convert({**table, **given}, kind, place=place, given=given)


def convert(value: object, kind: type[_T], *, place: str, given: Collection[str] = ()) -> _T:
    """Convert plain dictionaries and lists to a typed value.

    Args:
        value: as TOML or JSON gives it.
        kind: a strict type.
        place: where the value stands, for the message: `x.toml: recipes.y`, or `x.toml:` for a file's top level.
        given: top-level fields that did not come from the user, so that messages do not offer them.

    Raises:
        SpecError: an unknown or missing key, a wrong type, or a value out of its range; the message names the key.
    """
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise SpecError(_explained(str(error), kind, value, place, given)) from None


def _explained(message: str, kind: type[msgspec.Struct], value: object, place: str, given: Collection[str]) -> str:
    """Turn `Expected `float` > 0.0 - at `$.lr`` into `x.toml: recipes.y.lr: expected float > 0.0`."""
    text, _, at = message.partition(" - at ")
    path = at.strip("`").removeprefix("$").removeprefix(".")
    unknown = re.search(r"unknown field `(\w+)`", text)
    if unknown:
        owner = _type_at(kind, path, value)
        allowed = [key for key in _keys(owner) if path or key not in given]
        return f"{_joined(place, path, unknown[1])}: unknown key; allowed: {', '.join(allowed)}"
    missing = re.search(r"missing required field `(\w+)`", text)
    if missing:
        return f"{_joined(place, path, missing[1])}: missing"
    words = _choices(kind, path, value)
    choices = f"; allowed: {', '.join(map(str, words))}" if words else ""
    return f"{_joined(place, path)}: {text[0].lower()}{text[1:].replace('`', '')}{choices}"


def _joined(place: str, *parts: str) -> str:
    path = ".".join(filter(None, parts))
    return f"{place}{' ' if place.endswith(':') else '.'}{path}" if path else place.removesuffix(":")


def _keys(kind: type[msgspec.Struct]) -> tuple[str, ...]:
    tag_field = kind.__struct_config__.tag_field
    return (*((tag_field,) if tag_field else ()), *kind.__struct_fields__)


def _choices(kind: type[msgspec.Struct], path: str, value: object) -> tuple[object, ...]:
    """Return the allowed words of an enumerated key, or the allowed tags of a union of tables."""
    table, _, key = path.rpartition(".")
    owner = _type_at(kind, table, value)
    if key == owner.__struct_config__.tag_field:
        parent, _, name = table.rpartition(".")
        return tuple(one.__struct_config__.tag for one in _structs(_types(_type_at(kind, parent, value)).get(name)))
    words = getattr(_types(owner).get(key), "__args__", ())
    return words if all(isinstance(word, str) for word in words) else ()


def _type_at(kind: type[msgspec.Struct], path: str, value: object) -> type[msgspec.Struct]:
    """Return the type of the table at a path: `image` of a recipe, `se` of a variant, by its tag."""
    for key, index in re.findall(r"([A-Za-z_]\w*)(?:\[(\d+)\])?", path):
        tables = _structs(_types(kind).get(key))
        value = value.get(key) if isinstance(value, dict) else None
        if index:
            value = value[int(index)] if isinstance(value, list) and int(index) < len(value) else None
        if not tables:
            break
        tags = {one.__struct_config__.tag: one for one in tables}
        tag = value.get(tables[0].__struct_config__.tag_field) if isinstance(value, dict) else None
        kind = tags.get(tag, tables[0]) if isinstance(tag, str) else tables[0]
    return kind


def _types(kind: type[msgspec.Struct]) -> dict[str, object]:
    return {field.name: field.type for field in msgspec.structs.fields(kind)}


def _structs(kind: object) -> list[type[msgspec.Struct]]:
    """Return the tables among a type and its arguments: of a union, a tuple, an optional value."""
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return [kind]
    return [one for part in get_args(kind) for one in _structs(part)]
