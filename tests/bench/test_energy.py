"""Energy from counters: here a device whose time and energy only work advances, and folders in place of powercap."""

from types import SimpleNamespace

import msgspec
import pytest

from selab import units
from selab.bench import energy as bench_energy
from selab.bench.energy import NvmlMeter, RaplMeter, energy_blocks, energy_meter, sample_j
from selab.bench.latency import networks
from selab.bench.sampler import Plan
from selab.errors import DeviceError, RecordError
from selab.experiments import profiling, workers
from selab.experiments.job import Request, resolve
from selab.experiments.profiling import Profile
from selab.experiments.workers import WorkerJob
from selab.records.energy import summarise
from selab.records.store import read_record, save
from selab.records.types import EnergyBlock
from selab.report.profiles import profile_table

PLAN = Plan(warmup_least_s=0.0, warmup_most_s=0.05, sample_s=1e-4, budget_s=0.05)


class Device:
    """A call takes 7 ms, and 2 J more than nothing; the counter moves every 100 ms."""

    name = "a device"

    def __init__(self, tick_s=0.1):
        self.now = self.used = self.shown = self.moved = 0.0
        self.tick_s = tick_s

    def sample(self, calls):
        for _ in range(calls):
            self.now += 0.007
            self.used += 2.0
            if self.now >= self.moved + self.tick_s:
                self.moved, self.shown = self.now, self.used
        return {}

    def joules(self):
        return self.shown

    def clock(self):
        return self.now


@pytest.mark.parametrize("calls", [1, 3, 40])
def test_a_sample_goes_from_step_to_step_of_the_counter(calls):
    device = Device()
    # Read at any moment, 0.3 s of a counter of ten steps a second would be wrong by up to a third.
    error = 0.5 * calls * 0.007 / 0.3
    assert sample_j(device, device, calls=calls, least_s=0.3, clock=device.clock) == pytest.approx(
        2.0, rel=error + 0.01
    )
    assert device.now >= 0.3


def test_a_counter_that_stands_still_is_an_error():
    device = Device(tick_s=1e9)
    with pytest.raises(DeviceError, match="a device: the counter stood still for 3 s"):
        sample_j(device, device, calls=3, least_s=0.3, clock=device.clock)
    assert device.now < 4


def package(folder, name, *, uj, most=1000):
    (folder / name).mkdir(parents=True)
    (folder / name / "energy_uj").write_text(f"{uj}\n", encoding="ascii")
    (folder / name / "max_energy_range_uj").write_text(f"{most}\n", encoding="ascii")
    return folder / name / "energy_uj"


def test_rapl_adds_the_packages_and_their_overflows(tmp_path):
    first, second = package(tmp_path, "intel-rapl:0", uj=900), package(tmp_path, "intel-rapl:1", uj=10)
    package(tmp_path, "intel-rapl:0:0", uj=5)  # a part of the first package
    meter = energy_meter("cpu", folder=tmp_path)
    assert isinstance(meter, RaplMeter)
    first.write_text("100", encoding="ascii")
    second.write_text("60", encoding="ascii")
    assert meter.joules() == pytest.approx(250e-6)
    first.write_text("300", encoding="ascii")
    assert meter.joules() == pytest.approx(450e-6)
    first.unlink()
    with pytest.raises(DeviceError, match="RAPL stopped answering"):
        meter.joules()


def test_without_a_counter_the_reason_is_said(tmp_path, monkeypatch):
    with pytest.raises(DeviceError, match="has no counter of a CPU package"):
        energy_meter("cpu", folder=tmp_path)
    package(tmp_path, "intel-rapl:0", uj=1)
    monkeypatch.setattr(bench_energy.RaplMeter, "_read", lambda _: (_ for _ in ()).throw(PermissionError(1, "no", "f")))
    with pytest.raises(DeviceError, match="f may be read by the administrator only"):
        energy_meter("cpu", folder=tmp_path)


def test_nvml_s_counter():
    monitor = SimpleNamespace(problem="NVML is not available (no)", energy_j=lambda: 12.5)
    assert NvmlMeter(monitor).joules() == 12.5
    monitor.energy_j = lambda: None
    with pytest.raises(DeviceError, match="NVML is not available"):
        NvmlMeter(monitor).joules()


class Counter:
    """A counter that moves by a joule at every reading."""

    name = "a counter"

    def __init__(self):
        self.read = 0.0

    def joules(self):
        self.read += 1.0
        return self.read


def test_blocks_of_networks(net, workload):
    with networks(net(), net(), workload()) as nets:
        blocks = list(energy_blocks(nets, "forward", PLAN, Counter(), blocks=3, sample_s=0.001, seed=1))
    assert len(blocks) == 3
    assert {block.order for block in blocks} <= {"ABBA", "BAAB"}
    assert all(0 < joules < 1 for block in blocks for joules in block.joules)


