"""Word → variant: the families that are installed, a user's own TOML, anybody's network, and any of them changed."""

import re
from functools import cache
from pathlib import Path

import msgspec

from selab.attention.config import changed
from selab.errors import SpecError, UnknownNameError, nearest
from selab.models import external
from selab.models.spec import Variant, parse_family, read_family
from selab.records.toml import read_package


@cache
def installed() -> dict[str, Variant]:
    """All variants of `selab.archs`, by name, families in alphabetical order and each in its file's order.

    Raises:
        SpecError: a file is malformed, or a name is used by two families.
    """
    return read_package("selab.archs", parse_family, header="variants")


def find(word: str, *, option: str = "--arch") -> Variant:
    """A variant by what a user calls it.

    The word is a catalog name, `path/to/family.toml[:variant]`, `torchvision:NAME`, `timm:NAME`, `path/to/file.py:name`
    or `package.module:name`; and behind any of these `+KEY=VALUE,…` puts attention blocks into it, or changes those
    that it has: `resnet50+reduction=8,stages=2-4` (the grammar is that of `selab.spec.changed`).

    Args:
        word: what the user wrote.
        option: where it was given, for the message.

    Raises:
        UnknownNameError: nothing has this name; the message lists the nearest ones.
        SpecError: the file is malformed, or has several variants and none was named; a change that is not of the
            grammar, or that names no site where the network declares none.
    """
    split = re.fullmatch(r"(.+?)\+(\w*|\w+\s*=.*|,.*)", word)
    if split is not None:
        return _changed(find(split[1], option=option), split[2])
    file = re.fullmatch(r"(.+\.toml)(?::(\w+))?", word)
    if file is not None:
        return _from_file(Path(file[1]), file[2])
    known = installed()
    if word in known:
        return known[word]
    others = external.find(word, option=option)
    if others is None:
        raise UnknownNameError(f"{option} {word}: no such architecture{nearest(word, known)} (`selab archs` lists all)")
    return others


def baseline_of(variant: Variant) -> Variant | None:
    """The variant that this one is compared with; None for a baseline itself."""
    if variant.baseline is None:
        return None
    return _family_of(variant)[variant.baseline] if variant.file else find(variant.baseline)


def _family_of(variant: Variant) -> dict[str, Variant]:
    return read_family(Path(variant.file)) if variant.file else installed()


def _changed(variant: Variant, text: str) -> Variant:
    """A variant with other attention blocks; the one with SE lends what a baseline does not say."""
    start = variant.se
    if start is None:
        same = [one for one in _family_of(variant).values() if one.baseline == variant.name and one.se is not None]
        start = next((one.se for one in same if one.name == f"se_{variant.name}"), same[0].se if same else None)
    return msgspec.structs.replace(
        variant,
        name=f"{variant.name}+{text}",
        title=f"{variant.title}, changed: {text}",
        baseline=variant.baseline or variant.name,
        se=changed(start, text),
        published=(),
    )


def _from_file(path: Path, wanted: str | None) -> Variant:
    family = read_family(path)
    if wanted is not None:
        if wanted not in family:
            raise UnknownNameError(f"{path}: no variant {wanted!r}{nearest(wanted, family)}")
        return family[wanted]
    if len(family) > 1:
        raise SpecError(f"{path}: has {len(family)} variants; name one as {path}:NAME{nearest('', family)}")
    return next(iter(family.values()))
