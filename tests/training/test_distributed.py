"""Several processes on this machine, started as a user starts them: `python -m torch.distributed.run`."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from selab.errors import SelabError
from selab.experiments.compare import Comparison, ComparisonPlan
from selab.experiments.trainings import run_all
from selab.models import catalog
from selab.models.spec import read_family
from selab.training.data import ImageSet, synthetic_set
from selab.training.distributed import ProcessGroup, join, lost_another
from selab.training.recipe import Recipe, find_recipe
from selab.training.record import read_accuracy_record
from selab.training.train import Options, TrainingError, train

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch is built without torch.distributed")

FAMILY = """
family = "pair"
source = "this test"
builder = "pair_networks:build"
input_chw = [3, 8, 8]
num_classes = 4
[variants.plain]
title = "Without batch norm and dropout, which would see parts of a batch"
[variants.se_plain]
title = "The same with SE"
baseline = "plain"
se = { sites = ["0", "2"], reduction = 2, bias = true }
[variants.bn]
title = "With batch norm"
arguments = { norm = true }
"""

NETWORKS = """
from torch import nn

def build(num_classes, norm=False):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8) if norm else nn.ReLU(),
        nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(8 * 4 * 4, num_classes),
    )
"""

RECIPE = Recipe(
    name="pair",
    title="Pair",
    source="this test",
    where="above",
    lr=0.05,
    momentum=0.9,
    weight_decay=1e-3,
    batch=16,
    epochs=3,
    schedule="cosine",
    ema=0.9,
    flip=True,
)

# Each process trains the networks that it is told, one after the other.
CHILD = """
import os, signal, sys, threading
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import test_distributed as here
from selab.training.train import train
from selab.errors import SelabError
from selab.models.spec import read_family

toml, out, names, fault, patience = Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4].split(), sys.argv[5], sys.argv[6]
rank = int(os.environ["RANK"])
data = here.images()

class Faulty:
    def __getattr__(self, name):
        return getattr(data, name)

    def train_batches(self, plan, **asked):
        for number, batch in enumerate(data.train_batches(plan, **asked), start=plan.first):
            if rank == 1 and (plan.epoch, number) == (1, 3):
                if fault == "killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                if fault == "hangs":
                    # So fast that torchrun need not wait until it may kill it.
                    signal.signal(signal.SIGTERM, signal.SIG_DFL)
                    threading.Event().wait()
                if fault == "stopped":
                    os.kill(os.getpid(), signal.SIGTERM)
            yield batch

def one(name):
    return train(
        read_family(toml)[name], Faulty(), here.RECIPE, seed=0, folder=out / name, patience_s=float(patience),
        options=here.Options(threads=1, checkpoint_s=0.0), report=lambda p: None,
    )

try:
    done = [one(name) for name in names]
except SelabError as error:
    print(f"<{type(error).__name__}: {error}>", flush=True)
    sys.exit(1)
if rank == 1:
    assert [training.world for training in done] == [2] * len(names)
"""


def images():
    draw = np.random.default_rng(0)
    return ImageSet(
        name="pair",
        title="pair",
        sha256="0" * 64,
        official=False,
        num_classes=4,
        train_images=torch.from_numpy(draw.integers(0, 256, (100, 3, 8, 8), np.uint8)),
        train_labels=torch.from_numpy(draw.integers(0, 4, 100)),
        test_images=torch.from_numpy(draw.integers(0, 256, (31, 3, 8, 8), np.uint8)),
        test_labels=torch.from_numpy(draw.integers(0, 4, 31)),
        mean=(127.5,) * 3,
        std=(64.0,) * 3,
    )


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    folder = tmp_path_factory.mktemp("family")
    (folder / "pair_networks.py").write_text(NETWORKS)
    (folder / "pair.toml").write_text(FAMILY)
    (folder / "child.py").write_text(CHILD)
    yield folder / "pair.toml"
    sys.modules.pop("pair_networks", None)


def in_two(*words):
    """Starts a script with two processes."""
    job = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", 2, "--master-port", 0]
    job += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    return subprocess.run(list(map(str, [*job, *words])), capture_output=True, text=True, check=False)


@pytest.fixture
def two(family, tmp_path, monkeypatch):
    """Trains with two processes: names of networks → (exit status, what was written)."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def run(names, *, fault="", patience=60.0):
        child = family.with_name("child.py")
        done = in_two(child, Path(__file__).parent, family, tmp_path / "two", names, fault, patience)
        return done.returncode, done.stdout + done.stderr

    return run


