"""Committed records, with one value changed: what no count gives is refused in one line that names the field."""

import json

import pytest

from selab.errors import RecordError, SpecError
from selab.experiments.tax_record import read_tax_record
from selab.models.spec import parse_family
from selab.records.store import read_acceptance, read_record
from selab.training.record import read_accuracy_record

PROFILE = "intel-xeon-2c/se_resnet50.cpu-b1-224-fp32-held-t1.json"
TAX = "amd-epyc-2c/tax/se_resnet50.cpu-b1-224-fp32-held-t1.forward.json"
ACCURACY = "nvidia-h100-80gb-hbm3/accuracy/se_small_cnn.cifar10.keras_cnn-e25.json"


@pytest.fixture
def changed(root, tmp_path):
    """Write a committed record with another value at a path; return the new file."""

    def write(name, path, value):
        record = json.loads((root / "profiles" / name).read_text())
        inner = record
        for key in path[:-1]:
            inner = inner[next(iter(inner)) if key == "FIRST" else key]
        last = next(iter(inner)) if path[-1] == "FIRST" else path[-1]
        inner[last] = value(inner[last]) if callable(value) else value
        file = tmp_path / "changed.json"
        file.write_text(json.dumps(record))
        return file

    return write


def refused(read, file, words):
    with pytest.raises(RecordError) as caught:
        read(file)
    message = str(caught.value)
    assert message.startswith(f"{file}: ")
    assert words in message
    assert "\n" not in message
    assert len(message) < 400


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("cost", "params"), -5, "cost.params: is -5, expected 0 or more"),
        (("cost", "params"), 2**63, "cost.params: "),
        (("cost", "buffer_elements"), -1, "cost.buffer_elements: is -1"),
        (("cost", "macs", "conv_linear"), -1, "cost.macs_conv_linear: is -1"),
        (("cost", "macs", "all"), 1, "cost.macs.conv_linear: is "),
        (("cost", "macs", "paper"), 1, "cost.macs.paper: is 1, less than conv_linear"),
        (("cost", "macs", "all"), lambda all_: all_ + 1, "cost.by_operator: its macs are"),
        (("cost", "macs_backward", "paper"), -1, "cost.macs_backward_paper: is -1"),
        (("cost", "flops"), lambda flops: flops - 1, "cost.by_operator: its flops are"),
        (("cost", "bytes"), lambda size: size + 4, "cost.by_operator: its bytes are"),
        (("cost", "activations"), -1, "cost.activations: is -1"),
        (("cost", "by_operator", "FIRST", "calls"), -3, ".calls: is -3"),
        (("cost", "by_operator", "FIRST", "macs"), -3, ".macs: is -3"),
        (("cost", "se", "blocks"), -1, "cost.se.blocks: is -1"),
        (("cost", "se", "blocks"), 0, "cost.se.params: is"),
        (("cost", "se", "params"), 10**12, "cost.se.params: is 1000000000000, the whole network has"),
        (("cost", "se", "squeeze", "macs"), 10**15, "cost.se: its stages have"),
        (("cost", "se", "scale", "bytes"), -1, "cost.se.scale.bytes: is -1"),
        (("cost", "unknown"), {"aten::odd": 0}, "cost.unknown.aten::odd: is 0, expected at least 1 call"),
        (
            ("cost", "counters", "FIRST", "total"),
            lambda total: total + 1,
            "ours with all differences and the remainder",
        ),
        (("cost", "counters", "FIRST", "ours"), -1, ".ours: is -1, the cost gives"),
        (("baseline_cost", "params"), -5, "baseline_cost.params: is -5"),
        (("insertions", 0, "channels"), 0, "insertions[0].channels: is 0, expected at least 1"),
        (("insertions", 0, "params"), -1, "insertions[0].params: is -1"),
        (("insertions", 0, "params"), 10**12, "insertions: have"),
        (("insertions", 0, "squeeze_channels"), 0, "insertions[0].squeeze_channels: is 0"),
        (("workload", "batch"), 0, "workload.batch: is 0"),
        (("workload", "threads"), -1, "workload.threads: is -1"),
        (("workload", "input_chw"), [3, 0, 224], "workload.input_chw: is (3, 0, 224)"),
        (("machine", "cores"), 0, "machine.cores: is 0"),
        (("machine", "memory_bytes"), -1, "machine.memory_bytes: is -1"),
        (("latency", "FIRST", "target_half_width"), -1.0, "target_half_width: is -1.0"),
        (("latency", "FIRST", "runs", 0, "calls_per_sample"), 0, "runs[0].calls_per_sample: is 0"),
        (("latency", "FIRST", "runs", 0, "warmup_calls"), -1, "runs[0].warmup_calls: is -1"),
        (("latency", "FIRST", "runs", 0, "elapsed_s"), -1.0, "runs[0].elapsed_s: is -1.0"),
    ],
)
def test_a_profile(changed, path, value, words):
    refused(read_record, changed(PROFILE, path, value), words)


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("blocks", 0, "height"), 0, "blocks[0].height: is 0"),
        (("bandwidths", 0), [0, 1.0], "bandwidths[0]: is (0, 1.0)"),
        (("bandwidths", 0), [1024, -1.0], "bandwidths[0]: is (1024, -1.0)"),
        (("profiled", "total_s"), -1.0, "profiled.total_s: is -1.0"),
        (("profiled", "total_s"), 1e-9, "profiled: its stages take"),
        (("profiled", "stages", "FIRST"), -1.0, "expected 0 or more seconds"),
        (("saved_for_backward_bytes",), {"baseline": -1}, "saved_for_backward_bytes.baseline: is -1"),
        (("workload", "batch"), -1, "workload.batch: is -1"),
    ],
)
def test_a_tax_record(changed, path, value, words):
    refused(read_tax_record, changed(TAX, path, value), words)


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("seeds", 0, "variant", "epochs", 0, "train_top1_pct"), 101.0, "epochs[0].train_top1_pct: is 101.0"),
        (("seeds", 0, "variant", "epochs", 0, "test_loss"), -1.0, "epochs[0].test_loss: is -1.0"),
        (("seeds", 0, "baseline", "epochs", 1, "epoch"), 7, "epochs[1].epoch: is 7, expected 2"),
        (("seeds", 0, "baseline", "epochs", 1, "lr"), -0.1, "epochs[1].lr: is -0.1"),
        (("seeds", 0, "variant", "test", "top1_correct"), -1, "test.top1_correct: is -1"),
        (("data", "num_classes"), 0, "data.num_classes: is 0"),
        (("data", "test_size"), -1, "data.test_size: is -1"),
        (("options", "accumulate"), 0, "options.accumulate: is 0"),
        (("machine", "cores"), -1, "machine.cores: is -1"),
    ],
)
def test_an_accuracy_record(changed, path, value, words):
    refused(read_accuracy_record, changed(ACCURACY, path, value), words)


