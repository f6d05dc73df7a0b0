"""Find a variant by its name: installed families, a TOML of your own, external networks, and changes of all these."""

import re
from functools import cache
from pathlib import Path

import msgspec

from selab.attention.config import SiteConfig, changed
from selab.errors import SpecError, UnknownNameError, nearest
from selab.models import composed, external
from selab.models.spec import ONNX_FAMILY, Variant, parse_family, read_family
from selab.records.toml import read_package


@cache
def installed() -> dict[str, Variant]:
    """Return all variants of `selab.archs` by name: families in alphabetical order, each in the order of its file.

    Raises:
        SpecError: a file is malformed, or a name is used by two families.
    """
    return read_package("selab.archs", parse_family, header="variants")


def find(name: str, *, option: str = "--arch") -> Variant:
    """Return the variant of a name, as `--arch` takes it.

    A name is one of the catalog, that of a detector on one of these networks (`selab.models.composed`),
    `path/to/family.toml[:variant]`, `torchvision:NAME`, `timm:NAME`, `path/to/file.py:name` or `package.module:name`.
    `+KEY=VALUE,…` after any of these inserts attention blocks, or changes those of the variant:
    `resnet50+reduction=8,stages=2-4` (grammar: `selab.attention.config.changed`).

    Args:
        name: as the user gave it.
        option: where it was given, for messages.

    Raises:
        UnknownNameError: no such name; the message lists the nearest ones.
        SpecError: the file is malformed, or has several variants and none was named; a change does not follow the
            grammar, or names no site although the network declares none.
    """
    return _find(name, option, composites=True)


def _find(name: str, option: str, *, composites: bool) -> Variant:
    """See `find`; without `composites` a name is of a network that is none, such as a backbone."""
    network, changes = split_address(name)
    if changes is not None:
        return _changed(_find(network, option, composites=composites), changes)
    file = re.fullmatch(r"(.+\.toml)(?::(\w+))?", name)
    if file is not None:
        return _from_file(Path(file[1]), file[2])
    known = installed()
    if name in known:
        return known[name]
    composite = None
    if composites:
        composite = composed.find(name, lambda trunk: _find(trunk, f"{option} {name}:", composites=False))
    others = composite or external.find(name, option=option)
    if others is None:
        every = [*known, *composed.names(known)] if composites else known
        raise UnknownNameError(f"{option} {name}: no such architecture{nearest(name, every)} (`selab archs` lists all)")
    return others


def split_address(name: str) -> tuple[str, str | None]:
    """Return the network that a name is of, and the changes of its blocks behind a `+`; None where there are none.

    The path of a file that exists may itself hold a `+`: `results/se_net+init=identity.toml:wide`.
    """
    for end in re.finditer(r"\.(?:toml|py|onnx)(?=[:+]|$)", name):
        path = name[: end.end()]
        behind = re.fullmatch(r"(:[^+]*)?(?:\+(.*))?", name[end.end() :])
        if "+" in path and behind is not None and Path(path).is_file():
            return path + (behind[1] or ""), behind[2]
    split = re.fullmatch(r"(.+?)\+(\w*|\w+\s*=.*|,.*)", name)
    return (name, None) if split is None else (split[1], split[2])


def baseline_of(variant: Variant) -> Variant | None:
    """Return the variant that this one is compared with; None for a baseline itself."""
    if variant.baseline is None:
        return None
    return _family_of(variant)[variant.baseline] if variant.file else find(variant.baseline)


def _family_of(variant: Variant) -> dict[str, Variant]:
    return read_family(Path(variant.file)) if variant.file else installed()


def _changed(variant: Variant, text: str) -> Variant:
    """Return a variant with other attention blocks; a baseline takes missing keys from its variant with SE."""
    if variant.family == ONNX_FAMILY:
        raise SpecError(f"{variant.name}: an ONNX network takes no blocks; leave --se and --insert out")
    start = variant.se
    if start is None:
        start = _se_of_variants(find(str(variant.arguments["trunk"])) if composed.is_one(variant) else variant)
    return msgspec.structs.replace(
        variant,
        name=f"{variant.name}+{text}",
        title=f"{variant.title}, changed: {text}",
        baseline=variant.baseline or variant.name,
        se=changed(start, text),
        published=(),
    )


def _se_of_variants(baseline: Variant) -> SiteConfig | None:
    """Return the configuration of the variant of a baseline; of several, of the one with its name."""
    same = [one for one in _family_of(baseline).values() if one.baseline == baseline.name and one.se is not None]
    named = next((one.se for one in same if one.name == f"se_{baseline.name}"), same[0].se if same else None)
    found: SiteConfig | None = named
    return found


def _from_file(path: Path, wanted: str | None) -> Variant:
    family = read_family(path)
    if wanted is not None:
        if wanted not in family:
            raise UnknownNameError(f"{path}: no variant {wanted!r}{nearest(wanted, family)}")
        return family[wanted]
    if len(family) > 1:
        raise SpecError(f"{path}: has {len(family)} variants; name one as {path}:NAME{nearest('', family)}")
    return next(iter(family.values()))
