"""`selab tax`, from the words of the command to the record, its tables and its picture."""

import json
import re
import shutil

import pytest
import torch
from torch import nn

from selab.attention.se import SqueezeExcitation
from selab.bench import runner
from selab.errors import InsertionError, UnknownNameError
from selab.experiments import profiling
from selab.experiments import tax as experiments_tax
from selab.experiments.job import Request
from selab.experiments.tax_record import ALL, read_tax_record
from selab.kernels.deferred_bn import DeferredNorm
from selab.kernels.residual import FusedJoin
from selab.models import provenance

QUICK = ("--budget", "0.2")
WITH_BLOCKS = """
from torch import nn


class SEModule(nn.Module):
    __module__ = "timm.layers.squeeze_excite"

    def __init__(self, channels):
        super().__init__()
        self.fc1 = nn.Conv2d(channels, 2, 1)
        self.act = nn.ReLU(inplace=True)
        self.fc2 = nn.Conv2d(2, channels, 1)
        self.gate = nn.Sigmoid()

    def forward(self, x):
        return x * self.gate(self.fc2(self.act(self.fc1(x.mean((2, 3), keepdim=True)))))


class EcaModule(nn.Identity):
    __module__ = "timm.layers.eca"


def built(first, last):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), first, nn.Conv2d(8, 16, 3, stride=2), last, nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(16, 4)
    )


def net():
    return built(SEModule(8), SEModule(16))


def mixed():
    return built(SEModule(8), EcaModule())


def tanh():
    model = net()
    model[3].gate = nn.Tanh()
    return model


def other():
    return built(EcaModule(), EcaModule())


def bare():
    return built(nn.Identity(), nn.Identity())
"""
SMALL = {"input_chw": (3, 16, 16)}


def request(arch, **changes):
    return experiments_tax.TaxRequest(request=Request(arch=arch, phases=("forward",), **changes))


@pytest.fixture
def with_blocks(tmp_path):
    """A user's file: its networks bring along blocks of classes that are named as timm's."""
    path = tmp_path / "own.py"
    path.write_text(WITH_BLOCKS)
    return path


def has_direct_result(record):
    """Whether fused over reference has a result; so short a measurement on a busy machine may have none."""
    return record.latency("fast", over="reference", method="wall").verdict_kind != "no_result"


def record_in(folder):
    (path,) = folder.glob("*/tax/*.json")
    return path, read_tax_record(path)


# ------------------------------------------------------------------------------------------------------ what is asked


def test_the_command_asks_for_the_same():
    asked = request("se_small_cnn", batch=8, quick=True, threads=2)
    assert asked.command == "selab tax --arch se_small_cnn --batch 8 --threads 2 --quick --phase forward"
    few = experiments_tax.TaxRequest(request=asked.request, implementations=("reference", "fast"))
    assert few.command == asked.command + " --impl reference --impl fused"


def test_implementations_stand_in_one_order_and_all_by_default():
    assert experiments_tax.chosen_implementations(()) == ALL
    # Records call the fused implementation "fast", and the commands in them do.
    for names in (("fast", "reference", "fast"), ("fused", "reference", "fast"), ("fused", "reference")):
        assert experiments_tax.chosen_implementations(names) == ("reference", "fast")
    with pytest.raises(UnknownNameError, match="--impl fusedd: no such implementation; did you mean fused"):
        experiments_tax.chosen_implementations(("fusedd",))
    with pytest.raises(InsertionError, match="compared with the reference; add --impl reference"):
        experiments_tax.chosen_implementations(("without_scale",))


def test_stages_are_left_out_against_the_reference():
    pairs = experiments_tax._pairs(ALL)
    assert pairs[0] == ("baseline", "again")
    assert ("reference", "without_squeeze") in pairs
    assert ("reference", "fast") in pairs
    assert ("baseline", "timm") in pairs
    assert len(pairs) == len(set(pairs)) == 10
    assert ("reference", "fast") not in experiments_tax._pairs(("fast",))


@pytest.mark.parametrize("arch", ["se_small_cnn+squeeze=max", "se_small_cnn+block=eca"])
def test_a_block_that_others_do_not_write_is_refused(arch):
    with pytest.raises(InsertionError, match="only the paper's block can be compared"):
        experiments_tax.Tax(request(arch))


