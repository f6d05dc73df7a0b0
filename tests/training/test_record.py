import math

import msgspec
import pytest

from selab.errors import RecordError
from selab.records.store import file_name, partial_path
from selab.records.types import Machine
from selab.training import record as training_record
from selab.training.recipe import recipes
from selab.training.record import (
    Accuracy,
    AccuracyRecord,
    DataSpec,
    Epoch,
    Options,
    Seed,
    SeedOutcome,
    accuracy_path,
    read_accuracy_record,
    save_accuracy_record,
    warnings_of,
)


def outcome(top1_correct=9000, **fields):
    plain = {"images": 10_000, "top1_correct": top1_correct, "top5_correct": 9900, "loss": 0.3}
    epoch = Epoch(
        epoch=1,
        lr=0.1,
        train_loss=1.5,
        train_top1_pct=45.0,
        test_loss=1.2,
        test_top1_pct=55.0,
        test_top5_pct=95.0,
        seconds=20.0,
        images_per_s=2500.0,
    )
    known = {
        "seconds": 45.0,
        "images_per_s": 2500.0,
        "torch": "",
    }
    last = {"test_top1_pct": 100 * top1_correct / 10_000, "test_loss": 0.3}
    top5_correct = fields.get("top5_correct", 9900)
    last["test_top5_pct"] = None if top5_correct is None else top5_correct / 100
    if top5_correct is None:
        epoch = msgspec.structs.replace(epoch, test_top5_pct=None)
    known["epochs"] = (epoch, msgspec.structs.replace(epoch, epoch=2, **last))
    changed = {**known, **{name: value for name, value in fields.items() if name in known}}
    test = {**plain, **{name: value for name, value in fields.items() if name not in known}}
    return SeedOutcome(test=Accuracy(**test), **changed)


def record_of(*seeds, complete=True, classes=10, **fields):
    known = {
        "selab": "0.1.0",
        "arch": "se_x",
        "baseline": "x",
        "origin": "",
        "baseline_origin": "",
        "facts_hash": "a" * 12,
        "baseline_facts_hash": "b" * 12,
        "created": "2026-01-02T03:04:05+00:00",
        "command": "selab compare --arch se_x",
        "data": DataSpec(
            name="cifar10",
            title="CIFAR-10",
            sha256="c" * 64,
            official=True,
            num_classes=classes,
            input_chw=(3, 32, 32),
            train_size=50_000,
            test_size=10_000,
        ),
        "recipe": of_two_epochs(next(iter(recipes().values()))),
        "options": Options(),
        "machine": Machine(
            name="m-2c",
            cpu="M",
            cores=2,
            memory_bytes=1,
            gpu=None,
            gpu_memory_bytes=None,
            driver=None,
            system="Linux",
            python="3.11",
            libraries={"torch": "2.13"},
        ),
    }
    return AccuracyRecord(seeds=seeds, complete=complete, **{**known, **fields})


def of_two_epochs(recipe):
    return msgspec.structs.replace(recipe, epochs=2)


def pair(seed, **fields):
    return Seed(seed=seed, baseline=outcome(**fields), variant=outcome(9089, **fields))


@pytest.fixture
def finished():
    return record_of(pair(0), pair(1))


def test_json_and_back_for_every_recipe(finished):
    for recipe in recipes().values():
        record = msgspec.structs.replace(finished, recipe=of_two_epochs(recipe))
        raw = training_record.to_json(record)
        assert training_record.from_json(raw, where="x") == record
    assert raw.endswith(b"\n")
    # Two epochs of two networks from two seeds, a line each.
    assert raw.count(b'{"epoch": ') == 8
    assert sum(line.strip().startswith(b'{"epoch": ') for line in raw.splitlines()) == 8


def test_what_is_computed_is_not_stored(finished):
    raw = training_record.to_json(finished)
    assert not [word for word in (b"mean", b"interval", b"deviation", b"verdict", b"half_width") if b'"' + word in raw]


