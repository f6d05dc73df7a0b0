"""The catalog's networks on the meta device and their costs, made once in a process; tests must not change them."""

from functools import cache

from selab.cost.count import count
from selab.models.build import Built, build
from selab.models.catalog import find
from selab.records.types import Cost


@cache
def built(name: str) -> Built:
    """Return a network of the catalog, without memory."""
    return build(find(name), device="meta")


@cache
def cost(name: str) -> Cost:
    """Return the cost of a network of the catalog for one image."""
    return count(built(name).model, (1, *find(name).input_chw), se_blocks=built(name).native)
