"""Statistics of gates: one pass equals two, and what was planted is found."""

import numpy as np
import pytest

from selab.errors import ModelError, SelabError
from selab.judging.statistics import GateStatistics, ranked

RANDOM = np.random.default_rng(0)


def streamed(values, labels=None, *, classes=0, batch=7):
    found = GateStatistics("b", values.shape[1], classes=classes)
    for first in range(0, len(values), batch):
        part = slice(first, first + batch)
        found.add(values[part], None if labels is None else labels[part])
    return found


@pytest.mark.parametrize("offset", [0.5, 1e6], ids=["gates", "far from zero"])
@pytest.mark.parametrize("batch", [1, 7, 1000])
def test_one_pass_equals_two(offset, batch):
    values = offset + 0.1 * RANDOM.normal(size=(301, 5))
    found = streamed(values, batch=batch).summary()
    np.testing.assert_allclose(found.mean, values.mean(0), rtol=1e-13)
    np.testing.assert_allclose(found.deviation, values.std(0), rtol=1e-7 if offset > 1 else 1e-12)
    assert found.lowest == tuple(values.min(0))
    assert found.highest == tuple(values.max(0))
    assert found.spread == pytest.approx(np.sqrt(values.var(0).mean()), rel=1e-7)
    assert (found.images, found.channels, found.classes, found.between) == (301, 5, 0, None)


def test_half_precision_is_summed_in_double():
    values = np.full((20_000, 1), 0.1, np.float16)
    assert streamed(values, batch=500).summary().mean[0] == pytest.approx(float(np.float16(0.1)), rel=1e-12)


def test_saturation_counts_images():
    values = np.array([[0.01, 0.5], [0.04, 0.96], [0.06, 0.99], [0.5, 0.95]])
    found = streamed(values).summary()
    assert found.low == (0.5, 0.0)
    assert found.high == (0.0, 0.5)


def test_constant_and_dead_channels():
    values = RANDOM.uniform(0.2, 0.8, size=(50, 4))
    values[:, 1] = 0.7 + 0.004 * RANDOM.uniform(size=50)
    values[:, 3] = 0.03 * RANDOM.uniform(size=50)
    found = streamed(values).summary()
    assert found.constant == (1,)
    assert found.dead == (3,)
    assert streamed(np.zeros((3, 2))).summary().dead == (0, 1)


def planted(images, classes, *, share, channels=8, seed=1):
    """Gates of which so much of the variance lies between the classes."""
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, classes, size=images)
    centres = draw.normal(size=(classes, channels))
    values = np.sqrt(share) * centres[labels] + np.sqrt(1 - share) * draw.normal(size=(images, channels))
    return 0.5 + 0.05 * values, labels


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9])
def test_what_was_planted_between_classes_is_found(share):
    values, labels = planted(4000, 100, share=share, channels=64)
    found = streamed(values, labels, classes=100, batch=64).summary()
    assert found.specificity == pytest.approx(share, abs=0.03)
    assert found.specificity_low <= found.specificity <= found.specificity_high
    assert found.specificity_high - found.specificity_low < 0.1
    assert np.mean(found.between) == pytest.approx(found.specificity, abs=0.02)


def test_classes_of_few_images_show_nothing_by_chance():
    """Without the correction 100 classes of 3 images each would show a third of the variance."""
    values, labels = planted(300, 100, share=0.0, channels=64)
    assert streamed(values, labels, classes=100).summary().specificity < 0.05


def test_the_interval_holds_the_truth():
    held = 0
    for seed in range(60):
        values, labels = planted(400, 4, share=0.3, channels=16, seed=seed)
        found = streamed(values, labels, classes=4, batch=50).summary()
        # The truth given these centres: their variance over the classes, beside the noise within.
        centres = np.random.default_rng(seed)
        centres.integers(0, 4, size=400)
        drawn = centres.normal(size=(4, 16))
        ours = 0.3 * drawn.var(0).sum()
        share = ours / (ours + 0.7 * 16)
        held += found.specificity_low <= share <= found.specificity_high
    assert held >= 50


def test_one_class_or_one_image_each_says_nothing_about_classes():
    values = RANDOM.uniform(size=(5, 2))
    assert streamed(values, np.zeros(5, np.int64), classes=3).summary().specificity is None
    assert streamed(values, np.arange(5), classes=5).summary().specificity is None


def test_a_gate_that_does_not_vary_has_no_share():
    found = streamed(np.full((20, 2), 0.5), np.arange(20) % 2, classes=2).summary()
    assert (found.specificity, found.spread) == (0.0, 0.0)


def test_the_mean_of_a_class():
    values = RANDOM.uniform(size=(9, 3))
    labels = np.arange(9) % 3
    found = streamed(values, labels, classes=4)
    np.testing.assert_allclose(found.class_mean(1), values[labels == 1].mean(0))
    with pytest.raises(SelabError, match="class 3: has no image"):
        found.class_mean(3)


@pytest.mark.parametrize(
    ("values", "labels", "classes", "said"),
    [
        (np.zeros((2, 3)), None, 0, r"its gate is \[2, 3\], expected \(images, 2\)"),
        (np.full((2, 2), np.nan), None, 0, "holds NaN or infinity"),
        (np.zeros((2, 2)), None, 3, "labels are missing"),
        (np.zeros((2, 2)), np.zeros(2, np.int64), 0, "no labels are wanted"),
        (np.zeros((2, 2)), np.zeros(1, np.int64), 3, "1 labels for 2 images"),
        (np.zeros((2, 2)), np.array([0, 3]), 3, "a label is not from 0 to 2"),
    ],
)
def test_what_is_refused(values, labels, classes, said):
    found = GateStatistics("block", 2, classes=classes)
    with pytest.raises((ModelError, SelabError), match=f"block: .*{said}"):
        found.add(values, labels)
    assert found.images == 0


def test_no_image_at_all():
    with pytest.raises(SelabError, match="b: no image was looked at"):
        GateStatistics("b", 2).summary()


def test_blocks_that_vary_least_come_first():
    blocks = [streamed(0.5 + width * RANDOM.normal(size=(50, 3))).summary() for width in (0.2, 0.01, 0.1)]
    assert [block.spread for block in ranked(blocks)] == sorted(block.spread for block in blocks)
