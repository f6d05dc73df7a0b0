"""The gates of a network over images, in one pass."""

import numpy as np
import pytest
import torch
from torch import nn

from selab.attention.se import SqueezeExcitation
from selab.errors import InsertionError, ModelError, RecordError, SelabError
from selab.judging.look import gates
from selab.judging.record import gates_json, read_gates

CLASSES = 5


class Net(nn.Module):
    """Two blocks on a map of eight channels, and a classifier."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.early, self.late = SqueezeExcitation(8, 2), SqueezeExcitation(8, 2)
        self.head = nn.Linear(8, CLASSES)
        with torch.no_grad():
            for block in (self.early, self.late):
                block.fc1.weight.normal_(std=2)
                block.fc2.weight.normal_(std=2)

    def forward(self, x):
        return self.head(self.late(torch.relu(self.early(self.stem(x)))).mean((2, 3)))


def batches(number=6, size=7, *, labels=True, seed=3):
    generator = torch.Generator().manual_seed(seed)
    for place in range(number):
        kept = size - (place == number - 1) * 3
        images = torch.randn(kept, 3, 6, 6, generator=generator)
        yield (images, torch.randint(CLASSES, (kept,), generator=generator)) if labels else images


def factors(net, images):
    """The gates of both blocks in float64, by the formula."""
    found = []
    x = net.stem(images)
    for block in (net.early, net.late):
        gate = torch.sigmoid(block.fc2(torch.relu(block.fc1(x.mean((2, 3))))))
        found.append(gate)
        x = torch.relu(x * gate[:, :, None, None])
    return found


def test_one_pass_gives_what_all_gates_at_once_give():
    net = Net().eval()
    seen = gates(net, batches(), classes=list("abcde"), chosen=["b", "3"])
    together = list(batches())
    images, labels = torch.cat([one for one, _ in together]), torch.cat([two for _, two in together])
    with torch.no_grad():
        expected = [one.double().numpy() for one in factors(net, images)]
    assert (seen.images, seen.classes) == (39, tuple("abcde"))
    assert [one.path for one in seen.blocks] == ["early", "late"]
    for block, gate in zip(seen.blocks, expected, strict=True):
        np.testing.assert_allclose(block.mean, gate.mean(0), rtol=1e-5)
        np.testing.assert_allclose(block.deviation, gate.std(0), rtol=1e-4, atol=1e-7)
        np.testing.assert_allclose(block.lowest, gate.min(0), rtol=1e-5)
        np.testing.assert_allclose(block.low, (gate < 0.05).mean(0))
        np.testing.assert_allclose(block.high, (gate > 0.95).mean(0))
    assert list(seen.class_means) == ["b", "d"]
    for name, label in (("b", 1), ("d", 3)):
        for block, gate in zip(seen.class_means[name], expected, strict=True):
            np.testing.assert_allclose(block, gate[labels.numpy() == label].mean(0), rtol=1e-5)


def test_a_gate_that_follows_the_class_is_recovered():
    class Planted(nn.Module):
        """The image's mean colour is its class; one block follows it, one is constant."""

        def __init__(self):
            super().__init__()
            self.follows, self.constant = SqueezeExcitation(3, 1), SqueezeExcitation(3, 1)
            self.head = nn.Linear(3, 2)
            with torch.no_grad():
                self.follows.fc1.weight.copy_(torch.eye(3))
                self.follows.fc2.weight.copy_(torch.eye(3) * 6)
                self.follows.fc2.bias.fill_(-3)
                self.constant.fc2.weight.zero_()
                self.constant.fc2.bias.copy_(torch.tensor([-20.0, 0.0, 20.0]))

        def forward(self, x):
            return self.head(self.constant(self.follows(x)).mean((2, 3)))

    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(200) % 2
    images = labels[:, None, None, None] + 0.1 * torch.randn(200, 3, 4, 4, generator=generator)
    follows, constant = gates(Planted(), [(images, labels)]).blocks
    assert follows.specificity > 0.95
    assert follows.specificity_low > 0.9
    assert constant.specificity == 0
    assert constant.spread == 0
    assert constant.constant == (0, 1, 2)
    assert constant.dead == (0,)
    assert constant.high == (0.0, 0.0, 1.0)


