"""What a budget allows, and what is over it."""

import json
import subprocess
import sys

import pytest
import torch
from fake_runs import paired_run

from selab.errors import SelabError, SpecError, UnknownNameError
from selab.experiments import budget
from selab.experiments.job import Request
from selab.records import verdict

# small_cnn: 3->32 and 32->32 (3x3), 32->64 and 64->64 (3x3), 2304->512->10, with biases.
SMALL_CNN = (27 + 1) * 32 + (288 + 1) * 32 + (288 + 1) * 64 + (576 + 1) * 64 + (2304 + 1) * 512 + 513 * 10


def written(tmp_path, text):
    path = tmp_path / "budgets.toml"
    path.write_text(text)
    return path


def found(tmp_path, text):
    budgets = budget.read_budgets(written(tmp_path, text))
    return {(one.name, one.limit): one for one in budget.check(budgets, lambda *_: None)}


def test_a_limit_is_the_most_that_is_allowed(tmp_path):
    for limit, state in ((SMALL_CNN, "within"), (SMALL_CNN - 1, "over")):
        one = found(tmp_path, f"[budgets.small_cnn]\nparams = {limit}\n")["small_cnn", "params"]
        assert (one.found, one.state) == (SMALL_CNN, state)


def test_ratios_of_costs_are_to_the_baseline(tmp_path):
    text = '[budgets.mine]\narch = "se_small_cnn"\nparams_ratio = 1.0005\nmacs_ratio = 1.01\n'
    states = {limit: one.state for (_, limit), one in found(tmp_path, text).items()}
    assert states == {"params_ratio": "over", "macs_ratio": "within"}


def test_macs_are_of_the_convention_that_is_named(tmp_path):
    values = [
        found(tmp_path, f'[budgets.se_small_cnn]\nmacs = 1\nmacs_convention = "{one}"\n')["se_small_cnn", "macs"].found
        for one in ("conv_linear", "paper", "all")
    ]
    assert values == sorted(set(values))


def test_memory_is_measured_where_it_is_limited(tmp_path):
    text = "[budgets.small_cnn]\npeak_memory = 1\npeak_memory_forward_backward = 1_000_000_000\n"
    states = [one.state for one in found(tmp_path, text).values()]
    assert states == ["over", "within"]


def latency(ratio, *, control=1.0):
    return verdict.summarise(
        phase="forward",
        method="wall",
        statistic="floor",
        threads=1,
        mode="eval",
        runs=[paired_run(ratio)],
        controls=[paired_run(control)],
    )


@pytest.mark.parametrize(
    ("measured", "state"),
    [
        (latency(1.10), "within"),
        (latency(1.20), "over"),
        (latency(1.15), "not_decided"),
        (latency(1.10, control=1.3), "no_result"),
        # Too noisy for a figure, and over the limit all the same.
        (latency(2.00, control=1.3), "over"),
        (None, "no_result"),
    ],
)
def test_a_ratio_is_over_only_if_its_whole_interval_is(measured, state):
    limit = 1.15 if measured is None or measured.ratio is None else measured.ratio if state == "not_decided" else 1.15
    assert budget._ratio_finding("x", "latency_ratio", limit, measured).state == state


@pytest.mark.usefixtures("quick_plans")
def test_a_latency_ratio_is_measured_beside_the_baseline(tmp_path):
    one = found(tmp_path, "[budgets.se_small_cnn]\nlatency_ratio = 1000\n")["se_small_cnn", "latency_ratio"]
    assert one.state in ("within", "no_result")
    assert one.text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[budgets.small_cnn]\nparam = 3\n", "budgets.small_cnn.param: unknown key; allowed: arch, baseline"),
        ("[budgets.small_cnn]\nparams = -3\n", "budgets.small_cnn.params: expected float > 0"),
        ('[budgets.small_cnn]\ndevice = "tpu"\nparams = 3\n', "budgets.small_cnn.device"),
        ("[budgets.small_cnn]\nbatch = 1\n", "limits nothing; give one of params, macs"),
        ("[budgets.small_cnn]\nlatency_ratio = 1.1\n", "small_cnn has no baseline; name one"),
        ("[other.small_cnn]\nparams = 3\n", r"must hold \[budgets.NAME\] tables, and nothing beside: other"),
        ("params = \n", "not TOML"),
    ],
)
def test_a_mistake_is_told_with_its_place(tmp_path, text, words):
    with pytest.raises(SpecError, match=f"budgets.toml: .*{words}|budgets.toml: {words}"):
        budget.read_budgets(written(tmp_path, text))


