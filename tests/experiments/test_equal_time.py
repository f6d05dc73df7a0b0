"""Baselines that are as slow as a variant; times are made up."""

import json
import math
import re
import sys

import msgspec
import pytest
from resizable import FAMILY, NETWORKS, latency_of
from tiny_training import images

from selab.cost.count import count
from selab.errors import RecordError, SelabError
from selab.experiments import equal_time
from selab.experiments.compare import fitted
from selab.experiments.equal_time import BLOCKS, EqualTime, between, nearest, neighbours, spaced
from selab.models import catalog
from selab.models.build import build
from selab.models.provenance import fixed_address


@pytest.fixture
def pair(tmp_path):
    """The tiny network with blocks and without, for images of four classes."""
    (tmp_path / "resizable_networks.py").write_text(NETWORKS)
    (tmp_path / "tiny.toml").write_text(FAMILY)
    found = [fitted(catalog.find(f"{tmp_path / 'tiny.toml'}:{name}"), images()) for name in ("se_tiny", "tiny")]
    yield found
    sys.modules.pop("resizable_networks", None)


@pytest.fixture
def clock(monkeypatch):
    """Times that grow with the MACs, and what was measured in each call; `clock.blocks` is the variant's."""

    class Clock:
        def __init__(self):
            self.blocks, self.calls = 3.7, []

        def times(self, job, archs, report):
            def macs(arch):
                variant = catalog.find(arch)
                return count(build(variant, device="meta").model, (1, *variant.input_chw)).macs.all

            self.calls.append([arch.rpartition(":")[2] for arch in archs])
            base = macs(job.request.arch)
            # Each of them is built, as a process that measures does.
            ratios = {arch: macs(arch) / base for arch in archs}
            assert all(len(build(catalog.find(arch)).insertions) == 4 for arch in archs if arch.endswith(BLOCKS))
            return {
                arch: latency_of(self.blocks if arch.endswith(BLOCKS) else ratio) for arch, ratio in ratios.items()
            }, ()

    found = Clock()
    monkeypatch.setattr(equal_time, "times", found.times)
    return found


def as_slow(pair, out, **more):
    said = []
    networks = equal_time.equal_time(*pair, out=out, budget_s=1.0, report=lambda *_: None, say=said.append, **more)
    return [one for one, _ in networks], said


def test_each_network_comes_with_both_times(pair, clock, tmp_path):
    networks = equal_time.equal_time(*pair, out=tmp_path / "out", budget_s=1.0, report=lambda *_: None)
    for network, words in networks:
        assert f"forward pass of one image, over tiny's: {network.name} x " in words
        assert ", se_tiny x " in words
        record = msgspec.json.decode((tmp_path / "out/equal-time/se_tiny-vs-tiny.json").read_bytes(), type=EqualTime)
        taken = next(one.latency.ratio for one in record.tried if one.network.name == network.name)
        assert abs(math.log(taken / 3.7)) <= 0.02


def test_the_nearest_is_taken_in_proportion():
    assert nearest({"a": 1.0, "b": 1.5}, 1.24) == "b"
    assert nearest({"a": 1.0, "b": 1.5}, 1.2) == "a"
    # Two that are as near: the cheaper one.
    assert nearest({"a": 1.0, "b": 1.44}, 1.2) == "a"


@pytest.mark.parametrize(
    ("known", "aim", "found"),
    [
        ({"w2": 1.1, "w5": 1.5}, 1.3, ["w3", "w4"]),
        # All are too slow, or too fast.
        ({"w2": 1.4, "w5": 1.5}, 1.3, ["w0", "w1"]),
        ({"w2": 1.1, "w5": 1.2}, 1.3, ["w6", "w7"]),
        ({"w2": 1.1, "w3": 1.5}, 1.3, []),
        # A slower one that was measured as faster does not hide what lies between.
        ({"w1": 1.2, "w2": 1.1, "w4": 1.5}, 1.3, ["w3"]),
    ],
)
def test_the_search_goes_on_between_the_neighbours(known, aim, found):
    ordered = [f"w{place}" for place in range(8)]
    assert between(ordered, known, aim, most=10) == found


def test_widths_are_refined_where_the_search_goes_on():
    """The last network that is fast enough counts, also where a narrower one was measured as too slow."""
    ordered = [f"w{place}" for place in range(5)]
    assert neighbours(ordered, {"w0": 1.1, "w1": 1.6, "w2": 1.2, "w4": 1.5}, 1.3) == (2, 4)
    assert neighbours(ordered, {"w1": 1.6}, 1.3) == (-1, 1)
    assert neighbours(ordered, {"w1": 1.2}, 1.3) == (1, 5)


def test_names_are_spaced_to_the_last():
    assert spaced(list("abcdefgh"), 4) == list("bdfh")
    assert spaced(list("abc"), 5) == list("abc")
    assert spaced([], 3) == []


