"""Networks as arms. The GPU's arms run here against a fake device whose time only work advances."""

import contextlib
import gc
import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from selab.bench import arms, backends, interleaved, latency
from selab.bench.arms import EventArm, GraphArm, StepArm
from selab.bench.backends import together
from selab.bench.backends import torch as torch_backend
from selab.bench.latency import measure_phase, measure_short, networks
from selab.bench.runner import phase_call
from selab.bench.sampler import Plan
from selab.errors import ModelError, OutOfMemoryError
from selab.records.types import PHASES

PLAN = Plan(warmup_least_s=0.0, warmup_most_s=0.05, sample_s=1e-4, budget_s=0.05)


class FakeGpu:
    """Calls are queued by the host in 10 µs and run by the device in 100 µs each; synchronize waits for the queue."""

    def __init__(self):
        self.host = 0.0
        self.device = 0.0
        self.calls = 0

    def call(self):
        self.host += 10e-6
        self.device = max(self.device, self.host) + 100e-6
        self.calls += 1

    def synchronize(self):
        self.host = max(self.host, self.device)

    def clock(self):
        return self.host

    def event(self):
        return FakeEvent(self)


class FakeEvent:
    def __init__(self, gpu):
        self.gpu = gpu

    def record(self):
        self.at = max(self.gpu.device, self.gpu.host)

    def elapsed_time(self, other):
        return (other.at - self.at) * 1e3


def test_wall_and_events_come_from_the_same_calls():
    gpu = FakeGpu()
    arm = EventArm(call=gpu.call, clock=gpu.clock, synchronize=gpu.synchronize, event=gpu.event)
    samples = arm.sample(10)
    assert gpu.calls == 10
    # The host queues the first call in 10 µs, then the device is busy for 10 x 100 µs.
    assert samples["eager_wall"].median_s == pytest.approx((10e-6 + 10 * 100e-6) / 10)
    assert samples["eager_event"].min_s == pytest.approx(100e-6, rel=0.11)
    assert arm.warm_call() == pytest.approx(110e-6)


def test_a_cold_cache_has_no_wall_time():
    gpu = FakeGpu()
    flushed = []
    arm = EventArm(
        call=gpu.call, clock=gpu.clock, synchronize=gpu.synchronize, event=gpu.event, flush=lambda: flushed.append(1)
    )
    assert set(arm.sample(3)) == {"eager_event"}
    assert len(flushed) == 3


def test_graph_replays():
    gpu = FakeGpu()
    sample = GraphArm(replay=gpu.call, clock=gpu.clock, synchronize=gpu.synchronize).sample(5)["graph"]
    assert sample.median_s == sample.min_s == pytest.approx((10e-6 + 5 * 100e-6) / 5)


class FakeMonitor:
    problem = "no NVML"

    def __init__(self, reading):
        self.reading = reading

    def read(self):
        return self.reading


@pytest.mark.parametrize(
    ("reading", "expected"),
    [
        (None, "unwatched"),
        ({"hard_throttle": (), "power_capped": True}, "power_capped"),
        ({"hard_throttle": ("hardware thermal",), "power_capped": False}, "void"),
        ({"hard_throttle": (), "power_capped": False}, "nothing"),
    ],
)
def test_what_nvml_says_at_a_quad_s_end(monkeypatch, reading, expected):
    from selab.bench.machine import GpuReading

    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 0)
    monitor = FakeMonitor(None if reading is None else GpuReading(sm_clock_mhz=1980, **reading))
    seen = arms.gpu_watch(monitor)()
    if expected == "void":
        assert "hardware thermal" in seen.reason
    else:
        assert [flag.name for flag in seen] == ([] if expected == "nothing" else [expected])


def test_allocator_growth_is_told_once(monkeypatch):
    sizes = iter([100, 300, 300])
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: next(sizes))
    from selab.bench.machine import GpuReading

    look = arms.gpu_watch(FakeMonitor(GpuReading(sm_clock_mhz=1980, hard_throttle=(), power_capped=False)))
    assert [flag.name for flag in look()] == ["allocator_growth"]
    assert look() == []


def test_clock_asymmetry():
    def arm(clocks):
        return EventArm(call=None, clock=None, synchronize=None, event=None, clocks_mhz=clocks)

    assert arms.clock_asymmetry(arm([1980, 1980]), arm([1980, 1965])) == []
    (flag,) = arms.clock_asymmetry(arm([1980] * 3), arm([1700] * 3))
    assert flag.name == "clock_asymmetry"


