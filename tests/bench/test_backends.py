"""Runtimes are found by name; one that is registered here is measured end to end, on a clock that work advances."""

import sys
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import SimpleNamespace

import msgspec
import pytest
from torch import nn

from selab.bench import backends, latency
from selab.bench.backends import Backend, Timing, backend
from selab.bench.interleaved import measure_networks
from selab.bench.latency import measure_phase, networks
from selab.bench.memory import memory
from selab.bench.sampler import Plan, WallArm
from selab.errors import DeviceError, ModelError, UnknownNameError
from selab.records import estimate
from selab.records.types import Flag, Memory, Workload, lined_json


@dataclass
class Compiled:
    """What the toy runtime makes of a network: a call takes 10 ms per module in it."""

    call_s: float
    seed: int


class Toy:
    """A runtime of inference only, whose time is its own."""

    name = "toy"
    phases = ("forward",)

    def __init__(self):
        self.now = 0.0
        self.diary = []

    def clock(self):
        return self.now

    @contextmanager
    def session(self, workload, *, seed):
        self.diary.append(("session", workload.threads, seed))
        yield
        self.diary.append(("end",))

    def prepare(self, model, workload, *, seed):
        return Compiled(call_s=0.010 * len(list(model.modules())), seed=seed)

    def check_output(self, prepared, name):
        self.diary.append(("check", name, prepared.seed))
        if prepared.call_s > 1:
            raise ModelError(f"{name}: too slow for a toy")

    def timings(self, workload, phase, *, clock, cold=False):
        def arm(prepared, phase):
            def call():
                self.now += prepared.call_s

            return WallArm(call=call, clock=clock, method="toy_wall")

        yield Timing(
            methods=("toy_wall",),
            arm=arm,
            statistic="mean",
            watch=lambda: lambda: [Flag(name="unwatched", detail="toys are not watched")],
            pair_flags=lambda a, b: [Flag(name="clock_asymmetry", detail="toys differ")],
        )

    def training_step(self, workload, *, clock):
        return None

    @contextmanager
    def translated_errors(self, what):
        try:
            yield
        except ZeroDivisionError:
            raise ModelError(f"{what}: the toy broke") from None

    def memory(self, model, workload, *, seed, phases):
        return Memory(method="toy", peak_forward_bytes=seed if "forward" in phases else None)

    def saved_for_backward(self, prepared):
        raise AssertionError("there is no backward pass")


@pytest.fixture
def toy(monkeypatch):
    one: Backend[Compiled] = Toy()
    monkeypatch.setitem(sys.modules, "toy_runtime", SimpleNamespace(BACKEND=one))
    monkeypatch.setitem(backends.REGISTRY, "toy", "toy_runtime:BACKEND")
    return one


def chain(modules):
    return nn.Sequential(*(nn.Identity() for _ in range(modules - 1)))


def test_a_registered_runtime_is_measured(toy, workload):
    work = workload(runtime="toy")
    with networks(chain(5), chain(6), work, seed=3, names=("plain", "other")) as nets:
        raw = measure_phase(nets, "forward", Plan(), clock=toy.clock)
    assert list(raw) == ["toy_wall"]
    found = raw["toy_wall"]
    assert estimate.estimate([found.run], "mean").ratio == pytest.approx(1.2)
    assert estimate.noise_floor(found.controls, "mean") == pytest.approx(0.0, abs=1e-9)
    names = [flag.name for flag in found.run.flags if flag.name in ("unwatched", "clock_asymmetry")]
    assert names == ["unwatched", "clock_asymmetry"]
    assert "clock_asymmetry" not in {flag.name for control in found.controls for flag in control.flags}
    checks = [("check", name, 3) for name in ("plain", "plain", "other")]
    assert toy.diary == [("session", 1, 3), *checks, ("end",)]