def test_the_networks_share_their_weights_and_are_in_the_phase_s_mode():
    tax = experiments_tax.Tax(request("se_small_cnn"))
    made = {name: make() for name, make in tax._networks(ALL).items()}
    assert list(made) == ["baseline", "again", "plain", *ALL]
    first = {name: model.state_dict()["block1.conv1.conv.weight"] for name, model in made.items()}
    assert all(weight.equal(first["baseline"]) for weight in first.values())
    assert not any(model.training for model in made.values())
    reference = [type(module) for module in made["reference"].modules()]
    assert SqueezeExcitation in reference
    assert SqueezeExcitation not in [type(module) for module in made["timm"].modules()]


def test_what_stands_around_the_blocks_gets_the_same_care_in_all_networks():
    tax = experiments_tax.Tax(request("se_resnet20_cifar"))
    deferred, joined = 19, 9  # ResNet-20: a stem, nine blocks of two; nine joins
    for name, make in tax._networks(ALL).items():
        kinds = [type(module) for module in make().modules()]
        # A BatchNorm before a block that is not the fast one is read by that block.
        expected = {"plain": 0, "baseline": deferred, "again": deferred, "fast": deferred}.get(name, deferred - 9)
        assert sum(issubclass(kind, DeferredNorm) for kind in kinds) == expected, name
        assert kinds.count(FusedJoin) == (0 if name == "plain" else joined), name


def test_nothing_is_measured_that_a_compiler_would_remove():
    asked = experiments_tax.TaxRequest(request=Request(arch="se_small_cnn", phases=("forward",), compiled=True))
    assert experiments_tax.Tax(asked)._implementations() == ALL[:-1]
    assert experiments_tax.Tax(request("se_small_cnn"))._implementations() == ALL


# ----------------------------------------------------------------------------------- blocks that a network brings along


def test_a_network_that_brings_blocks_along_is_held_against_itself_without_them(with_blocks):
    tax = experiments_tax.Tax(request(f"{with_blocks}:net", **SMALL))
    assert tax.implementations == ("reference", "fast")
    assert [(one.path, one.channels, one.squeeze_channels, one.height, one.width) for one in tax.blocks] == [
        ("1", 8, 2, 14, 14),
        ("3", 16, 2, 6, 6),
    ]
    assert [one.params for one in tax.blocks] == [2 * 8 * 2 + 2 + 8, 2 * 16 * 2 + 2 + 16]
    assert tax.blocks[0].macs == 8 * 14 * 14 + 2 * 8 * 2 + 2 + 8 + 8 * 14 * 14
    made = {name: make() for name, make in tax._networks(tax.implementations).items()}
    assert list(made) == ["baseline", "again", "plain", "reference", "fast"]
    for name in ("baseline", "again", "plain"):
        assert [type(made[name][index]) for index in (1, 3)] == [nn.Identity, nn.Identity]
    assert [type(made[name][1]).__name__ for name in ("reference", "fast")] == ["SEModule", "SEModule"]
    assert type(made["fast"][1]) is not type(made["reference"][1])
    first, *others = (model.state_dict() for model in made.values())
    assert all(other[key].equal(value) for other in others for key, value in first.items())
    example = torch.randn(1, 3, 16, 16)
    with torch.inference_mode():
        torch.testing.assert_close(made["fast"](example), made["reference"](example))
        bare = nn.Sequential(*(made["reference"][index] for index in (0, 2, 4, 5, 6)))
        torch.testing.assert_close(made["baseline"](example), bare(example))


def test_blocks_that_fuse_does_not_know_stay_and_are_told(with_blocks):
    tax = experiments_tax.Tax(request(f"{with_blocks}:mixed", **SMALL))
    assert [one.path for one in tax.blocks] == ["1"]
    assert tax._left_in == "unknown to selab.fuse and left in every network: 1 EcaModule"
    assert type(tax._networks(())["baseline"]()[3]).__name__ == "EcaModule"


def test_a_block_without_a_fast_way_is_left_out_of_the_baseline_too_and_its_reason_told(with_blocks):
    tax = experiments_tax.Tax(request(f"{with_blocks}:tanh", **SMALL))
    networks = tax._networks(tax.implementations)
    assert type(networks["baseline"]()[3]) is nn.Identity
    networks["fast"]()
    assert "fused squeeze and scale of 1 block: unsupported gate: Tanh" in tax._remarks["fast"]
    assert "1 run by" in tax._remarks["fast"]


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("other", {}, r"none of its built-in blocks is an SE block that selab.fuse knows \(2 EcaModule\)"),
        ("net", {"baseline": "resnet18", "input_chw": (3, 16, 16)}, "remove --baseline, --se and --insert"),
        ("net+sites=0,reduction=2", {}, "remove --baseline, --se and --insert"),
    ],
)
def test_what_a_network_with_blocks_of_its_own_cannot_be_asked(with_blocks, name, changes, message):
    with pytest.raises(InsertionError, match=message):
        experiments_tax.Tax(request(f"{with_blocks}:{name}", **(SMALL | changes)))


