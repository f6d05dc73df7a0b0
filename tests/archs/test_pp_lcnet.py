"""PP-LCNet: totals, sites, and what is refused."""

import pytest
from catalog_networks import built, cost

from selab.archs.pp_lcnet import pp_lcnet
from selab.models.catalog import installed

# Kernel, output channels at scale 1, stride: arXiv 2109.15099, Table 1.
ROWS = [(3, 32, 1), (3, 64, 2), (3, 64, 1), (3, 128, 2), (3, 128, 1), (3, 256, 2), *[(5, 256, 1)] * 5]
ROWS += [(5, 512, 2), (5, 512, 1)]
LATE = "0000000000011"


def totals(scale, blocks):
    """(parameters, MACs) by arithmetic, layer by layer; at these scales every width is a multiple of 8."""
    side, c = 112, int(16 * scale)
    params, macs = 27 * c + 2 * c, 27 * c * side**2
    for place, (kernel, out, stride) in enumerate(ROWS):
        side, out = side // stride, int(out * scale)
        params += kernel**2 * c + 2 * c + c * out + 2 * out
        macs += (kernel**2 * c + c * out) * side**2
        if blocks and blocks[place] == "1":
            params += 2 * c * (c // 4) + c + c // 4
            macs += 2 * c * (c // 4)
        c = out
    return params + c * 1280 + 1280 * 1000 + 1000, macs + c * 1280 + 1280 * 1000


PLACED = {
    "pp_lcnet_x0_5_no_se": (0.5, ""),
    "pp_lcnet_x0_5": (0.5, LATE),
    "pp_lcnet_x1_0_no_se": (1.0, ""),
    "pp_lcnet_x1_0": (1.0, LATE),
    "se_pp_lcnet_x0_5_early": (0.5, "1100000000000"),
    "se_pp_lcnet_x0_5_middle": (0.5, "0000001100000"),
    "se_pp_lcnet_x0_5_all": (0.5, "1111111111111"),
}
# (parameters, MACs of convolutions and fully connected layers)
TOTALS = {name: totals(*placed) for name, placed in PLACED.items()}


@pytest.mark.parametrize("name", TOTALS)
def test_totals(name):
    found = cost(name)
    assert (found.params, found.macs.conv_linear) == TOTALS[name]


def test_every_variant_is_looked_at():
    assert set(TOTALS) == {name for name, one in installed().items() if one.family == "pp_lcnet"}


def test_the_blocks_stand_between_depthwise_and_pointwise():
    paths = [one.path for one in built("pp_lcnet_x0_5").insertions]
    assert [path.rpartition(".depthwise")[0] for path in paths] == ["stage5.0", "stage5.1"]
    early = [one.path for one in built("se_pp_lcnet_x0_5_early").insertions]
    assert [path.rpartition(".depthwise")[0] for path in early] == ["stage1.0", "stage2.0"]
    assert len(built("se_pp_lcnet_x0_5_all").insertions) == 13
    # Before the stride of the last stage's depthwise convolution 256, behind it half as many pixels.
    assert [(one.channels, one.height) for one in built("pp_lcnet_x1_0").insertions] == [(256, 7), (512, 7)]


def test_widths_are_rounded_to_eight():
    sizes = {one.conv.out_channels for one in (row.pointwise for row in pp_lcnet(scale=0.35).stage2)}
    # 0.35 * 64 is 22.4.
    assert sizes == {24}


@pytest.mark.parametrize(
    "arguments",
    [{"scale": 0.0}, {"num_classes": 0}, {"dropout": 1.0}],
)
def test_what_is_refused(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        pp_lcnet(**{"scale": 1.0, **arguments})