def test_several_networks_in_a_registered_runtime(toy, workload):
    def broken():
        return chain(1 // 0)

    made = {
        "baseline": lambda: chain(5),
        "again": lambda: chain(5),
        "other": lambda: chain(10),
        "slow": lambda: chain(200),
        "broken": broken,
    }
    pairs = [("baseline", name) for name in made if name != "baseline"]
    found = measure_networks(
        made, pairs, workload(runtime="toy"), "forward", Plan(), lambda label, state: None, clock=toy.clock
    )
    runs = found.runs["toy_wall"]
    assert list(runs) == pairs[:2]
    assert estimate.estimate([runs["baseline", "other"]], "mean").ratio == pytest.approx(2.0)
    assert found.failed == {
        ("toy_wall", "slow"): "slow: too slow for a toy",
        ("toy_wall", "broken"): "broken: the toy broke",
    }
    assert found.saved_for_backward == {}


def test_memory_is_the_runtime_s_own(toy, workload):
    assert memory(chain(2), workload(runtime="toy"), seed=7) == Memory(method="toy", peak_forward_bytes=7)
    assert memory(nn.Conv2d(3, 4, 3), workload()).method != "toy"


def test_a_phase_that_a_runtime_lacks_is_refused(toy, workload):
    work = workload(runtime="toy")
    words = "runtime toy cannot run backward; it runs forward"
    with networks(chain(5), chain(6), work) as nets, pytest.raises(ModelError, match=words):
        measure_phase(nets, "backward", Plan(), clock=toy.clock)
    with pytest.raises(ModelError, match=words):
        measure_networks({"baseline": chain}, [], work, "backward", Plan(), lambda label, state: None, clock=toy.clock)


def test_unknown_and_missing_runtimes(monkeypatch):
    with pytest.raises(UnknownNameError, match="runtime torhc: unknown; did you mean torch"):
        backend("torhc")
    monkeypatch.setitem(backends.REGISTRY, "far", "no_such_package.backend:BACKEND")
    with pytest.raises(DeviceError, match="runtime far: needs the package no_such_package, which is not installed"):
        backend("far")
    monkeypatch.setitem(backends.REGISTRY, "bug", "selab.bench.backends.no_such_module:BACKEND")
    with pytest.raises(ModuleNotFoundError):
        backend("bug")


def test_every_registered_runtime_has_its_name_and_the_protocol():
    methods = [name for name in vars(Backend) if not name.startswith("_")]
    assert {"prepare", "check_output", "timings", "session", "memory"} <= set(methods)
    for name in backends.REGISTRY:
        # What is not installed is looked at where it is.
        with suppress(DeviceError):
            one = backend(name)
            assert one.name == name
            assert all(hasattr(one, method) for method in methods)


def test_the_control_runs_before_and_after_under_its_own_plan_and_seed(net, workload, monkeypatch):
    asked = []
    original = latency.measure

    def spy(baseline, variant, plan, **given):
        asked.append((plan, given["seed"], baseline, variant))
        return original(baseline, variant, plan, **given)

    monkeypatch.setattr(latency, "measure", spy)
    plan = Plan(warmup_least_s=0.0, warmup_most_s=0.05, sample_s=1e-4, budget_s=0.05)
    with networks(net(), net(), workload()) as nets:
        measure_phase(nets, "forward", plan, seed=10)
    control = plan.for_control()
    assert control.budget_s == plan.budget_s / 2
    assert [one[:2] for one in asked] == [(control, 11), (plan, 10), (control, 12)]
    (before, middle, after) = asked
    assert before[2:] == after[2:]
    assert middle[2] is before[2]
    assert middle[3] is not before[3]


# ------------------------------------------------------------------------------------------------------ in a workload


def test_a_torch_workload_is_written_as_before(workload):
    raw = msgspec.json.encode(workload())
    assert raw == (
        b'{"batch":2,"input_chw":[3,8,8],"device":"cpu","dtype":"fp32","memory_format":"contiguous","mode":"auto",'
        b'"threads":1,"compiled":false,"fused":false,"held_heap":false}'
    )
    read = msgspec.json.decode(raw, type=Workload)
    assert read.runtime == "torch"
    spelled = workload(runtime=str(b"torch", "ascii"))  # an equal name, but another object
    assert msgspec.json.encode(spelled) == raw
    named = msgspec.json.decode(raw[:-1] + b',"runtime":"torch"}', type=Workload)
    assert named == read
    assert msgspec.json.encode(named) == raw


def test_another_runtime_is_written_and_part_of_the_slug(workload):
    work = workload(runtime="toy")
    assert msgspec.json.decode(lined_json(work), type=Workload) == work
    assert b'"runtime": "toy"' in lined_json(work)
    assert work != workload()
    assert (work.slug, workload().slug) == ("cpu-b2-8-fp32-toy-t1", "cpu-b2-8-fp32-t1")
