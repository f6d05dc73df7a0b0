"""The public functions: their examples run, their results print well, and they do what the commands do."""

import doctest
import inspect
import io
import math
import re
import subprocess
import sys
import types
from html.parser import HTMLParser
from pathlib import Path

import msgspec
import pytest
import torch
from rich.console import Console
from torch import nn

import selab
import selab.api
import selab.attention
from selab.attention.insertions import Insertions
from selab.errors import ModelError, RecordError, SelabError, SpecError, UnknownNameError
from selab.meta.real import real_copy
from selab.records.display import shown
from selab.records.types import Insertion, from_json, to_json

CHW = (1, 3, 16, 16)
PUBLIC = [name for name in selab.__all__ if name != "__version__"]


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3))


def text_of(value, width=100):
    out = io.StringIO()
    Console(width=width, file=out).print(value)
    return out.getvalue()


class Tags(HTMLParser):
    """Collects tags and text, and that every tag is closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.seen, self.words = [], set(), []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        self.seen.add(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture(scope="module")
def root():
    return Path(__file__).parent.parent


@pytest.fixture(scope="module")
def paths(root):
    found = {}
    for path in sorted((root / "profiles").rglob("*.json")):
        if path.parent.name in ("folding", "gates", "equal-time"):
            continue  # of trained gates, which `selab table gates` shows, and times that comparisons name
        head = msgspec.json.decode(path.read_bytes())
        if "schema" in head:
            found.setdefault(head["schema"].partition("/")[0].partition(".")[2], path)
    return found


# -------------------------------------------------------------------------------------------------------------- names
def test_every_public_name_is_there_and_nothing_else_is_shown():
    assert dir(selab) == sorted([*selab.__all__, "attention", "cost", "errors", "models"])
    assert sorted(set(selab.__all__)) == sorted(selab.__all__)
    for name in PUBLIC:
        assert getattr(selab, name).__name__ == name
    with pytest.raises(AttributeError, match="module 'selab' has no attribute 'cuont'"):
        selab.cuont  # noqa: B018


def test_every_error_is_public():
    from selab import errors

    kinds = {name for name, one in vars(errors).items() if isinstance(one, type) and issubclass(one, SelabError)}
    assert kinds <= set(selab.__all__)


@pytest.mark.parametrize("name", [name for name in PUBLIC if inspect.isfunction(getattr(selab, name))])
def test_the_examples_of_public_functions_run(name):
    run_examples(getattr(selab, name), name)


def test_the_example_of_registration_runs(monkeypatch):
    from selab.attention import config, registry

    monkeypatch.setattr(registry, "_CLASSES", dict(registry._CLASSES))
    known = dict(config.BLOCKS)
    try:
        run_examples(registry.register_block, "register_block")
    finally:
        config.BLOCKS.clear()
        config.BLOCKS.update(known)


def run_examples(function, name):
    tests = doctest.DocTestFinder(recurse=False).find(function, name)
    examples = [one for test in tests for one in test.examples]
    assert examples, f"{name} has no example"
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.FAIL_FAST)
    output = []
    for test in tests:
        runner.run(test, out=output.append)
    assert runner.summarize(verbose=False).failed == 0, "".join(output)


# ------------------------------------------------------------------------------------------------------------- build
def test_build_takes_names_files_and_blocks(tmp_path):
    (tmp_path / "mine.py").write_text("from torch import nn\ndef make(): return nn.Conv2d(3, 4, 3)\n")
    assert isinstance(selab.build(f"{tmp_path}/mine.py:make"), nn.Conv2d)
    same = [selab.build("small_cnn", seed=3).state_dict() for _ in range(2)]
    assert all(torch.equal(same[0][key], same[1][key]) for key in same[0])
    changed = selab.build("small_cnn", se="reduction=4,init=identity"), selab.build("se_small_cnn", init="identity")
    for model in changed:
        blocks = [module for module in model.modules() if isinstance(module, selab.SqueezeExcitation)]
        assert len(blocks) == 4
        assert all(torch.count_nonzero(block.fc2.weight) == 0 for block in blocks)
    with pytest.raises(UnknownNameError, match=r"selab.build se_resnet5: no such architecture; did you mean"):
        selab.build("se_resnet5")


# ------------------------------------------------------------------------------------------------------------- count
def test_count_of_a_name_and_of_its_module_are_the_same():
    by_name = selab.count("se_small_cnn", (2, 3, 32, 32))
    assert by_name == selab.count(selab.build("se_small_cnn"), (2, 3, 32, 32))
    assert by_name.macs.paper == 2 * selab.count("se_small_cnn").macs.paper
    assert selab.count("small_cnn+block=eca").se.blocks == 4


def test_count_wants_a_module_and_its_input():
    with pytest.raises(ModelError, match=r"selab.count: a module needs `input`"):
        selab.count(net())
    with pytest.raises(ModelError, match=r"selab.count: expected a torch.nn.Module or a network's name, got int"):
        selab.count(3, CHW)


# ----------------------------------------------------------------------------------------------------------- measure
@pytest.fixture(scope="module")
def measured():
    plain, variant = net(), net()
    selab.insert_se(variant, "3", reduction=4, input_nchw=CHW)
    return selab.measure(variant, baseline=plain, input=CHW, budget=0.2), plain, variant


def test_measure_says_how_the_two_compare(measured):
    time, plain, variant = measured
    assert time.interval == (time.ratio_low, time.ratio_high)
    assert time.ratio_low <= time.ratio <= time.ratio_high
    assert time.baseline_s > 0
    assert time.variant_s > 0
    assert time.verdict
    assert (time.phase, time.mode, time.threads) == ("forward", "eval", 1)
    assert len(time.controls) == 2
    assert plain.training
    assert variant.training


def test_measure_takes_what_a_workload_takes(monkeypatch):
    seen = []

    def no_timing(model, baseline, workload, plan, **rest):
        seen.append((workload, plan, rest))

    monkeypatch.setattr(selab.api, "measure_pair", no_timing)
    selab.measure(
        "se_small_cnn",
        baseline="small_cnn",
        input=(4, 3, 32, 32),
        phase="forward_backward",
        quick=True,
        threads=2,
        dtype="bf16",
        memory_format="channels_last",
        compiled=True,
        seed=5,
    )
    workload, plan, rest = seen[0]
    assert (workload.batch, workload.input_chw, workload.threads, workload.dtype) == (4, (3, 32, 32), 2, "bf16")
    assert (workload.memory_format, workload.compiled) == ("channels_last", True)
    assert (plan.target_half_width, plan.budget_s) == (0.01, 15.0)
    assert rest == {"phase": "forward_backward", "seed": 5}
    selab.measure(net(), baseline=net(), input=CHW, budget=0.5)
    assert (seen[1][1].budget_s, seen[1][1].warmup_least_s, seen[1][1].sample_s) == (0.5, 0.1, 0.005)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input": (3, 16, 16)}, r"input \(3, 16, 16\): expected four sizes above 0, \(N, C, H, W\)"),
        ({"phase": "forwards"}, "phase 'forwards': allowed: forward, backward, forward_backward"),
        ({"input": (1, 4, 16, 16)}, "baseline: forward with an input of shape"),
    ],
)
def test_measure_refuses_nonsense(options, message):
    with pytest.raises(ModelError, match=message):
        selab.measure(net(), **{"baseline": net(), "input": CHW, "budget": 0.1} | options)


class Weighted(nn.Module):
    """Takes an image and a number for each image, or a dictionary of both."""

    def __init__(self, named):
        super().__init__()
        self.conv, self.named = nn.Conv2d(3, 4, 3), named

    def forward(self, *given):
        image, weight = (given[0]["image"], given[0]["weight"]) if self.named else given
        return self.conv(image) * weight[:, :, None, None]


@pytest.mark.parametrize("named", [False, True])
def test_measure_takes_the_shapes_of_several_inputs(named):
    shapes = {"image": (2, 3, 8, 8), "weight": (2, 4)}
    model = Weighted(named)
    found = selab.measure(model, baseline=Weighted(named), input=shapes if named else [*shapes.values()], budget=0.1)
    assert found.interval[0] <= found.ratio <= found.interval[1]
    assert not model._forward_pre_hooks


def test_networks_with_several_inputs_are_copied_once_for_each_arm(monkeypatch):
    copied = []

    def counted(network):
        copied.append(network)
        return real_copy(network)

    monkeypatch.setattr("selab.bench.runner.real_copy", counted)
    model, baseline = Weighted(False), Weighted(False)
    selab.measure(model, baseline=baseline, input=[(2, 3, 8, 8), (2, 4)], budget=0.01)
    # The baseline, the baseline again for the control, and the model.
    assert [one.network for one in copied] == [baseline, baseline, model]


# ---------------------------------------------------------------------------------------------------- profile, records
def test_profile_options_are_those_of_a_request():
    with pytest.raises(ModelError, match=r"selab.profile: options: unknown 'fusd'; allowed: arch, baseline"):
        selab.profile("se_small_cnn", options={"fusd": True})
    with pytest.raises(SpecError, match="is a baseline itself"):
        selab.profile("small_cnn")


def test_every_kind_of_record_is_loaded_and_saved_again(paths, tmp_path):
    assert paths.keys() == {"profile", "accuracy", "tax"}
    for kind, path in paths.items():
        result = selab.load(path)
        again = selab.load(result.save(tmp_path / f"{kind}.json"))
        assert again.record == result.record
        with pytest.raises(RecordError, match="exists; pass replace=True to overwrite it"):
            result.save(tmp_path / f"{kind}.json")
        result.save(tmp_path / f"{kind}.json", replace=True)
        assert result.to_dict()["arch"] == result.arch
        assert len(repr(result).splitlines()) == 1
        assert result.arch in repr(result)
        assert result.arch in text_of(result)
        assert {"table", "td"} <= Tags(result._repr_html_()).seen
        assert all(len(row) == len(result.columns()) for row in result.rows())
        assert "arch" in dir(result)
        with pytest.raises(AttributeError):
            result.nonsense  # noqa: B018


def test_a_file_that_is_no_record(tmp_path):
    for text, message in (
        ("[]", "schema is None; allowed: selab.profile"),
        ("{", "not a record"),
        ('{"schema": 3}', "is 3"),
    ):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(RecordError, match=message):
            selab.load(tmp_path / "a.json")
    with pytest.raises(RecordError, match="cannot be read: No such file"):
        selab.load(tmp_path / "none.json")


def test_compare_records(paths, tmp_path):
    record = selab.load(paths["profile"]).record
    cheaper = msgspec.structs.replace(record.cost, params=record.cost.params - 1)
    before = tmp_path / "before.json"
    before.write_bytes(to_json(msgspec.structs.replace(record, cost=cheaper)))
    changes = selab.compare_records(before, selab.load(paths["profile"]))
    assert changes.worse == ("parameters",)
    assert "worse: parameters" in repr(changes)
    assert changes.to_dict()["quantity"][0] == "params"
    assert changes.rows()[0][1:3] == (record.cost.params - 1, record.cost.params)
    assert "before" in text_of(changes)
    assert "table" in Tags(changes._repr_html_()).seen
    with pytest.raises(RecordError, match="records differ in baseline: 'x'"):
        selab.compare_records(msgspec.structs.replace(record, baseline="x"), record)
    with pytest.raises(RecordError, match="after is a TaxRecord; profiles and counts can be compared"):
        selab.compare_records(record, selab.load(paths["tax"]))
    assert from_json(to_json(record), where="") is not None


# ------------------------------------------------------------------------------------------------------- how they print
def results(measured):
    model = net()
    model.insert(4, selab.SqueezeExcitation(16, 4))
    return {
        "Cost": selab.count(model, CHW),
        "Latency": measured[0],
        "Insertions": selab.insert_se(net(), ["0", "3"], reduction=4, input_nchw=CHW, dry_run=True),
        "GateConversions": selab.convert_gates(model, "hardsigmoid"),
        "Fusion": selab.fuse(model, input_nchw=CHW),
    }


@pytest.mark.parametrize("name", ["Cost", "Latency", "Insertions", "GateConversions", "Fusion"])
def test_results_print_well(name, measured):
    result = results(measured)[name]
    assert type(result).__name__ == name
    assert repr(result) == str(result) == result.summary()
    assert "\n" not in repr(result)
    shown = text_of(result)
    assert all(column in shown for column in result.columns()[:1])
    assert {"table", "td", "p"} <= Tags(result._repr_html_()).seen
    assert msgspec.json.decode(msgspec.json.encode(result.to_dict())) is not None


@pytest.mark.parametrize("name", ["Cost", "Latency", "Insertions", "GateConversions", "Fusion"])
def test_data_frames(name, measured, monkeypatch):
    result = results(measured)[name]
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(SelabError, match=r"to_dataframe needs pandas; pip install pandas, or use to_dict\(\)"):
        result.to_dataframe()
    frames = types.ModuleType("pandas")
    frames.DataFrame = lambda rows, columns=None: (rows, columns)
    monkeypatch.setitem(sys.modules, "pandas", frames)
    rows, columns = result.to_dataframe()
    if columns is None:
        assert rows == [result.to_dict()]
    else:
        assert columns == list(result.columns())
        assert rows == result.rows()


def test_names_are_escaped_in_html_and_plain_in_a_terminal():
    sizes = {"channels": 1, "squeeze_channels": None, "params": 1, "height": 1, "width": 1, "macs": 1}
    listed = Insertions([Insertion(path="<b>[red]x", placement="pre", **sizes)])
    assert "&lt;b&gt;[red]x" in listed._repr_html_()
    assert "<b>[red]x" in text_of(listed, width=200)
    assert "".join(Tags(listed._repr_html_()).words).count("<b>[red]x") == 1


def test_an_empty_result_is_a_table_without_rows():
    assert str(Insertions()) == "no blocks inserted"
    assert Insertions().to_dict()["path"] == []
    assert str(selab.convert_gates(nn.Identity(), "sigmoid")) == "no gates to convert"


class TestMistakes:
    """One line that says what is allowed, before anything is measured."""

    @pytest.mark.parametrize(
        ("call", "words"),
        [
            (lambda net: selab.build(3), "expected the name of a network, got int"),
            (
                lambda net: selab.profile("se_small_cnn", phases=["forwrd"]),
                "phase 'forwrd': allowed: forward, backward",
            ),
            (lambda net: selab.profile("se_small_cnn", threads=0), "threads 0: must be a whole number from 1 to 1,024"),
            (
                lambda net: selab.measure(net, baseline=net, threads=0),
                "threads 0: must be a whole number from 1 to 1,024",
            ),
            (lambda net: selab.measure(net, baseline=net, budget=-1), "budget -1: must be a finite number above 0"),
            (
                lambda net: selab.measure(net, baseline=net, budget=math.inf),
                "budget inf: must be a finite number above 0",
            ),
            (lambda net: selab.measure(net, baseline=net, threads=10**9), "threads 1000000000: must be a whole number"),
            (lambda net: selab.measure(net, baseline=net, seed=10**30), "seed 10+: must be a whole number"),
            (lambda net: selab.measure(net, baseline=net, input=[(3, 8, 8), (2,)]), "one must be an image"),
            (lambda net: selab.measure(net, baseline=net, input=[(3, 0, 8)]), "expected a shape such as"),
            (lambda net: selab.count(net, (1, 3, 8, 8), dtype="fp32"), "dtype 'fp32': expected a torch.dtype"),
            (lambda net: selab.measure(net, baseline=net, device="tpu"), "device 'tpu': allowed: cpu, cuda"),
            (
                lambda net: selab.measure(net, baseline=net, dtype="int4"),
                "dtype 'int4': allowed: fp32, tf32, bf16",
            ),
        ],
    )
    def test_are_refused(self, call, words):
        with pytest.raises(selab.SelabError, match=words):
            call(nn.Flatten())


def test_packages_of_the_documentation_are_attributes():
    code = "import selab; print(selab.cost.register_rule, selab.attention.register_block, selab.errors.SelabError)"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).returncode == 0
    assert {"attention", "cost", "errors"} <= set(dir(selab))


@pytest.mark.parametrize("width", [40, 80])
def test_rich_tables_break_no_word(width):
    made = selab.build("resnet18")
    for result in (selab.insert_se(made, "residual"), selab.fuse(made.eval())):
        text = io.StringIO()
        Console(file=text, width=width).print(result)
        printed = set(re.findall(r"[^\s│┃]+", text.getvalue()))
        left_out = " ".join(text.getvalue().partition("left out at this width:")[2].split())
        for index, column in enumerate(result.columns()):
            header = column.replace("_", " ")
            if header in left_out:
                continue
            words = {*header.split(), *(word for row in result.rows() for word in shown(row[index]).split())}
            assert words <= printed, (width, column, words - printed)