def test_a_wider_and_a_deeper_network_take_as_long(pair, clock, tmp_path):
    (wider, deeper), said = as_slow(pair, tmp_path / "out")
    variant, baseline = pair
    record = msgspec.json.decode((tmp_path / "out/equal-time/se_tiny-vs-tiny.json").read_bytes(), type=EqualTime)
    ratios = {one.network.name: one.latency.ratio for one in record.tried}
    of_kind = {kind: [one.network.name for one in record.tried if one.kind == kind] for kind in ("width", "depth")}
    assert record.chosen == (wider.name, deeper.name)
    for name, names in zip(record.chosen, of_kind.values(), strict=True):
        assert abs(ratios[name] - 3.7) == min(abs(ratios[each] - 3.7) for each in names)
    assert record.variant.ratio == 3.7
    assert len(ratios) == sum(map(len, clock.calls)) - 1
    # The first call measures the variant too; the second one only what lies between the nearest ones.
    assert clock.calls[0][0] == BLOCKS
    assert all(BLOCKS not in one for one in clock.calls[1:])
    assert (wider.num_classes, wider.input_chw) == (4, (3, 8, 8))
    assert wider.facts_hash not in (variant.facts_hash, baseline.facts_hash)
    own = {one.name: count(build(one, device="meta").model, (1, 3, 8, 8)).params for one in (wider, baseline)}
    assert own[wider.name] > own["tiny"]
    assert said == []
    # The first networks were all faster: the reach grew.
    assert max(ratios[name] for name in clock.calls[0][1:]) < 3.7


def test_the_toml_says_who_made_it(pair, clock, tmp_path):
    as_slow(pair, tmp_path / "out")
    text = (tmp_path / "out/equal-time/se_tiny-vs-tiny.toml").read_text()
    assert text.startswith('family = "equal_time"\nsource = "selab compare tiny se_tiny --equal-time"\n')


def test_a_variant_with_changes_names_a_file_that_can_be_read(pair, clock, tmp_path):
    changed = fitted(catalog.find(f"{tmp_path / 'tiny.toml'}:se_tiny+init=identity"), images())
    (wider, deeper), _ = as_slow((changed, pair[1]), tmp_path / "out")
    for one in (wider, deeper):
        assert one.file == str(tmp_path / "out/equal-time/se_tiny+init=identity-vs-tiny.toml")
        assert catalog.find(fixed_address(one)).facts_hash == catalog.find(f"{one.file}:{one.name}").facts_hash


def test_what_was_measured_is_kept(pair, clock, tmp_path):
    first, _ = as_slow(pair, tmp_path / "out")
    clock.calls.clear()
    again, _ = as_slow(pair, tmp_path / "out")
    assert clock.calls == []
    assert [one.facts_hash for one in again] == [one.facts_hash for one in first]


def test_one_kind_alone_is_as_slow(pair, clock, tmp_path):
    clock.blocks = 1.34
    (deeper,), said = as_slow(pair, tmp_path / "out")
    assert deeper.name == "deeper_1"
    (line,) = said
    assert re.fullmatch(
        r"tiny: of \d+ tried, up to x \d\.\d\d of the MACs, no width takes as long as se_tiny, x 1\.340; the nearest, "
        r"width_\w+, takes x 1\.234",
        line,
    )


def test_no_network_is_as_slow(pair, clock, tmp_path):
    clock.blocks = 400.0
    told = r"--equal-time: tiny: of \d+ tried, .*no width .*; tiny: of \d+ tried, .*no depth takes .* se_tiny, x 400"
    for _ in range(2):
        with pytest.raises(SelabError, match=told):
            as_slow(pair, tmp_path / "out")
    tried = json.loads((tmp_path / "out/equal-time/se_tiny-vs-tiny.json").read_text())["tried"]
    assert max(one["macs"] for one in tried) > 10 * min(one["macs"] for one in tried)


def test_what_lies_there_is_of_other_networks(pair, clock, tmp_path):
    as_slow(pair, tmp_path / "out")
    variant, baseline = pair
    other = msgspec.structs.replace(variant, num_classes=5)
    with pytest.raises(RecordError, match=r"se_tiny-vs-tiny.json: is of other networks or other images; delete it"):
        as_slow((other, msgspec.structs.replace(baseline, num_classes=5)), tmp_path / "out")
    (tmp_path / "out/equal-time/se_tiny-vs-tiny.json").write_text("{")
    with pytest.raises(RecordError, match=r"se_tiny-vs-tiny.json: .*delete it"):
        as_slow(pair, tmp_path / "out")


def test_a_variant_that_is_another_network_is_refused(pair, clock, tmp_path):
    with pytest.raises(SelabError, match="--equal-time: tiny is not tiny with blocks; name such a pair"):
        as_slow((pair[1], pair[1]), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_network_without_a_time_is_named(pair, clock, tmp_path, monkeypatch):
    monkeypatch.setattr(equal_time, "times", lambda job, archs, report: ({archs[0]: latency_of(1.2)}, ()))
    with pytest.raises(SelabError, match=r"--equal-time: .* could not be timed"):
        as_slow(pair, tmp_path / "out")
    assert not (tmp_path / "out/equal-time/se_tiny-vs-tiny.json").exists()