def test_without_labels_there_is_nothing_between_classes():
    net = Net()
    net.train()
    seen = gates(net, batches(labels=False))
    assert net.training
    assert (seen.classes, seen.class_means) == ((), {})
    assert all(one.between is None and one.specificity is None for one in seen.blocks)
    assert seen.arch == "Net"


def test_a_few_classes_are_shown_unless_they_are_named():
    images = torch.randn(20, 3, 6, 6)
    seen = gates(Net(), [(images, torch.arange(20) % CLASSES)])
    assert list(seen.class_means) == ["0", "1", "2", "3"]


def test_a_block_that_is_called_twice_has_two_rows():
    block = SqueezeExcitation(3, 1)
    seen = gates(nn.Sequential(block, nn.ReLU(), block), [torch.randn(4, 3, 6, 6)])
    assert [one.path for one in seen.blocks] == ["0", "0 (call 2)"]


def test_a_record_is_read_back(tmp_path):
    seen = gates(Net(), batches(), weights="net.safetensors", data="noise")
    path = tmp_path / "gates.json"
    path.write_bytes(gates_json(seen))
    assert read_gates(path) == seen
    assert seen.block("late").channels == 8
    with pytest.raises(RecordError, match="has no gates of head; blocks: early, late"):
        seen.block("head")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda text: text.replace('"arch":"Net"', '"arch":7'), "arch"),
        (lambda text: text.replace('"deviation":[', '"deviation":[0.5,'), "its lists differ in length"),
        (lambda text: text.replace('"lowest":[', '"lowest":[2.0,').replace('"highest":[', '"highest":[1.0,'), "length"),
        (lambda text: text[:50], "look again with `selab gates`"),
    ],
)
def test_a_damaged_record_is_named(tmp_path, change, said):
    path = tmp_path / "gates.json"
    text = gates_json(gates(Net(), batches())).decode().replace('": ', '":').replace("[\n", "[")
    assert change(text) != text
    path.write_text(change(text))
    with pytest.raises(RecordError, match=r"gates\.json") as raised:
        read_gates(path)
    assert said in str(raised.value)


def broken():
    net = Net()
    with torch.no_grad():
        net.late.fc2.bias.fill_(torch.nan)
    return net


@pytest.mark.parametrize(
    ("net", "loader", "options", "kind", "said"),
    [
        (nn.Conv2d(3, 3, 1), [torch.zeros(1, 3, 6, 6)], {}, InsertionError, "has no block with one gate per channel"),
        (Net(), [], {}, SelabError, "the loader's images: holds no image"),
        (Net(), [torch.zeros(2, 4, 6, 6)], {}, ModelError, "Net: forward fails on images of 2×4×6×6"),
        (broken(), [torch.zeros(2, 3, 6, 6)], {}, ModelError, "late: its gate holds NaN or infinity"),
        (Net(), [3], {}, SelabError, "a batch is neither images"),
        (Net(), [(torch.zeros(2, 3, 6, 6), torch.tensor([0, 9]))], {}, SelabError, "a label is not from 0 to 4"),
        (Net(), list(batches()) + list(batches(labels=False)), {}, SelabError, "labels are missing"),
        (Net(), batches(labels=False), {"chosen": ["cat"]}, SelabError, "the images have no labels"),
        (Net(), batches(), {"chosen": ["cat"]}, SelabError, "--classes cat: no such class"),
        (Net(), [(torch.zeros(2, 3, 6, 6), torch.tensor([0, 1]))], {"chosen": ["4"]}, SelabError, "4: has no image"),
    ],
)
def test_bad_input_is_one_line(net, loader, options, kind, said):
    with pytest.raises(kind) as raised:
        gates(net, loader, **options)
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)
