"""One set of options for all measuring commands, and helps that a terminal of 80 columns shows whole."""

import re

import pytest
import typer
from typer.main import get_command

from selab.cli.main import app
from selab.cli.options import GridOptions, WorkloadOptions, option_of, with_options
from selab.experiments.job import Request

WORKLOAD = {
    *("--device", "--batch", "--dtype", "--memory-format", "--channels-last", "--compile", "--fused", "--hold-heap"),
    *("--threads", "--mode", "--phase", "--seed", "--baseline", "--se", "--insert", "--input", "--resolution"),
}
COMMANDS = get_command(app).commands
LEAVES = {
    f"{group} {name}".strip(): command
    for group, one in COMMANDS.items()
    for name, command in getattr(one, "commands", {"": one}).items()
}


def options_of(command):
    return {name for one in command.params for name in (*one.opts, *one.secondary_opts) if name.startswith("--")}


@pytest.mark.parametrize("name", ["profile", "tax", "sweep", "timeline", "roofline", "check"])
def test_every_measuring_command_takes_every_workload_option(name):
    assert options_of(COMMANDS[name]) >= WORKLOAD


def test_a_sweep_takes_lists_where_a_grid_makes_sense():
    assert GridOptions().batch == "1"
    assert {option_of(GridOptions, name) for name in ("batch", "dtype", "memory_format", "threads", "reduction")} == {
        *("--batch", "--dtype", "--memory-format", "--threads", "--reduction")
    }


def test_options_that_were_not_given_leave_the_request_at_its_defaults():
    assert WorkloadOptions().request("net") == Request(arch="net")
    assert WorkloadOptions().request("net", threads=1).threads == 1
    assert WorkloadOptions(threads=3).request("net", threads=1).threads == 3


def test_each_option_reaches_the_request():
    options = WorkloadOptions(
        se="reduction=8",
        insert=["a.*", "b"],
        baseline="base",
        device="cpu",
        batch=4,
        input_size=["1x8x9"],
        dtype="bf16",
        channels_last=True,
        mode="train",
        phase=["backward", "forward"],
        compiled=True,
        fused=True,
        hold_heap=True,
        threads=2,
        seed=7,
    )
    assert options.request("net") == Request(
        arch="net+reduction=8,sites=a.*+b",
        baseline="base",
        batch=4,
        input_chw=(1, 8, 9),
        dtype="bf16",
        memory_format="channels_last",
        mode="train",
        phases=("forward", "backward"),
        compiled=True,
        fused=True,
        held_heap=True,
        threads=2,
        seed=7,
    )


def test_the_two_spellings_of_a_memory_format_are_one():
    short, long = WorkloadOptions(channels_last=True), WorkloadOptions(memory_format="channels_last")
    assert short.request("net") == long.request("net")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["profile", "--hold-heap", "--device", "cuda"], "--hold-heap: is of the CPU's heap"),
        (["profile", "--input", "3x8x8", "--resolution", 8], "--resolution: is in --input already"),
        (["profile", "--channels-last", "--memory-format", "contiguous"], "--channels-last: contradicts"),
        (["profile", "--phase", "forwards"], "'forwards' is not one of forward, backward, forward_backward"),
        (["tax", "--fused"], "--fused: is what tax measures"),
        (["tax", "--phase", "backward"], "--phase: takes one of forward and forward_backward"),
        (["tax", "--phase", "forward", "--phase", "forward_backward"], "--phase: takes one of forward and"),
        (["timeline", "--baseline", "small_cnn"], "--baseline: has no part in a timeline"),
        (["roofline", "--compile"], "--compile: hides the operators"),
        (["roofline", "--mode", "train"], "--mode: is fixed"),
        (["roofline", "--phase", "backward"], "--phase: is forward"),
        (["roofline", "--as", "h200", "--threads", 2], "--threads: has no part in a prediction"),
        (["tax", "--runtime", "onnxruntime", "--spelling", "pool-conv"], "--spelling: is what tax compares"),
        (["timeline", "--runtime", "onnxruntime"], "--runtime: has no part in a timeline"),
        (["roofline", "--runtime", "onnxruntime"], "--runtime: has no part in a roofline"),
        (["roofline", "--as", "h200", "--free-heap"], "--free-heap: has no part in a prediction"),
        (["roofline", "--as", "h200", "--hold-heap"], "--hold-heap: has no part in a prediction"),
        (["check", "--phase", "forward"], "--phase: is chosen by the limits"),
        (["show", "se_small_cnn", "--batch", 2], "--batch: is a workload of --runtime"),
    ],
)
def test_options_that_mean_nothing_are_refused_in_one_clear_line(selab, words, message, one_line):
    arch = [] if words[0] in ("check", "show") else ["--arch", "se_small_cnn"]
    status, _, error = selab(words[0], *arch, *words[1:])
    assert status == 2
    assert message in one_line(error)


def test_a_command_is_called_with_its_options_as_one_value():
    called = []

    @with_options
    def command(options: WorkloadOptions, name: str = "x") -> None:
        called.append((options, name))

    program = typer.Typer()
    program.command()(command)
    get_command(program).main(["--batch", "3", "--name", "y"], standalone_mode=False)
    assert called == [(WorkloadOptions(batch=3), "y")]


