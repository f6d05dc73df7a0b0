"""The networks of a tax in another runtime."""

import pytest
import torch

from selab.attention.se import SqueezeExcitation
from selab.errors import InsertionError
from selab.experiments.tax_exported import _only_late
from selab.models.build import build
from selab.models.catalog import find


@pytest.mark.parametrize(("arch", "height"), [("se_mobilenet_0_25", 224), ("mobilenet_v3_small", 224)])
def test_late_blocks_alone_stay_and_the_rest_of_the_network_with_them(arch, height):
    """Blocks at sites of the network, and blocks of its own."""
    built = build(find(arch))
    late = [one for one in built.insertions if one.height * 16 <= height]
    assert 0 < len(late) < len(built.insertions)
    made = _only_late(build(find(arch)).model, built.insertions, height).eval()
    kept = [one for one in made.modules() if isinstance(one, SqueezeExcitation)]
    assert len(kept) == len(late)
    assert [one.channels for one in kept] == [one.channels for one in late]
    with torch.no_grad():
        assert made(torch.zeros(1, 3, height, height)).shape == (1, 1000)


def test_where_all_or_none_is_late_there_is_nothing_to_compare():
    built = build(find("se_mobilenet_0_25"))
    with pytest.raises(InsertionError, match="all of its blocks have maps of at most"):
        _only_late(built.model, built.insertions, 224 * 16)
    with pytest.raises(InsertionError, match="none of its blocks have maps of at most 1 rows"):
        _only_late(built.model, built.insertions, 16)
