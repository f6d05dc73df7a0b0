"""What a block is worth: the answers with its gate, and with constants in its place."""

import math
from random import Random

import numpy as np
import pytest
import torch
from torch import nn

from selab.attention.se import SqueezeExcitation
from selab.errors import ModelError, SelabError
from selab.judging.loss import loss_of
from selab.judging.watch import gated_blocks, watched
from selab.judging.worth import Replaced, answers, replaced


def se(channels=6, **options):
    made = SqueezeExcitation(channels, 2, **options)
    with torch.no_grad():
        made.fc1.weight.normal_(std=2, generator=torch.Generator().manual_seed(1))
        made.fc2.weight.normal_(std=2, generator=torch.Generator().manual_seed(2))
    return made.eval()


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), se(), nn.ReLU(), se(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)
    )


def images(number=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(number, 3, 8, 8, generator=generator), torch.randint(4, (number,), generator=generator)


def test_constants_stand_for_the_gates_while_they_are_replaced(net):
    x, _ = images()
    constants = {"1": torch.linspace(0.1, 0.9, 6)}
    with torch.no_grad():
        expected = net[0](x) * constants["1"][None, :, None, None]
        expected = net[6](net[5](net[4](net[3](net[2](expected)))))
        before = net(x)
        with replaced(gated_blocks(net), constants):
            torch.testing.assert_close(net(x), expected)
        assert torch.equal(net(x), before)


def test_the_gates_of_one_image_change_nothing_for_it(net):
    x, _ = images(1)
    blocks, gates = gated_blocks(net), {}
    with torch.no_grad():
        with watched(blocks, lambda path, gate: gates.__setitem__(path, gate[0].clone())):
            expected = net(x)
        with replaced(blocks, gates):
            torch.testing.assert_close(net(x), expected)


def test_the_relu_that_a_block_took_over_stays():
    block = se()
    block.relu_in = True
    x = torch.randn(2, 6, 4, 4)
    with torch.no_grad(), replaced({"0": block}, {"0": torch.full((6,), 0.5)}):
        torch.testing.assert_close(nn.Sequential(block)(x), torch.relu(x) / 2)


def test_the_answers_of_every_arm_over_one_reading(net):
    x, labels = images()
    readings = []

    def batches():
        readings.append(1)
        yield x[:25], labels[:25]
        yield x[25:], labels[25:]
        yield x[:0], labels[:0]

    ones = {"1": torch.ones(6)}
    found = answers(
        batches, [net, *(Replaced(model=net, blocks=gated_blocks(net), constants=one) for one in (ones, {}))]
    )
    assert len(readings) == 1
    with torch.no_grad():
        np.testing.assert_array_equal(found[0], (net(x).argmax(1) == labels).numpy())
        with replaced(gated_blocks(net), ones):
            np.testing.assert_array_equal(found[1], (net(x).argmax(1) == labels).numpy())
    np.testing.assert_array_equal(found[2], found[0])


def test_what_was_lost_is_counted_in_points():
    before = np.array([True] * 60 + [False] * 40)
    after = before.copy()
    after[:9] = False
    after[60:62] = True
    loss = loss_of(before, after)
    assert (loss.images, loss.before, loss.after, loss.worse, loss.better) == (100, 60, 53, 9, 2)
    assert loss.points == pytest.approx(7.0)
    # (9 + 1 - 2 - 1) / 102, ± 1.96 sqrt((13 / 102 - (7 / 102)²) / 102)
    half = 100 * 1.959964 * math.sqrt((13 / 102 - (7 / 102) ** 2) / 102)
    assert loss.low == pytest.approx(100 * 7 / 102 - half, abs=1e-4)
    assert loss.high == pytest.approx(100 * 7 / 102 + half, abs=1e-4)


def test_nothing_changed_is_no_certainty():
    same = np.array([True, False] * 50)
    loss = loss_of(same, same)
    assert loss.points == 0
    assert loss.low < 0 < loss.high


@pytest.mark.parametrize(("worse", "better"), [(0.03, 0.03), (0.08, 0.02), (0.01, 0.0)])
def test_the_interval_holds_the_truth(worse, better):
    """2,000 trials of 300 images each."""
    random, held = Random(3), 0
    trials = 2000
    for _ in range(trials):
        kinds = random.choices((0, 1, 2), (worse, better, 1 - worse - better), k=300)
        before = np.array([kind != 1 for kind in kinds])
        after = np.array([kind != 0 for kind in kinds])
        loss = loss_of(before, after)
        held += loss.low <= 100 * (worse - better) <= loss.high
    assert held / trials >= 0.93


def test_bad_input(net):
    with pytest.raises(SelabError, match="there are no images with labels"):
        answers(list, [net])
    with pytest.raises(ModelError, match="Conv2d: its output is"):
        answers(lambda: [images(3)], [nn.Conv2d(3, 4, 3)])
