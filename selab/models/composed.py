"""Detectors and segmenters by name: a method, and one of the other networks as its backbone.

`faster_rcnn_se_resnet50_fpn` is a Faster R-CNN on the network `se_resnet50`. Any network with such a name can be the
backbone, with blocks of one's own too: `faster_rcnn_resnet50_fpn+reduction=8`. torchvision builds them
(`selab.models.detection`); names and configurations need neither it nor torch.
"""

import re
from collections.abc import Callable, Iterable
from functools import cache
from typing import Literal, get_args

import msgspec

from selab.models.spec import Published, Variant
from selab.records.toml import converted, parse_tables, read_package
from selab.records.types import Frozen

_BUILDERS = "selab.models.detection"
Family = Literal["detection", "segmentation"]


class _PublishedOn(Published, frozen=True, kw_only=True):
    """A number that was published for the method on a network, the trunk."""

    trunk: str


class Method(Frozen, frozen=True, kw_only=True):
    """A way to detect or segment with the feature maps of a network.

    Attributes:
        name: begins its names; `suffix` ends them.
        title: of the method.
        source: where it was published.
        input_chw: the images that it is usually measured on.
        num_classes: with the background, of the data set that it is usually trained on.
    """

    name: str
    suffix: str = ""
    family: Family
    title: str
    source: str
    input_chw: tuple[int, int, int]
    num_classes: int
    published: tuple[_PublishedOn, ...] = ()

    def name_of(self, trunk: str) -> str:
        """Return the name of the method on a network."""
        return f"{self.name}_{trunk}{self.suffix}"


@cache
def methods() -> dict[str, Method]:
    """Return all methods by name, as `composed.toml` has them."""
    return read_package("selab.models", _parse, header="methods")


def find(name: str, trunk_of: Callable[[str], Variant]) -> Variant | None:
    """Return the variant of a detector's or segmenter's name; None for other names.

    The SE blocks are those of the backbone, at the same places. The baseline has the backbone's baseline.

    Args:
        name: as the user gave it.
        trunk_of: gives the variant of a backbone's name.

    Raises:
        UnknownNameError: as `trunk_of`.
    """
    for method in methods().values():
        found = re.fullmatch(f"{method.name}_(.+){method.suffix}", name)
        if found is not None:
            return _variant(method, trunk_of(found[1]))
    return None


def names(trunks: Iterable[str]) -> list[str]:
    """Return the names of every method on every one of these networks."""
    return [method.name_of(trunk) for method in methods().values() for trunk in trunks]


def patterns() -> list[str]:
    """Return `faster_rcnn_NETWORK_fpn` and the others."""
    return names(["NETWORK"])


def is_one(variant: Variant) -> bool:
    """Return whether a variant is a detector or segmenter of this module."""
    return variant.family in get_args(Family) and variant.builder.startswith(f"{_BUILDERS}:")


def _parse(text: str, *, origin: str) -> dict[str, Method]:
    tables = parse_tables(text, "methods", origin=origin)
    return {
        name: converted(table, Method, place=f"{origin}: methods.{name}", name=name) for name, table in tables.items()
    }


def _variant(method: Method, trunk: Variant) -> Variant:
    bare = msgspec.structs.replace(trunk, se=None)
    numbers = [one for one in method.published if one.trunk == trunk.name]
    return Variant(
        name=method.name_of(trunk.name),
        family=method.family,
        title=f"{method.title} on {trunk.title}",
        source=method.source,
        builder=f"{_BUILDERS}:{method.name}",
        # The hash is part of what determines the network.
        arguments={"trunk": trunk.name, "trunk_hash": bare.facts_hash},
        input_chw=method.input_chw,
        num_classes=method.num_classes,
        baseline=None if trunk.baseline is None else method.name_of(trunk.baseline),
        se=trunk.se,
        published=tuple(
            Published(**{key: getattr(one, key) for key in Published.__struct_fields__}) for one in numbers
        ),
        note=trunk.note,
        origin=method.source,
        file="",
    )