@pytest.mark.parametrize(
    ("name", "path", "value", "words"),
    [
        ("intel-xeon-2c/acceptance/aa.json", ("trials",), -1, "intervals_holding_one: is"),
        ("intel-xeon-2c/acceptance/aa.json", ("median_error",), -0.1, "median_error: is -0.1"),
        ("intel-xeon-2c/acceptance/counts.json", ("comparisons", "FIRST", "ratio"), 7.0, "ratio is stored as 7.0"),
        ("amd-epyc-2c/acceptance/data.json", ("comparisons", "FIRST", "ratio"), 7.0, "ratio is stored as 7.0"),
        ("amd-epyc-2c/acceptance/roofline.json", ("networks", 0, "least_s"), 0.0, "least_s: is 0.0"),
    ],
)
def test_an_acceptance_record(changed, tmp_path, name, path, value, words):
    file = changed(name, path, value)
    place = tmp_path / "machine" / "acceptance" / name.rpartition("/")[2]
    place.parent.mkdir(parents=True)
    file.rename(place)
    with pytest.raises(RecordError) as caught:
        read_acceptance(tmp_path / "machine")
    assert words in str(caught.value)
    assert str(place) in str(caught.value)


FAMILY = """
family = "f"
source = "this test"
builder = "nets:build"
input_chw = [3, 8, 8]
num_classes = 2
"""


@pytest.mark.parametrize(
    ("baselines", "circle"),
    [
        ({"a": "b", "b": "a"}, "a → b → a"),
        ({"a": "a"}, "a → a"),
        ({"a": "b", "b": "c", "c": "d", "d": "b"}, "b → c → d → b"),
    ],
)
def test_cyclic_baselines_are_refused(baselines, circle):
    text = FAMILY + "".join(f'[variants.{a}]\ntitle = "{a}"\nbaseline = "{b}"\n' for a, b in baselines.items())
    with pytest.raises(SpecError, match=rf"f\.toml: variants\..\.baseline: a circle, {circle}"):
        parse_family(text, origin="f.toml")


def test_a_chain_of_baselines_is_none():
    text = FAMILY + '[variants.a]\ntitle = "a"\nbaseline = "b"\n[variants.b]\ntitle = "b"\nbaseline = "c"\n'
    assert list(parse_family(f'{text}[variants.c]\ntitle = "c"\n', origin="f.toml")) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("metric", "value"),
    [
        ("params", "nan"),
        ("params", "-1.0"),
        ("macs", "inf"),
        ("top1_error_pct", "-0.1"),
        ("top1_error_pct", "100.5"),
        ("top5_error_pct", "nan"),
        ("forward_s", "-inf"),
    ],
)
def test_published_values_that_cannot_be(metric, value):
    text = f'{FAMILY}[variants.a]\ntitle = "a"\n[[variants.a.published]]\nmetric = "{metric}"\nvalue = {value}\n'
    with pytest.raises(SpecError, match=r"f\.toml: variants\.a\.published(\[0\]|\.0)\.value: .*; "):
        parse_family(f'{text}source = "s"\nwhere = "w"\n', origin="f.toml")