# The program, with a folder of its own for each process, as nodes have; in that of rank 1 there can be no results.
# Times are not what is tested.
PROGRAM = """
import os, sys
from pathlib import Path
from selab.cli.main import main
from selab.experiments import compare

folder = Path(sys.argv.pop(1)) / os.environ["RANK"]
folder.mkdir(exist_ok=True)
os.chdir(folder)
compare.Comparison.measure = lambda self, report: report(f"timed by rank {os.environ['RANK']}", None)
if os.environ["RANK"] == "1":
    Path("results").write_text("no folder")
main()
"""


@pytest.fixture
def selab_in_two(family, tmp_path, monkeypatch):
    """Runs the program in two processes: words → what it did; its first process works in the folder `0`."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    family.with_name("program.py").write_text(PROGRAM)

    def run(*words):
        common = ["--data", "synthetic", "--epochs", 1, "--batch", 1000, "--threads", 1]
        return in_two(family.with_name("program.py"), tmp_path, *words, *common)

    return run


@pytest.fixture
def alone(family, tmp_path):
    """Trains with this process alone."""

    def run(name, *, folder="one", options=None, report=lambda _: None):
        return train(
            read_family(family)[name],
            images(),
            RECIPE,
            seed=0,
            folder=tmp_path / folder / name,
            options=options or Options(threads=1, checkpoint_s=0.0),
            report=report,
        )

    return run


def epochs(folder):
    return [json.loads(line) for line in (folder / "epochs.jsonl").read_text().splitlines()]


def assert_alike(ours, theirs):
    """Weights and losses differ by rounding alone: the order in which a batch's gradients are added."""
    assert len(ours) == len(theirs) == 3
    for one, other in zip(ours, theirs, strict=True):
        for key in ("train_loss", "test_loss"):
            assert one[key] == pytest.approx(other[key], rel=1e-5)
        for key in ("lr", "train_top1_pct", "test_top1_pct"):
            assert one[key] == other[key]


def test_two_processes_train_what_one_trains(two, alone, tmp_path):
    status, written = two("plain se_plain")
    assert status == 0, written
    for name in ("plain", "se_plain"):
        single = alone(name)
        assert_alike(epochs(tmp_path / "two" / name), epochs(tmp_path / "one" / name))
        weights = load_file(tmp_path / "two" / name / "weights.safetensors")
        torch.testing.assert_close(weights, load_file(single.weights), rtol=1e-4, atol=1e-6)


def test_one_of_two_is_killed_and_one_process_goes_on(two, alone, tmp_path):
    status, written = two("plain", fault="killed")
    assert status != 0
    # The one that is left says so itself, unless torchrun ends it before.
    assert "another process is gone" in written or "Signal 9 (SIGKILL)" in written
    told = []
    finished = alone("plain", folder="two", report=told.append)
    # It was killed while the second epoch's fourth batch was fetched: three steps are saved.
    assert (told[0].epoch, told[0].step) == (2, 4)
    assert finished.world == 1
    alone("plain")
    assert_alike(epochs(tmp_path / "two" / "plain"), epochs(tmp_path / "one" / "plain"))


def test_one_of_two_hangs(two):
    status, written = two("plain", fault="hangs", patience=3.0)
    assert status != 0
    assert "<TrainingError: plain, epoch 2 of 3, step 3 of 6, rank 0 of 2: another process is gone or hangs" in written
    assert "the same command resumes at the last checkpoint" in written


def test_a_signal_to_one_of_two_stops_both_and_two_go_on(two, alone, tmp_path):
    status, written = two("bn", fault="stopped")
    assert status != 0
    for rank in (0, 1):
        assert f"rank {rank} of 2: stopped; everything is saved" in written
    checkpoint = torch.load(tmp_path / "two" / "bn" / "checkpoint.pt", weights_only=True)
    facts = json.loads(checkpoint["facts"])
    assert (facts["epoch"], facts["step"], len(facts["sums"])) == (1, 4, 2)
    status, written = two("bn")
    assert status == 0, written
    assert len(epochs(tmp_path / "two" / "bn")) == 3


