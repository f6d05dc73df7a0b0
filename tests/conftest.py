import json
import os
import shutil
import signal
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import torch
from fake_runs import paired_run
from torch import nn

from selab.records.types import Cost, Macs, SECost, StageCost, Workload

# Triton decides when it is imported whether it compiles kernels or interprets them, which needs no GPU.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A shell starts its background jobs with SIGINT ignored; interruptions are tested here, so it must be heard.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

TOY_TOML = """
family = "toy"
source = "this test"
builder = "toy_networks:build"
input_chw = [3, 16, 16]
num_classes = 4
[variants.toy]
title = "Toy"
[variants.se_toy]
title = "Toy with SE"
baseline = "toy"
[variants.se_toy.se]
sites = ["0", "3"]
reduction = 4
bias = true
[variants.nan]
title = "A network whose output is NaN"
baseline = "toy"
arguments = { fault = "nan" }
[variants.broken]
title = "A network that fails in forward"
baseline = "toy"
arguments = { fault = "raise" }
[variants.slow]
title = "A network that is interrupted"
baseline = "toy"
arguments = { fault = "interrupt" }
"""

TOY_MODULE = """
import os
import signal

from torch import nn


class Fault(nn.Module):
    calls = 0

    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def forward(self, x):
        if self.kind == "nan":
            return x * float("nan")
        if self.kind == "raise":
            raise RuntimeError("the toy is broken")
        if self.kind == "interrupt" and not x.is_meta:
            Fault.calls += 1
            if Fault.calls == 60:
                os.kill(os.getpid(), signal.SIGINT)
        return x


def build(num_classes, fault=""):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Flatten(), nn.Linear(16 * 12 * 12, num_classes), Fault(fault),
    )
"""


def pytest_generate_tests(metafunc):
    """Refuses sets as parameters: every worker of pytest-xdist must collect the tests in the same order."""
    for mark in metafunc.definition.iter_markers("parametrize"):
        values = mark.args[1] if len(mark.args) > 1 else mark.kwargs["argvalues"]
        if isinstance(values, (set, frozenset)):
            pytest.fail(
                f"{mark.args[0]!r} takes its values from a set, which has no order: give a tuple", pytrace=False
            )


@pytest.fixture
def toy(tmp_path):
    """A user's own family: `TOML:variant` names its networks."""
    (tmp_path / "toy_networks.py").write_text(TOY_MODULE)
    path = tmp_path / "toy.toml"
    path.write_text(TOY_TOML)
    yield path
    sys.modules.pop("toy_networks", None)


@pytest.fixture
def quick_plans(monkeypatch):
    """Measurements that last milliseconds: what is tested is what happens, not how well it is measured.

    They stay in this process, and leave its heap alone, unless a test asks for more.
    """
    from selab.experiments import job

    patient = job._plan_of
    monkeypatch.setattr(job.Request, "in_this_process", property(lambda request: request.processes in (None, 1)))
    monkeypatch.setattr(job.Request, "holds_heap", property(lambda request: bool(request.held_heap)))

    def quick(request):
        plan = patient(request)
        return replace(plan, warmup_least_s=0.0, warmup_most_s=0.05, sample_s=1e-4, budget_s=0.2)

    monkeypatch.setattr(job, "_plan_of", quick)


@pytest.fixture
def selab(monkeypatch, capsys):
    """Runs the program in this process: words → (status, standard output, standard error)."""
    from selab.cli.main import main

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["selab", *map(str, words)])
        monkeypatch.setenv("COLUMNS", "80")
        try:
            main()
            status = 0
        except SystemExit as left:
            status = left.code or 0
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


@pytest.fixture(scope="session")
def root():
    return Path(__file__).parent.parent


@pytest.fixture(scope="session")
def committed_costs(root):
    """Return what docs/tables/costs.json says of every variant; what no table by name shows is zero.

    A test in tests/report compares the file with what is counted.
    """
    none = StageCost(macs=0, bytes=0)
    return {
        name: Cost(
            params=one["params"],
            buffer_elements=one["buffer_elements"],
            macs=Macs(**one["macs"]),
            macs_backward=Macs(conv_linear=0, paper=0, all=one["macs_backward"]),
            flops=one["flops"],
            flops_backward=0,
            bytes=one["bytes"],
            activations=one["activations"],
            se=SECost(**one["se"], squeeze=none, excitation=none, scale=none),
            by_operator={},
            by_module={},
            unknown={},
        )
        for name, one in json.loads((root / "docs" / "tables" / "costs.json").read_text()).items()
    }


@pytest.fixture(scope="session")
def imagenet_sample(root, tmp_path_factory):
    """250 of ImageNet's validation images, as `train` too, with the list of the 1,000 classes beside them."""
    shared = Path(os.environ.get("SELAB_SHARED", root.parent / "shared")) / "data"
    archive, wnids = shared / "imagenet_sample.tar", shared / "imagenet_wnids.txt"
    if not archive.is_file() or not wnids.is_file():
        pytest.skip(f"the sample of ImageNet is not in {shared}; SELAB_SHARED names another place")
    data_dir = tmp_path_factory.mktemp("imagenet")
    with tarfile.open(archive) as tar:
        tar.extractall(data_dir, filter="data")
    shutil.copy(wnids, data_dir)
    (data_dir / "train").symlink_to(data_dir / "val")
    return data_dir