def test_other_implementations_of_blocks_that_are_brought_along_are_refused(with_blocks):
    for names, refused in ((("timm",), "timm"), (("reference", "without_scale"), "without_scale")):
        asked = experiments_tax.TaxRequest(
            request=request(f"{with_blocks}:net", **SMALL).request, implementations=names
        )
        with pytest.raises(InsertionError, match=f"--impl {refused}: .* --impl reference and --impl fused"):
            experiments_tax.Tax(asked)


def test_a_baseline_with_blocks_is_refused():
    with pytest.raises(InsertionError, match=r"--baseline se_resnet34: has SE blocks itself; .* `selab profile`"):
        experiments_tax.Tax(request("se_resnet18", baseline="se_resnet34"))


@pytest.mark.parametrize(
    ("arch", "step"),
    [
        ("small_cnn", "--arch se_small_cnn"),
        ("mobilenet_v3_small_no_se", "--arch mobilenet_v3_small"),
        ("{file}:bare", "--arch {file}:bare --insert auto"),
    ],
)
def test_a_network_without_blocks_is_told_how_to_come_by_some(with_blocks, arch, step):
    asked = request(arch.format(file=with_blocks))
    message = f"has no SE blocks .*`selab tax {re.escape(step.format(file=with_blocks))}`, .* --se or --insert$"
    with pytest.raises(InsertionError, match=message):
        experiments_tax.Tax(asked)


# -------------------------------------------------------------------------------------------------------- the command