def test_an_error_of_the_first_process_is_everybody_s(two, alone, tmp_path):
    alone("plain", folder="two", options=Options(threads=1, accumulate=2))
    status, written = two("plain")
    assert status != 0
    assert written.count("holds the training of another request: its options.accumulate is 2, not 1") == 2


def test_one_of_two_speaks_for_a_training(selab_in_two, family, tmp_path):
    done = selab_in_two("train", "--arch", f"{family}:plain", "--json", "-")
    assert done.returncode == 0, done.stderr
    training = json.loads(done.stdout)
    assert training["world"] == 2
    (folder,) = (tmp_path / "0" / "results" / "runs").iterdir()
    assert training["weights"] == f"results/runs/{folder.name}/weights.safetensors"
    told = [line for line in done.stderr.splitlines() if line.startswith(("plain", "running code"))]
    assert len(told) == len(set(told)) == 3, told
    assert "epoch 1 of 1, step 10 of 10" in told[2]


def test_one_of_two_compares(selab_in_two, family, tmp_path):
    """What the first process has on disk decides for both; rank 1 finds nothing of it."""
    names = (f"{family}:plain", f"{family}:se_plain")
    baseline, variant = map(catalog.find, names)
    plan = ComparisonPlan(
        variant=variant,
        baseline=baseline,
        recipe=find_recipe("cifar_short"),
        options=Options(epochs=1, batch=1000, threads=1, channels_last=True),
        seeds=(0, 1),
        command="",
    )
    stopped = Comparison(plan, synthetic_set(), out=tmp_path / "0" / "results")

    def stop(label, _):
        if "seed 1" in label:
            raise SelabError("enough")

    with pytest.raises(SelabError, match="enough"):
        run_all([stopped], stop)
    # What is finished is known from the record alone.
    shutil.rmtree(tmp_path / "0" / "results" / "runs")

    words = ["--recipe", "cifar_short", "--seeds", 2, "--json", "record.json"]
    done = selab_in_two("compare", *names, *words)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("record: ") == 1
    for line in (
        "1 of 2 seeds already finished",
        "training 1 of 2 (seed 1, plain) …",
        "training 2 of 2 (seed 1, se_plain) …",
        "timed by rank 0 …",
    ):
        assert done.stderr.count(line) == 1, line
    assert "seed 0, " not in done.stderr
    assert "timed by rank 1" not in done.stderr
    record = read_accuracy_record(stopped.path)
    assert record.complete
    assert record.seeds[0] == stopped.seeds[0]
    assert (tmp_path / "0" / "record.json").read_bytes() == stopped.path.read_bytes()
    assert [path.name for path in (tmp_path / "1").iterdir()] == ["results"]


def test_a_batch_that_two_cannot_share(monkeypatch, family, tmp_path):
    three = ProcessGroup(rank=0, world=3, device=torch.device("cpu"))
    monkeypatch.setattr("selab.training.train.join", lambda *_, **__: three)
    with pytest.raises(TrainingError, match="a batch of 16 cannot be divided among 3 processes"):
        train(
            read_family(family)["plain"],
            images(),
            msgspec.structs.replace(RECIPE, epochs=1),
            seed=0,
            folder=tmp_path / "run",
            options=Options(),
            report=lambda _: None,
        )


def test_nobody_comes(monkeypatch):
    """Rank 1 of a job whose rank 0 is not there."""
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    with pytest.raises(SelabError, match=r"rank 1 of 2: cannot find the other processes: .*; start all of them"):
        join("cpu", patience_s=0.5)


def test_what_gloo_says_of_a_lost_process():
    assert lost_another(RuntimeError("[../gloo/transport/tcp/pair.cc:525] Connection closed by peer [127.0.0.1]:1"))
    assert lost_another(dist.DistBackendError("NCCL error"))
    assert not lost_another(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert signal.SIGKILL == 9  # as torchrun prints it