def test_an_unknown_network_is_told_before_anything_is_measured(tmp_path):
    path = written(tmp_path, "[budgets.small_cnn]\nparams = 3\n[budgets.se_mobilnet]\nparams = 3\n")
    with pytest.raises(UnknownNameError, match=r"budgets.se_mobilnet.arch se_mobilnet: .*se_mobilenet"):
        budget.read_budgets(path)
    with pytest.raises(UnknownNameError, match="has no budget large_cnn"):
        budget.read_budgets(path, only=["large_cnn"])
    assert list(budget.read_budgets(path, only=["small_cnn"])) == ["small_cnn"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[budgets.resnet18]\nresolution = 1\nmacs = 1\n[budgets.se_small_cnn]\nresolution = 64\nmacs = 1\n", "fails"),
        ('[budgets.se_small_cnn]\ndevice = "cuda"\npeak_memory = 1\n', "--device cuda"),
    ],
)
def test_what_cannot_be_measured_is_told_first_and_with_its_budget(tmp_path, monkeypatch, text, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    budgets = budget.read_budgets(written(tmp_path, text))
    with pytest.raises(SelabError, match=f"^budgets.se_small_cnn: .*{words}"):
        next(budget.check(budgets, lambda *_: None))


def test_the_shell_gates(selab, tmp_path):
    path = written(tmp_path, f"[budgets.small_cnn]\nparams = {SMALL_CNN}\nmacs = 1\n")
    status, out, err = selab("check", path)
    assert status == 1
    assert "1 of 2 limits exceeded" in out
    assert "over budget: small_cnn.macs" in err
    status, out, _ = selab("check", path, "--json", "-")
    assert {one["limit"]: one["state"] for one in json.loads(out)} == {"params": "within", "macs": "over"}
    path.write_text(f"[budgets.small_cnn]\nparams = {SMALL_CNN}\n")
    assert selab("check", path)[0] == 0
    assert "budgets.NAME" in selab("check", "--help")[1]
    status, _, err = selab("check", tmp_path / "none.toml")
    assert status == 1
    assert "none.toml: cannot be read" in err


def test_an_interrupted_check_shows_what_was_decided(selab, tmp_path, monkeypatch):
    def interrupted(*things, **how):
        yield from list(check(*things, **how))[:1]
        raise KeyboardInterrupt

    check = budget.check
    monkeypatch.setattr(budget, "check", interrupted)
    path = written(tmp_path, f"[budgets.small_cnn]\nparams = {SMALL_CNN}\nmacs = 1\n")
    status, out, err = selab("check", path)
    assert (status, "params" in out, "macs" in out) == (130, True, False)
    assert "interrupted; budgets that are not listed were not checked" in err
    assert selab("check", path, "--json", "-")[:2] == (130, "")


def test_a_user_s_own_network_has_a_budget(selab, toy, tmp_path):
    path = written(tmp_path, f'[budgets.mine]\narch = "{toy}:se_toy"\nparams = 1\n')
    status, _, err = selab("check", path)
    assert status == 1
    assert "running code from" in err
    assert "over budget: mine.params" in err


def test_a_budget_says_all_of_its_workload(tmp_path):
    text = """
[budgets.mine]
arch = "small_cnn"
baseline = "small_cnn"
se = "reduction=8"
insert = ["conv1", "conv2"]
input = "3x40x48"
batch = 2
dtype = "bf16"
memory_format = "channels_last"
mode = "train"
compiled = true
fused = true
hold_heap = true
threads = 2
seed = 5
latency_ratio_forward_backward = 2.0
"""
    path = tmp_path / "budgets.toml"
    path.write_text(text)
    one = budget.converted(budget.read_tables(path, "budgets")["mine"], budget.Budget, place="it")
    assert one.request({"quick": False, "processes": 3}) == Request(
        arch="small_cnn+reduction=8,sites=conv1+conv2",
        baseline="small_cnn",
        input_chw=(3, 40, 48),
        batch=2,
        dtype="bf16",
        memory_format="channels_last",
        mode="train",
        compiled=True,
        fused=True,
        held_heap=True,
        threads=2,
        seed=5,
        processes=3,
        phases=("forward_backward",),
    )


def test_an_input_need_not_be_square(tmp_path):
    text = '[budgets.resnet18]\nmacs = 1\ninput = "3x64x96"\n'
    # Of the whole network, half as many as at 64x192 but for the classifier.
    small, large = (
        found(tmp_path, text.replace("64x96", size))["resnet18", "macs"].found for size in ("64x96", "64x192")
    )
    assert large - small == pytest.approx(small - 512 * 1000)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('input = "3x64"', "budgets.resnet18.input: '3x64' is not CxHxW"),
        ('input = "3x64x64"\nresolution = 64', "budgets.resnet18.resolution: is in input already"),
        ('insert = "stag2.0"', "stag2.0"),
    ],
)
def test_an_input_or_a_site_that_cannot_be_is_told(tmp_path, line, words):
    with pytest.raises(SelabError, match=words):
        found(tmp_path, f"[budgets.resnet18]\nmacs = 1\n{line}\n")


def test_options_replace_the_keys_of_every_budget(selab, tmp_path):
    path = written(tmp_path, "[budgets.small_cnn]\nparams = 1\n[budgets.se_small_cnn]\nparams = 1\n")
    before = json.loads(selab("check", path, "--json", "-")[1])
    after = json.loads(selab("check", path, "--json", "-", "--se", "block=eca")[1])
    assert [one["name"] for one in before] == [one["name"] for one in after]
    # ECA has three or five weights for each block, SE thousands.
    assert [0 < a["found"] - SMALL_CNN < 40 for a in after] == [True, True]
    assert [b["found"] - SMALL_CNN > 40 for b in before] == [False, True]


def test_an_unknown_name_is_refused_before_torch_is_loaded(tmp_path):
    path = written(tmp_path, "[budgets.small_cnn]\nparams = 3\n")
    code = f"""
import sys
from selab.cli.main import main
sys.argv = ["selab", "check", {str(path)!r}, "--only", "large_cnn"]
try:
    main()
except SystemExit as left:
    assert left.code == 1
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "has no budget large_cnn" in done.stderr


@pytest.mark.usefixtures("quick_plans")
def test_a_peak_of_a_phase_that_is_not_timed_is_measured_too(tmp_path):
    text = "[budgets.se_small_cnn]\nlatency_ratio = 1000\npeak_memory_forward_backward = 1\n"
    assert found(tmp_path, text)["se_small_cnn", "peak_memory_forward_backward"].state == "over"
