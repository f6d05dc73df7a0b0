"""Name → variant: the families that are installed, and a user's own TOML by its path."""

import re
from functools import cache
from importlib.resources import files
from pathlib import Path

from selab.errors import SpecError, UnknownNameError, nearest
from selab.spec import Variant, parse_family, read_family


@cache
def installed() -> dict[str, Variant]:
    """All variants of `selab.archs`, by name, families in alphabetical order and each in its file's order.

    Raises:
        SpecError: a file is malformed, or a name is used by two families.
    """
    found: dict[str, Variant] = {}
    for entry in sorted(files("selab.archs").iterdir(), key=lambda entry: entry.name):
        if not entry.name.endswith(".toml"):
            continue
        for name, variant in parse_family(entry.read_text(encoding="utf-8"), origin=f"archs/{entry.name}").items():
            if name in found:
                raise SpecError(f"{variant.origin}: variants.{name}: the name is taken by {found[name].origin}")
            found[name] = variant
    return found


def find(name: str, *, option: str = "--arch") -> Variant:
    """A variant by its catalog name, or by `path/to/family.toml[:variant]`.

    Args:
        name: the word.
        option: where it was given, for the message.

    Raises:
        UnknownNameError: nothing has this name; the message lists the nearest ones.
        SpecError: the file is malformed, or has several variants and none was named.
    """
    file = re.fullmatch(r"(.+\.toml)(?::(\w+))?", name)
    if file is not None:
        return _from_file(Path(file[1]), file[2])
    known = installed()
    if name not in known:
        raise UnknownNameError(f"{option} {name}: no such architecture{nearest(name, known)} (`selab archs` lists all)")
    return known[name]


def baseline_of(variant: Variant) -> Variant | None:
    """The variant that this one is compared with; None for a baseline itself."""
    if variant.baseline is None:
        return None
    family = read_family(Path(variant.file)) if variant.file else installed()
    return family[variant.baseline]


def _from_file(path: Path, wanted: str | None) -> Variant:
    family = read_family(path)
    if wanted is not None:
        if wanted not in family:
            raise UnknownNameError(f"{path}: no variant {wanted!r}{nearest(wanted, family)}")
        return family[wanted]
    if len(family) > 1:
        raise SpecError(f"{path}: has {len(family)} variants; name one as {path}:NAME{nearest('', family)}")
    return next(iter(family.values()))
