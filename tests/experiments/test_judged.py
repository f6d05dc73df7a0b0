"""The images that a network is judged on: what decides and what reports never overlap."""

import pytest
import spelled
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from spelled import CHANNELS, SIZE, Net

from selab.experiments.folding import CHOOSING, RANKING, REPORTING
from selab.experiments.judged import PARTS, Judged, JudgedGraph, Seen
from selab.graphs.module import OnnxNetwork
from selab.models.catalog import find


class Numbered:
    """Images whose every pixel is their number, and whose label is too."""

    name = title = "numbered"
    num_classes = 1000
    input_chw = (3, 2, 2)

    def __init__(self, number):
        self.number = number

    def test_batches(self, *, batch, device, rank=0, world=1):
        for first in range(0, self.number, batch):
            places = torch.arange(first, min(first + batch, self.number))
            yield places.float()[:, None, None, None].expand(-1, 3, 2, 2), places


def network(number, *, batch=100, most=10**6):
    seen = Seen(data=Numbered(number), batch=batch, most=most)
    return Judged(find("small_cnn"), seen, torch.nn.Identity(), "cpu", "")


def places(batches):
    found = []
    for images, labels in batches:
        assert torch.equal(images[:, 0, 0, 0].long(), labels)
        found += labels.tolist()
    return found


@given(st.integers(1, 50), st.integers(1, 20), st.integers(1, 60))
@settings(deadline=None)
def test_the_parts_never_overlap_and_are_all_together(number, batch, most):
    one = network(number, batch=batch, most=most)
    every = places(one.batches())
    assert every == list(range(min(number, most)))
    for part in range(PARTS):
        assert places(one.batches(part)) == every[part::PARTS]
    assert places(one.batches(RANKING, CHOOSING)) == [place for place in every if place % PARTS != REPORTING]


@pytest.mark.parametrize("parts", [(0,), (1,), (0, 1), ()])
def test_a_network_of_a_fixed_batch_gets_whole_batches(parts):
    pytest.importorskip("onnxruntime")
    net = Net(shape=(4, CHANNELS, SIZE, SIZE))
    model = net.model(spelled.pool_and_convolutions(net, "x"))
    judged = JudgedGraph(find("small_cnn"), Seen(data=Numbered(27), batch=5), OnnxNetwork(model, "net.onnx"))
    batches = list(judged.batches(*parts))
    assert {len(labels) for _, labels in batches} == {4}
    wanted = [place for place in range(27) if not parts or place % PARTS in parts]
    assert places(batches) == wanted[: len(wanted) // 4 * 4]


def test_numbered_classes():
    assert Seen(data=Numbered(3)).classes[:2] == ("0", "1")
    assert Seen().classes == ()