def test_the_whole_gpu_path_on_a_fake_device(monkeypatch, workload):
    """Eager and graph arms, controls and watch, through the sampler; only the device is not real."""
    gpu = FakeGpu()
    monkeypatch.setattr(torch.cuda, "synchronize", gpu.synchronize)
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: gpu.event())
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 0)
    monkeypatch.setattr(torch_backend, "GpuMonitor", lambda: FakeMonitor(None))
    monkeypatch.setattr(arms, "phase_call", lambda prepared, phase, capture=False: gpu.call)
    monkeypatch.setattr(arms, "captured", lambda call, pool: call)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    cuda = workload(device="cuda")
    nets = latency.Networks(baseline=None, again=None, variant=None, workload=cuda, cores=2)
    plan = Plan(budget_s=5.0)  # of the fake clock
    found = measure_phase(nets, "forward", plan, clock=gpu.clock)
    assert set(found) == {"eager_wall", "eager_event", "graph"}
    assert all(len(raw.run.quads) >= 10 and len(raw.controls) == 2 for raw in found.values())
    assert "unwatched" in {flag.name for flag in found["graph"].run.flags}
    assert set(measure_phase(nets, "backward", plan, clock=gpu.clock)) == {"eager_wall", "eager_event"}
    monkeypatch.setattr(torch_backend, "l2_flush", lambda: lambda: None)
    assert set(measure_phase(nets, "forward", plan, clock=gpu.clock, cold=True)) == {"eager_event"}


@pytest.mark.parametrize(
    ("phase", "compiled", "methods"),
    [
        ("forward", False, ["eager_wall", "eager_event", "graph"]),
        ("forward_backward", False, ["eager_wall", "eager_event", "graph"]),
        ("forward", True, ["eager_wall", "eager_event"]),
    ],
)
def test_several_networks_on_a_fake_device(phase, compiled, methods, net, workload, monkeypatch):
    gpu = FakeGpu()
    captures = []

    def captured(call, pool):
        captures.append(call)
        if len(captures) == 3:
            raise RuntimeError("operation not permitted when stream is capturing")
        return call

    monkeypatch.setattr(torch.cuda, "synchronize", gpu.synchronize)
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: gpu.event())
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 0)
    monkeypatch.setattr(torch_backend, "GpuMonitor", lambda: FakeMonitor(None))
    monkeypatch.setattr(torch_backend, "prepare", lambda model, work, seed: SimpleNamespace(workload=work))
    monkeypatch.setattr(torch_backend, "check_output", lambda prepared, name: None)
    monkeypatch.setattr(torch_backend, "saved_for_backward", lambda prepared: 7)
    monkeypatch.setattr(arms, "phase_call", lambda prepared, phase, capture=False: gpu.call)
    monkeypatch.setattr(arms, "captured", captured)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    networks = dict.fromkeys(("baseline", "again", "other"), net)
    pairs = [("baseline", "again"), ("baseline", "other")]
    work = workload(device="cuda", compiled=compiled)
    plan = Plan(budget_s=5.0, statistic="typical")
    found = interleaved.measure_networks(networks, pairs, work, phase, plan, lambda label, state: None, clock=gpu.clock)
    assert list(found.runs) == methods
    assert all(len(run.quads) >= 10 for runs in found.runs.values() for run in runs.values())
    if "graph" in methods:
        # The third network could not be captured: it has no run by that method, and the others do.
        assert list(found.runs["graph"]) == pairs[:1]
        assert list(found.failed) == [("graph", "other")]
    assert "unwatched" in {flag.name for flag in found.runs["eager_wall"]["baseline", "other"].flags}


@pytest.mark.parametrize("phase", ["forward", "backward", "forward_backward"])
def test_every_phase_runs_and_is_framed_by_controls(phase, net, workload):
    labels = []
    with networks(net(), net(), workload()) as nets:
        raw = measure_phase(nets, phase, PLAN, progress=lambda label, state: labels.append(label))["wall"]
    assert len(raw.run.quads) >= 1
    assert len(raw.controls) == 2
    changes = [label for index, label in enumerate(labels) if index == 0 or labels[index - 1] != label]
    assert changes == ["control", phase, "control"]


def test_random_state_and_threads_come_back(net, workload):
    first, second = net(), net()
    state, threads = torch.random.get_rng_state(), torch.get_num_threads()
    with networks(first, second, workload()) as nets:
        measure_phase(nets, "forward", PLAN)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.get_num_threads() == threads


def test_a_network_with_nan_is_refused_by_its_role(net, workload):
    broken = net()
    torch.nn.init.constant_(broken[4].bias, float("nan"))
    with pytest.raises(ModelError, match="variant: its output holds NaN"), networks(net(), broken, workload()):
        pass


def test_out_of_memory_in_a_phase(monkeypatch, net, workload):
    def exhausted(prepared, phase, capture=False):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    with networks(net(), net(), workload()) as nets:
        monkeypatch.setattr(arms, "phase_call", exhausted)
        with pytest.raises(OutOfMemoryError, match="smaller --batch"):
            measure_phase(nets, "forward", PLAN)