@pytest.fixture
def workload():
    """A small CPU workload, changed by keyword."""

    def make(**changes):
        plain = Workload(
            batch=2,
            input_chw=(3, 8, 8),
            device="cpu",
            dtype="fp32",
            memory_format="contiguous",
            mode="auto",
            threads=1,
        )
        return msgspec.structs.replace(plain, **changes)

    return make


@pytest.fixture
def net():
    """Makes a network for that workload, the same at each call."""

    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))

    return make


@pytest.fixture
def compared_small_cnn():
    """A comparison of se_small_cnn with small_cnn: percents of the base, percents of the variant, one seed each."""
    from selab.bench.machine import machine
    from selab.models.catalog import find
    from selab.training.recipe import find_recipe
    from selab.training.record import Accuracy, AccuracyRecord, DataSpec, Epoch, Options, Seed, SeedOutcome

    def outcome(percent, recipe):
        right = round(100 * percent)
        test = Accuracy(images=10_000, top1_correct=right, top5_correct=(right + 10_000) // 2, loss=2 - percent / 50)
        epochs = tuple(
            Epoch(
                epoch=number,
                lr=0.1,
                train_loss=1.0,
                train_top1_pct=50.0,
                test_loss=2 - percent / 50,
                test_top1_pct=right / 100 * number / recipe.epochs,
                test_top5_pct=test.top5_pct,
                seconds=20.0,
                images_per_s=600.0,
            )
            for number in range(1, recipe.epochs + 1)
        )
        return SeedOutcome(test=test, seconds=60.0, images_per_s=600.0, epochs=epochs)

    def make(base, variant, *, epochs=10, **changes):
        recipe = msgspec.structs.replace(find_recipe("cifar_short"), epochs=epochs)
        networks = find("se_small_cnn"), find("small_cnn")
        record = AccuracyRecord(
            selab="0",
            arch="se_small_cnn",
            baseline="small_cnn",
            origin="",
            baseline_origin="",
            facts_hash=networks[0].facts_hash,
            baseline_facts_hash=networks[1].facts_hash,
            created="",
            command="",
            complete=True,
            data=DataSpec(
                name="d",
                title="Some images",
                sha256="c",
                official=False,
                num_classes=10,
                input_chw=(3, 32, 32),
                train_size=50_000,
                test_size=10_000,
            ),
            recipe=recipe,
            options=Options(threads=1),
            machine=machine(),
            seeds=tuple(
                Seed(seed=seed, baseline=outcome(left, recipe), variant=outcome(right, recipe))
                for seed, (left, right) in enumerate(zip(base, variant, strict=True))
            ),
        )
        return msgspec.structs.replace(record, **changes)

    return make


@pytest.fixture
def taxed():
    """A record of `selab tax` of one block of 8 channels on a 4x5 map: (baseline, variant) → the true ratio."""
    from selab.bench.machine import machine
    from selab.experiments.tax_record import ALL, TaxPair, TaxRecord
    from selab.records import verdict
    from selab.records.types import Insertion

    def run(ratio):
        return paired_run(ratio, blocks=20, variant_wobble=1e-3, warmup_calls=12)

    def make(ratios, *, workload, phase="forward", failed=(), method="wall", **changes):
        control = run(1.0)
        pairs = []
        for (baseline, variant), ratio in {("baseline", "again"): 1.0, **ratios}.items():
            error = "out of memory" if variant in failed else ""
            latency = verdict.summarise(
                phase=phase,
                method=method,
                statistic="floor",
                threads=1,
                mode="eval",
                runs=[] if error else [run(ratio)],
                controls=[] if error else [control],
                error=error,
            )
            pairs.append(TaxPair(baseline=baseline, variant=variant, latency=latency))
        block = Insertion(
            path="0",
            placement="standard",
            channels=8,
            squeeze_channels=2,
            params=2 * 8 * 2 + 8 + 2,
            height=4,
            width=5,
            macs=1,
        )
        record = TaxRecord(
            selab="0",
            arch="se_small_cnn",
            baseline="small_cnn",
            origin="",
            baseline_origin="",
            facts_hash="",
            created="",
            command="selab tax --arch se_small_cnn",
            workload=workload,
            phase=phase,
            machine=machine(),
            seed=0,
            implementations=ALL,
            blocks=(block,),
            bandwidths=((2**16, 1e9), (2**28, 1e9)),
            pairs=tuple(pairs),
            profiled=None,
            saved_for_backward_bytes={},
            remarks=(),
        )
        return msgspec.structs.replace(record, **changes)

    return make