def blocks_of(*changes, baseline=3.0):
    return [
        EnergyBlock(order="ABBA", joules=(baseline, baseline * change, baseline * change, baseline))
        for change in changes
    ]


def test_figures_are_per_image_with_student_s_interval():
    found = summarise("forward", "a counter", blocks_of(1.19, 1.20, 1.21), batch=6)
    assert (found.baseline_j, found.variant_j) == pytest.approx((0.5, 0.6))
    assert found.ratio == pytest.approx((1.19 * 1.20 * 1.21) ** (1 / 3))
    # Student's t at two degrees of freedom is 4.303; the deviation of the logarithms is 0.008335.
    assert found.ratio_high / found.ratio == pytest.approx(1.02092, abs=2e-4)
    assert found.ratio_low * found.ratio_high == pytest.approx(found.ratio**2)
    two = summarise("forward", "a counter", blocks_of(1.19, 1.20), batch=6)
    assert (two.ratio_low, two.ratio_high) == (None, None)
    assert two.ratio == pytest.approx((1.19 * 1.20) ** 0.5)
    assert summarise("forward", "a counter", [], batch=6, error="no").ratio is None


@pytest.fixture
def measured(quick_plans, monkeypatch):
    monkeypatch.setattr(profiling, "energy_meter", lambda device: Counter())
    monkeypatch.setattr(workers, "_ENERGY_SAMPLE_S", {"cpu": (0.005, 0.005)})
    profile = Profile(resolve(Request(arch="se_small_cnn", threads=1, batch=2)))
    profile.run(lambda *_: None)
    return profile.record()


def test_a_profile_has_the_energy_of_both_networks(measured, tmp_path):
    assert list(measured.energy) == ["forward", "forward_backward"]
    one = measured.energy["forward"]
    assert (len(one.blocks), one.counter, one.error) == (4, "a counter", "")
    rows = {row[0]: row for row in profile_table(measured).rows}
    assert rows["energy, forward"][1] == units.joules(one.baseline_j)
    assert "energy: of one image, by a counter" in profile_table(measured).notes
    path = tmp_path / "record.json"
    save(measured, path)
    assert read_record(path).energy == measured.energy


def test_stored_energy_that_its_blocks_do_not_give_is_refused(measured, tmp_path):
    wrong = msgspec.structs.replace(measured.energy["forward"], variant_j=1.0)
    path = tmp_path / "record.json"
    save(msgspec.structs.replace(measured, energy={"forward": wrong}), path)
    with pytest.raises(RecordError, match=r"energy.forward.variant_j: is stored as 1.0, its blocks give"):
        read_record(path)
    wrong = msgspec.structs.replace(
        measured.energy["forward"], blocks=(EnergyBlock(order="ABBA", joules=(1, 1, 0, 1)),)
    )
    save(msgspec.structs.replace(measured, energy={"forward": wrong}), path)
    with pytest.raises(RecordError, match="have a sample that is not above 0 J"):
        read_record(path)


def test_a_profile_without_a_counter_says_so(quick_plans, monkeypatch):
    def none(device):
        raise DeviceError("there is no counter")

    monkeypatch.setattr(profiling, "energy_meter", none)
    profile = Profile(resolve(Request(arch="se_small_cnn", threads=1, phases=("forward",))))
    profile.run(lambda *_: None)
    record = profile.record()
    assert (record.energy, record.energy_left_out) == ({}, "there is no counter")
    assert "energy: not measured: there is no counter" in profile_table(record).notes


def test_a_fresh_process_measures_one_block_of_each_phase(monkeypatch, quick_plans):
    monkeypatch.setattr(workers, "energy_meter", lambda device: Counter())
    monkeypatch.setattr(workers, "_ENERGY_SAMPLE_S", {"cpu": (0.005, 0.005)})
    job = resolve(Request(arch="se_small_cnn", threads=1))
    order = WorkerJob(job=job, quad_seed=3, rows=(1, 2), seconds=0.02, control=False, energy=True)
    found = [one.spent for one in workers.short_runs(order, lambda: None) if one.spent is not None]
    assert [(one.phase, len(one.blocks), one.error) for one in found] == [
        ("forward", 1, ""),
        ("forward_backward", 1, ""),
    ]


def test_a_counter_that_fails_leaves_the_reason(net, workload, quick_plans):
    class Stuck(Counter):
        def joules(self):
            raise DeviceError("it stopped")

    job = resolve(Request(arch="se_small_cnn", threads=1))
    with networks(net(), net(), workload()) as nets:
        found = workers.spent(nets, "forward", job, Stuck(), blocks=2, sample_s=0.01, seed=0)
    assert (found.blocks, found.error) == ((), "it stopped")