def test_a_later_method_that_fails_leaves_what_was_measured(monkeypatch, net, workload):
    runtime = backends.backend("torch")
    timing = next(iter(runtime.timings(workload(), "forward", clock=lambda: 0.0)))

    def exhausted(prepared, phase):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    def timings(workload, phase, *, clock, cold=False):
        yield replace(timing, arm=arms.cpu_arm(clock))
        yield replace(timing, arm=exhausted)

    found = []
    with networks(net(), net(), workload()) as nets:
        monkeypatch.setattr(runtime, "timings", timings, raising=False)
        with pytest.raises(OutOfMemoryError):
            found.extend(latency.phase_runs(nets, "forward", PLAN))
    assert [raw.method for raw in found] == ["wall"]


def test_a_captured_call_lives_as_long_as_its_replay(monkeypatch):
    """The memory of tensors that a graph reads is not the graph's: the replay of a freed one is an illegal access."""

    class Fake:
        def __getattr__(self, name):
            return lambda *_, **__: contextlib.nullcontext()

    replays = []
    monkeypatch.setattr(arms.torch, "cuda", Fake())
    monkeypatch.setattr(Fake, "Stream", lambda _: SimpleNamespace(wait_stream=lambda _: None), raising=False)
    monkeypatch.setattr(Fake, "current_stream", lambda _: SimpleNamespace(wait_stream=lambda _: None), raising=False)
    graph = SimpleNamespace(replay=lambda: replays.append(1))
    monkeypatch.setattr(Fake, "CUDAGraph", lambda _: graph, raising=False)

    cotangents = torch.ones(3)
    alive = weakref.ref(cotangents)

    def call(cotangents=cotangents):
        return cotangents.sum()

    replay = arms.captured(call)
    del call, cotangents
    gc.collect()
    assert alive() is not None
    assert replay() == 3
    assert replays == [1]
    del replay
    gc.collect()
    assert alive() is None


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_replays_on_a_device_give_what_the_call_gives(net, workload):
    with networks(net(), net(), workload(device="cuda")) as nets:
        pool = torch.cuda.graph_pool_handle()
        expected, replays = [], []
        for prepared in (nets.baseline, nets.variant):
            call = phase_call(prepared, "forward_backward", capture=True)
            expected.append([grad.clone() for grad in call()])
            replays.append(arms.captured(call, pool))
            del call
            # What was freed and given back is taken by others.
            torch.cuda.empty_cache()
            torch.full((1 << 24,), float("nan"), device="cuda")
        for wanted, replay in zip(expected, replays, strict=True):
            for grad, other in zip(wanted, replay(), strict=True):
                torch.testing.assert_close(other, grad)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("phase", ["forward", "backward", "forward_backward"])
def test_on_a_device(phase, net, workload):
    with networks(net(), net(), workload(device="cuda")) as nets:
        found = measure_phase(nets, phase, Plan(budget_s=0.5))
    assert {"eager_wall", "eager_event"} <= set(found)
    assert ("graph" in found) == (phase != "backward")


class FakeStep:
    """A forward pass of 3 s and a backward pass of 5 s, on a clock that only they advance."""

    def __init__(self):
        self.now = 0.0
        self.outputs = []

    def forward(self):
        self.now += 3
        return ["output"]

    def backward(self, outputs):
        self.now += 5
        self.outputs.append(outputs)

    def clock(self):
        return self.now


def test_the_two_phases_of_training_are_timed_by_the_same_calls():
    step = FakeStep()
    arm = StepArm(step=step, clock=step.clock, names={"forward_backward": "forward_backward", "backward": "backward"})
    assert arm.warm_call() == 8
    both = arm.sample(2)
    assert (both["forward_backward"].min_s, both["backward"].min_s) == (8, 5)
    assert step.now == 24
    alone = StepArm(step=step, clock=step.clock, names={"backward": "wall"}).sample(1)
    assert alone["wall"].mean_s == 5
    assert step.outputs == [["output"]] * 4


def test_short_runs_of_training_share_their_calls(net, workload):
    plan = PLAN.short(0.02)
    runtime = backends.backend("torch")
    assert together(runtime, workload(), PHASES) == [("forward",), ("backward", "forward_backward")]
    assert together(runtime, workload(), ("backward",)) == [("backward",)]
    with networks(net(), net(), workload()) as nets:
        both = measure_short(nets, ("backward", "forward_backward"), plan)
        alone = measure_short(nets, ("backward",), plan, control=False)
    assert [(raw.phase, raw.method, len(raw.controls)) for raw in [*both, *alone]] == [
        ("backward", "wall", 1),
        ("forward_backward", "wall", 1),
        ("backward", "wall", 0),
    ]
    backward, step = (raw.run for raw in both)
    assert len(backward.quads) == len(step.quads)
    for part, whole in zip(backward.quads, step.quads, strict=True):
        assert part.order == whole.order
        assert all(0 < one < all_of_it for one, all_of_it in zip(part.floor, whole.floor, strict=True))