@pytest.mark.usefixtures("quick_plans")
class TestTax:
    def test_the_record_and_what_is_shown_of_it(self, selab, toy, tmp_path):
        out = tmp_path / "out"
        status, shown, told = selab("tax", "--arch", f"{toy}:se_toy", *QUICK, "--out", out)
        assert status == 0, told
        for word in ("reference", "torchvision", "timm", "least", "excitation", "record:"):
            assert word in shown
        path, record = record_in(out)
        assert ("Time of fused over" in " ".join(shown.split())) == has_direct_result(record)
        assert path.name == "se_toy.cpu-b1-16-fp32-t1.forward.json"
        assert record.implementations == ALL
        assert record.methods == ("wall",)
        assert [block.channels for block in record.blocks] == [8, 16]
        assert all(pair.latency.runs and not pair.latency.error for pair in record.pairs)
        assert set(record.profiled.stages) == {"squeeze", "excitation", "scale"}
        assert record.saved_for_backward_bytes == {}
        assert record.remarks[0] == "baseline: folded 2 BatchNorms"
        assert "2 run by" in record.remarks[-1]
        assert f"{toy}:se_toy --threads 1 --budget 0.2 --phase forward" in record.command

    def test_a_training_step_tells_what_is_saved_for_backward(self, selab, toy, tmp_path):
        words = ("--impl", "reference", "--impl", "without_scale", "--phase", "forward_backward")
        status, shown, told = selab("tax", "--arch", f"{toy}:se_toy", *words, *QUICK, "--out", tmp_path / "out")
        assert status == 0, told
        assert "Saved for backward" in shown
        _, record = record_in(tmp_path / "out")
        saved = record.saved_for_backward_bytes
        assert list(saved) == ["baseline", "plain", "reference"]
        assert saved["reference"] > saved["baseline"] > 0

    def test_json_alone_on_standard_output_is_the_record(self, selab, toy, tmp_path):
        words = ("--impl", "timm", *QUICK, "--out", tmp_path / "out", "--json", "-")
        status, shown, _ = selab("tax", "--arch", f"{toy}:se_toy", *words)
        path, record = record_in(tmp_path / "out")
        assert (status, json.loads(shown)) == (0, json.loads(path.read_text()))
        assert record.profiled is None

    def test_a_network_with_blocks_of_its_own(self, selab, with_blocks, tmp_path):
        out = tmp_path / "out"
        words = ("--input", "3x16x16", *QUICK, "--out", out)
        status, shown, told = selab("tax", "--arch", f"{with_blocks}:net", *words)
        assert status == 0, told
        for word in ("reference", "least", "as the profiler sees it"):
            assert word in " ".join(shown.split())
        assert "by stage" not in shown
        path, record = record_in(out)
        assert ("Time of fused over" in " ".join(shown.split())) == has_direct_result(record)
        assert "-vs-" not in path.name
        assert record.bare
        assert record.baseline == f"{with_blocks}:net without its SE blocks"
        assert record.implementations == ("reference", "fast")
        assert [pair.variant for pair in record.pairs] == ["again", "plain", "reference", "fast", "fast"]
        assert list(record.profiled.stages) == ["whole block"]
        assert record.profiled.stages["whole block"] > 0
        assert "2 run by" in record.remarks[-1]
        assert provenance.name_of(record) == f"{with_blocks}:net"
        status, shown, told = selab("table", "tax", "--profiles", path.parent.parent, "--format", "csv")
        assert status == 0, told
        assert f"{with_blocks}:net," in shown
        picture = tmp_path / "tax.svg"
        status, _, told = selab("plot", "tax", "--record", path, "--out", picture)
        assert status == 0, told

    def test_a_held_heap_is_in_the_record_and_its_command(self, selab, toy, tmp_path, monkeypatch):
        held = []
        monkeypatch.setattr(runner, "hold_heap", lambda: held.append(True))
        words = ("--impl", "fast", "--hold-heap", *QUICK, "--out", tmp_path / "out")
        status, shown, told = selab("tax", "--arch", f"{toy}:se_toy", *words)
        assert status == 0, told
        _, record = record_in(tmp_path / "out")
        assert held
        assert record.workload.held_heap
        assert "--hold-heap" in record.command
        assert "heap held" in shown

    def test_an_existing_record_is_kept_unless_asked(self, selab, toy, tmp_path):
        words = ("tax", "--arch", f"{toy}:se_toy", "--impl", "fast", *QUICK, "--out", tmp_path / "out")
        assert selab(*words)[0] == 0
        status, _, told = selab(*words)
        assert status == 1
        assert "--replace" in told
        assert selab(*words, "--replace")[0] == 0

    def test_a_failing_implementation_is_a_row(self, selab, toy, tmp_path, monkeypatch):
        def failing(model, style):
            raise InsertionError("this style fails")

        monkeypatch.setattr(experiments_tax, "reimplement", failing)
        words = ("--impl", "reference", "--impl", "timm", *QUICK, "--out", tmp_path / "out")
        status, shown, told = selab("tax", "--arch", f"{toy}:se_toy", *words)
        assert status == 0, told
        assert "timm: failed: this style fails" in shown
        _, record = record_in(tmp_path / "out")
        assert record.latency("reference", method="wall").runs
        assert record.latency("timm", method="wall").error == "this style fails"

    def test_tables_and_pictures_of_records(self, selab, toy, tmp_path, monkeypatch, committed_costs):
        # A report also shows networks that were only counted.
        monkeypatch.setattr(profiling, "counted", lambda names: {name: committed_costs[name] for name in names})
        out = tmp_path / "out"
        assert selab("tax", "--arch", f"{toy}:se_toy", "--impl", "reference", *QUICK, "--out", out)[0] == 0
        path, record = record_in(out)
        folder = out / record.machine.name
        status, shown, told = selab("table", "tax", "--profiles", folder, "--format", "markdown")
        assert status == 0, told
        assert "### The SE tax (forward, batch 1" in shown
        words = ("--phase", "forward", "--budget", "0.2", "--threads", "1", "--out", out)
        assert selab("profile", "--arch", f"{toy}:se_toy", *words)[0] == 0
        status, shown, told = selab("table", "report", "--profiles", folder, "--format", "markdown")
        assert status == 0, told
        assert "### The SE tax (forward, batch 1" in shown
        for name in ("tax", "report"):
            above = selab("table", name, "--profiles", out, "--format", "markdown")
            assert above == selab("table", name, "--profiles", folder, "--format", "markdown")
        shutil.copytree(folder, out / "another")
        status, _, told = selab("table", "tax", "--profiles", out)
        assert (status, told.count("\n")) == (1, 1)
        assert f"its subfolders do: {', '.join(sorted((folder.name, 'another')))}" in told
        picture = tmp_path / "tax.svg"
        status, _, told = selab("plot", "tax", "--record", path, "--out", picture)
        assert status == 0, told
        assert "The SE tax of se_toy" in picture.read_text()

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (("--impl", "slow"), "--impl slow: no such implementation"),
            (("--baseline", "nothing"), "--baseline nothing"),
        ],
    )
    def test_mistakes(self, selab, toy, tmp_path, words, message):
        status, _, told = selab("tax", "--arch", f"{toy}:se_toy", *words, "--out", tmp_path)
        assert status == 1
        assert message in told
        assert "Traceback" not in told