def test_an_accuracy_and_what_it_may_be():
    test = outcome().test
    assert (test.top1_pct, test.top5_pct) == (90.0, 99.0)
    # p = 0.9, n = 10,000, z² = 3.8415: (p + z²/2n ± z sqrt(p (1 - p) / n + z²/4n²)) / (1 + z²/n).
    scale, z = 1 + 3.841459 / 1e4, 1.959964
    centre, half = 0.9 + 3.841459 / 2e4, z * math.sqrt(0.09 / 1e4 + 3.841459 / 4e8)
    expected = (100 * (centre - half) / scale, 100 * (centre + half) / scale)
    assert test.top1_interval_pct == pytest.approx(expected, rel=1e-6)
    low, high = test.top5_interval_pct
    assert low < 99.0 < high
    few = outcome(top5_correct=None).test
    assert (few.top5_pct, few.top5_interval_pct) == (None, None)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "x.json: not a record"),
        (b"[]", "x.json: schema is None, which no record of selab has; name a file with 'selab.accuracy/1'"),
        (
            b'{"schema": "selab.profile/1"}',
            "is a record of another kind, 'selab.profile/1'; expected 'selab.accuracy/1'",
        ),
        (b'{"schema": "selab.accuracy/1", "kind": "accuracy"}', "x.json: Object missing required field"),
    ],
)
def test_what_is_no_record(raw, message):
    with pytest.raises(RecordError, match=message):
        training_record.from_json(raw, where="x.json")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b'"selab": "0.1.0"', b'"selab": "0.1.0", "mean": 91', "unknown field `mean`"),
        (b'"kind": "accuracy"', b'"kind": "profile"', "Invalid enum value 'profile'"),
        (b'"images": 10000', b'"images": 10000, "top1_pct": 90.0', "unknown field `top1_pct`"),
        (b'"train_loss": 1.5', b'"train_los": 1.5', r"missing required field|unknown field `train_los`"),
        (b'"loss": 0.3', b'"loss": null', r"test.loss: is None; a mean cross entropy is finite"),
    ],
)
def test_fields_are_strict(finished, old, new, message):
    raw = training_record.to_json(finished)
    assert old in raw
    with pytest.raises(RecordError, match=message):
        training_record.from_json(raw.replace(old, new, 1), where="x.json")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (lambda: record_of(pair(3), pair(3)), r"seeds: \[3, 3\] name one twice"),
        (lambda: record_of(), "complete: is true without a seed"),
        (lambda: record_of(pair(0), Seed(seed=1, baseline=outcome())), r"complete: is true, but seeds \[1\] are"),
        (lambda: record_of(pair(0), pair(1, images=9999)), r"seeds: tested on \[9999, 10000\] images"),
        (
            lambda: record_of(pair(0, images=10_001)),
            r"seeds\[0\].baseline.test.images: is 10001, the data set has 10000",
        ),
        (lambda: record_of(pair(0, images=0, top5_correct=0)), "test.images: is 0, the data set"),
        (lambda: record_of(pair(0, top5_correct=8999)), "baseline.test.top1_correct: is 9000, top-5 8999, of 10000"),
        (lambda: record_of(pair(0, top5_correct=10_001)), "top-5 10001, of 10000 images"),
        (lambda: record_of(pair(0, top5_correct=None)), "test.top5_correct: is None of 10 classes; counted from 6 on"),
        (lambda: record_of(pair(0), classes=5), "test.top5_correct: is 9900 of 5 classes"),
        (
            lambda: record_of(pair(0), Seed(seed=1, variant=outcome(-1)), complete=False),
            r"seeds\[1\].variant.test.top1_c",
        ),
        (lambda: record_of(pair(0, loss=-0.1)), "test.loss: is -0.1; a mean cross entropy"),
        (lambda: record_of(pair(0, seconds=0.0)), "baseline.seconds: is 0.0, no positive number"),
        (lambda: record_of(pair(0, images_per_s=-1.0)), "baseline.images_per_s: is -1.0, no positive number"),
    ],
)
def test_counts_that_cannot_be(record, message, tmp_path):
    with pytest.raises(RecordError, match=message):
        training_record.from_json(training_record.to_json(record()), where="x.json")
    with pytest.raises(RecordError, match=message):
        save_accuracy_record(record(), tmp_path / "a.json")
    assert not list(tmp_path.iterdir())


def test_a_diverged_seed_is_settled_and_no_pair():
    diverged = Seed(seed=1, baseline_diverged="x, epoch 1: the loss is nan", variant=outcome())
    record = record_of(pair(0), diverged)
    read = training_record.from_json(training_record.to_json(record), where="x")
    assert read == record
    assert [each.settled for each in read.seeds] == [True, True]
    assert [each.pair is None for each in read.seeds] == [False, True]
    half = Seed(seed=1, baseline_diverged="x, epoch 1: the loss is nan")
    with pytest.raises(RecordError, match=r"complete: is true, but seeds \[1\] are unfinished"):
        training_record.from_json(training_record.to_json(record_of(pair(0), half)), where="x")
    both = msgspec.structs.replace(pair(0), variant_diverged="x: the loss is nan")
    with pytest.raises(RecordError, match=r"seeds\[0\].variant_diverged: is 'x: the loss is nan', but variant has"):
        training_record.from_json(training_record.to_json(record_of(both)), where="x")


def test_a_record_from_before_divergence_was_kept_is_read(finished):
    raw = training_record.to_json(finished)
    lines = [line for line in raw.splitlines() if b"_diverged" not in line]
    old = b"\n".join(lines).replace(b"},\n  }", b"}\n  }")
    assert len(lines) < len(raw.splitlines())
    assert training_record.from_json(old, where="x") == finished


def test_a_reader_is_warned():
    data = record_of(complete=False).data
    alike = Seed(seed=0, baseline=outcome(torch="2.13"), variant=outcome(torch="2.13"))
    unknown = pair(1)
    assert warnings_of((alike, unknown), data) == warnings_of((), data) == ()
    other = Seed(seed=2, baseline=outcome(torch="2.14"), variant=outcome(torch="2.13"))
    assert warnings_of((alike, unknown, other), data) == (
        "not all were trained under the same version of torch: 2.13 (seed 0, 2); 2.14 (seed 2)",
    )
    unread = pair(0, images=9998, skipped=("val/a.jpg", "val/b.jpg"))
    assert warnings_of((unread,), data) == ("2 of 10,000 test images could not be read (val/a.jpg, val/b.jpg)",)


