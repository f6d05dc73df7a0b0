"""`selab tax` of networks of timm and torchvision: their own SE as written and as fused, over the same without it."""

import pytest

from selab.experiments.tax_record import read_tax_record
from selab.fusion.external import external_blocks
from selab.models import external
from selab.models.build import build
from selab.models.catalog import find


@pytest.mark.usefixtures("quick_plans")
@pytest.mark.parametrize(
    ("library", "name", "blocks"), [("timm", "mobilenetv3_small_050", 9), ("torchvision", "mobilenet_v3_small", 9)]
)
def test_the_command_runs_and_its_record_is_read_back(selab, tmp_path, library, name, blocks):
    pytest.importorskip(library)
    words = ("--resolution", "64", "--budget", "0.1", "--out", tmp_path)
    status, shown, told = selab("tax", "--arch", f"{library}:{name}", *words)
    assert status == 0, told
    assert "The SE tax of" in shown
    (path,) = tmp_path.glob("*/tax/*.json")
    record = read_tax_record(path)
    assert record.bare
    assert record.implementations == ("reference", "fast")
    network = build(find(record.arch), device="meta").model
    assert [one.path for one in record.blocks] == list(external.se_blocks(network)) == list(external_blocks(network))
    assert len(record.blocks) == blocks
    assert all(one.params == 2 * one.channels * one.squeeze_channels + one.channels + one.squeeze_channels
               for one in record.blocks)  # fmt: skip
    assert not [pair.latency.error for pair in record.pairs if pair.latency.error]
    assert f"fused {blocks} SE blocks (in place)" in record.remarks[-1]