@pytest.mark.parametrize("name", LEAVES)
def test_a_help_fits_80_columns_and_ends_with_an_example(selab, name):
    status, text, _ = selab(*name.split(), "--help")
    assert status == 0
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    # rich cuts what does not fit and marks it; a comma list ends so too.
    assert not [line for line in lines if re.search(r"(?<![,V])…(?!/)", line) and "│" in line]
    assert not re.search(r"\[\w+\|", text)
    assert "$ selab" in text or "Example" in text
    for one in LEAVES[name].params:
        for option in one.opts:
            assert option in text or not option.startswith("--")


@pytest.mark.parametrize("name", ["profile", "sweep", "count", "tax", "timeline", "roofline", "check"])
def test_the_options_of_a_measurement_are_grouped(selab, name):
    _, text, _ = selab(name, "--help")
    panels = re.findall(r"╭─ ([\w ]+) ─", text)
    groups = ["What to measure", "Workload", "How long", "Output"]
    assert [one for one in panels if one in groups] == [one for one in groups if one in panels]
    assert {"What to measure", "Workload", "Output"} <= set(panels)
    assert set(panels) <= {*groups, "Options", "Arguments"}


def test_every_command_has_a_group_and_a_short_sentence():
    for name, command in COMMANDS.items():
        first = command.help.split("\n")[0]
        assert len(first.split()) <= 12, name
        assert first.endswith("."), name
        assert command.rich_help_panel, name


def test_compare_says_first_that_it_trains():
    assert COMMANDS["compare"].help.startswith("Train ")


class TestBounds:
    """Numbers that no machine has are wrong usage; nothing is measured, allocated or looped over."""

    @pytest.mark.parametrize(
        "number", ["0", "-1", "1e400", "nan", "inf", "", " ", "1" * 5000, "1" + "0" * 400, "1_0", "٣x"]
    )
    @pytest.mark.parametrize(
        "words",
        [
            ["count", "--arch", "resnet18", "--batch"],
            ["count", "--arch", "resnet18", "--resolution"],
            ["count", "--arch", "resnet18", "--input"],
            ["sites", "--arch", "resnet18", "--depth"],
            ["profile", "--arch", "se_small_cnn", "--threads"],
            ["profile", "--arch", "se_small_cnn", "--processes"],
            ["profile", "--arch", "se_small_cnn", "--budget"],
            ["timeline", "--arch", "se_small_cnn", "--steps"],
            ["train", "--arch", "small_cnn", "--epochs"],
            ["train", "--arch", "small_cnn", "--accumulate"],
            ["eval", "--arch", "small_cnn", "--weights", "w.pth", "--batch"],
            ["eval", "--arch", "small_cnn", "--weights", "w.pth", "--crop"],
            ["compare", "small_cnn", "--seeds"],
        ],
        ids=" ".join,
    )
    def test_wrong_usage(self, selab, words, number, one_line):
        status, out, error = selab(*words, number)
        assert (status, out) == (2, "")
        assert f": {words[-1]}: " in one_line(error)
        assert any(told in error for told in ("is empty; give ", "is not a ", "; for example 3x224x224", "no image"))
        assert len(error) < 1500

    @pytest.mark.parametrize("seed", ["-1", str(2**63), "1e3"])
    def test_a_seed_has_63_bits(self, selab, seed):
        assert selab("profile", "--arch", "se_small_cnn", "--seed", seed)[0] == 2

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ("stages=1-99999999999", "has a stage beyond 1000"),
            ("stages=" + "9" * 5000, "has a stage beyond 1000"),
            ("reduction=" + "1" * 5000, "a number of 5000 digits; at most 18"),
            ("reduction=99999999999999999999", "a number of 20 digits"),
            ("reduction=0", "must be at least 1"),
            ("reduction=-4", "must be at least 1"),
            ("reduction=1e400", "is not a whole number"),
            ("divisor=nan", "is not a whole number"),
        ],
    )
    def test_changes_of_blocks(self, selab, change, message, one_line):
        status, _, error = selab("count", "--arch", "resnet18", "--se", f"sites=residual,{change}")
        assert status == 1
        assert message in one_line(error)
        assert len(error) < 1000

    @pytest.mark.parametrize("axis", ["batch", "resolution", "reduction", "threads"])
    def test_a_grid(self, selab, axis, one_line):
        status, _, error = selab("sweep", "--arch", "se_small_cnn", f"--{axis}", "1" * 5000)
        assert status == 1
        assert f"--{axis} 111" in one_line(error)
        assert len(error) < 1000

    @pytest.mark.parametrize(
        "text", ["3x99999999999x3", "3x0x3", "3x3", "3x3x3x3", "x".join(["9" * 5000] * 3), "3x-3x3"]
    )
    def test_an_input(self, selab, text, one_line):
        status, _, error = selab("count", "--arch", "resnet18", "--input", text)
        assert status == 2
        assert "--input" in one_line(error)
        assert len(error) < 1500

    def test_an_input_whose_elements_have_more_than_64_bits(self, selab, one_line):
        words = ["--batch", 10**9, "--input", "3x1000000x1000000"]
        status, _, error = selab("count", "--arch", "resnet18", *words)
        assert status == 1
        assert "too large" in one_line(error)