def test_below_six_classes_there_is_no_top5():
    record = record_of(pair(0, top5_correct=None), classes=5)
    assert training_record.from_json(training_record.to_json(record), where="x") == record


def test_where_a_record_goes(tmp_path):
    asked = {"machine": "m-2c", "arch": "se_x+reduction=8", "data": "cifar10", "recipe": "short"}
    assert accuracy_path(tmp_path, against=None, **asked) == (
        tmp_path / "m-2c" / "accuracy" / "se_x+reduction=8.cifar10.short.json"
    )
    other = accuracy_path(tmp_path, against="timm:y", **asked)
    assert other.name == "se_x+reduction=8-vs-timm-y.cifar10.short.json"


def test_records_of_long_names_have_files_of_their_own(tmp_path):
    names = [f"resnet50+sites={'+'.join(f'layer{stage}.{block}.bn3' for block in range(41))}" for stage in (1, 2)]
    paths = [
        accuracy_path(tmp_path, machine="m", arch=name, against=None, data="cifar10", recipe="short") for name in names
    ]
    assert all(path.name.startswith("resnet50+sites=layer") and len(path.name) < 160 for path in paths)
    assert paths[0] != paths[1]
    # Those that differ only behind the cut, too.
    assert file_name(names[0] + "0") != file_name(names[0])


def test_a_killed_comparison_keeps_its_seeds(tmp_path, finished):
    path = tmp_path / "accuracy" / "se_x.cifar10.short.json"
    begun = record_of(pair(0), Seed(seed=1, baseline=outcome()), complete=False)
    assert save_accuracy_record(begun, path) == partial_path(path)
    assert not path.exists()
    assert read_accuracy_record(partial_path(path)) == begun
    assert save_accuracy_record(finished, path) == path
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    # Begun again, it does not take the place of the one that is complete.
    save_accuracy_record(begun, path)
    assert read_accuracy_record(path) == finished


def test_saved_whole_or_not_at_all(tmp_path, finished, monkeypatch):
    path = tmp_path / "a.json"
    save_accuracy_record(finished, path)
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(RecordError, match="cannot be written: No space left on device; the file is as it was"):
        save_accuracy_record(finished, path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


def test_a_diverged_training_is_no_record(tmp_path):
    # JSON has no NaN: it would be written as null and could not be read again.
    with pytest.raises(RecordError, match=r"test.loss: is None; a mean cross entropy is finite"):
        save_accuracy_record(record_of(pair(0, loss=math.nan)), tmp_path / "a.json")
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(RecordError, match=r"gone.json: cannot be read: No such file"):
        read_accuracy_record(tmp_path / "gone.json")


class TestEpochs:
    """The curve of a finished training has every epoch of its recipe, once and in order, and ends at its test."""

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda one: {"epochs": one.epochs[:1]}, r"epochs: holds 1, the recipe has 2"),
            (lambda one: {"epochs": ()}, r"epochs: holds 0, the recipe has 2"),
            (lambda one: {"epochs": (*one.epochs, one.epochs[1])}, r"epochs: holds 3, the recipe has 2"),
            (lambda one: {"epochs": one.epochs[::-1]}, r"epochs\[0\].epoch: is 2, expected 1 of 2"),
            (lambda one: {"epochs": (one.epochs[0],) * 2}, r"epochs\[1\].epoch: is 1, expected 2 of 2"),
            (lambda one: {"epochs": first(one, train_top1_pct=100.1)}, r"epochs\[0\].train_top1_pct: is 100.1"),
            (lambda one: {"epochs": first(one, test_top1_pct=-0.1)}, r"epochs\[0\].test_top1_pct: is -0.1"),
            (lambda one: {"epochs": first(one, test_top5_pct=None)}, r"epochs\[0\].test_top5_pct: is None of 10"),
            (lambda one: {"epochs": last(one, test_top1_pct=91.0)}, r"epochs\[1\].test_top1_pct: is 91.0, the last"),
            (
                lambda one: {"epochs": last(one, test_loss=0.4)},
                r"epochs\[1\].test_loss: is 0.4, the last",
            ),
        ],
    )
    def test_curves_that_cannot_be(self, change, message):
        whole = outcome()
        record = record_of(Seed(seed=0, baseline=msgspec.structs.replace(whole, **change(whole)), variant=whole))
        with pytest.raises(RecordError, match=rf"x.json: seeds\[0\].baseline.{message}"):
            training_record.from_json(training_record.to_json(record), where="x.json")


def first(one, **changes):
    return (msgspec.structs.replace(one.epochs[0], **changes), *one.epochs[1:])


def last(one, **changes):
    return (*one.epochs[:-1], msgspec.structs.replace(one.epochs[-1], **changes))
