"""What is wrong with a machine, and what helps."""

import json
from dataclasses import replace

import msgspec
import pytest

from selab.bench.machine import CpuReading, GpuReading, Surroundings, machine
from selab.experiments import doctor
from selab.report import checks

QUIET = Surroundings(
    load=0.0, clock_mhz=3000.0, most_clock_mhz=3000.0, turbo=False, smt=False, virtual=False, thread_variables={}
)


def reading(at_s, *, busy=0.0, stolen=0.0, own=0.0):
    return CpuReading(at_s=at_s, busy_s=busy, stolen_s=stolen, own_s=own)


@pytest.fixture
def quiet():
    place = msgspec.structs.replace(machine(), cores=4, governor="performance", quota_cores=None)
    return doctor.Snapshot(
        machine=place,
        surroundings=QUIET,
        before=reading(0),
        after=reading(2),
        gpu_facts={},
        gpu=None,
        gpu_problem="",
    )


def told(found):
    return " | ".join(one.what for one in doctor.problems(found))


def test_nothing_is_wrong_with_a_quiet_machine(quiet):
    assert doctor.problems(quiet) == []
    assert len(checks.machine_tables(quiet)) == 1


def test_each_thing_that_is_wrong_is_told_with_what_helps(quiet):
    def place(**changes):
        return replace(quiet, machine=msgspec.structs.replace(quiet.machine, **changes))

    def around(**changes):
        return replace(quiet, surroundings=replace(QUIET, **changes))

    for found, words in (
        (replace(quiet, after=reading(2, busy=3.0, own=0.2)), "other processes use 1.4 of 4 cores"),
        (replace(quiet, after=reading(2, stolen=1.0)), "the host took 0.50 cores away"),
        (place(governor="powersave"), "governor is powersave"),
        (place(quota_cores=1.5), "quota of 1.5 cores"),
        (place(cores=1), "one core"),
        (around(clock_mhz=1500.0), "runs at 1500 of 3000 MHz"),
        (around(thread_variables={"OMP_NUM_THREADS": "16"}), "OMP_NUM_THREADS is 16 on 4 cores"),
        (around(smt=True), "two hardware threads"),
        (around(virtual=True), "virtual machine"),
        (replace(quiet, gpu_problem="NVML is not to be had"), "NVML"),
        (
            replace(quiet, gpu=GpuReading(sm_clock_mhz=500, hard_throttle=("hardware thermal",), power_capped=True)),
            "hardware thermal | the GPU is at its power limit",
        ),
        (replace(quiet, gpu_facts={"other processes": "2"}), "2 other processes use the GPU"),
    ):
        assert words in told(found)
        assert all(one.advice for one in doctor.problems(found))
        assert len(checks.machine_tables(found)) == 2


def test_a_system_that_tells_nothing_is_shown_so(quiet):
    unknown = Surroundings(
        load=None, clock_mhz=None, most_clock_mhz=None, turbo=None, smt=None, virtual=False, thread_variables={}
    )
    found = replace(quiet, surroundings=unknown, before=None, after=None)
    assert doctor.problems(found) == []
    rows = dict(checks.machine_tables(found)[0].rows)
    assert rows["clock now"] == rows["used by others now"] == "unknown"


def test_the_machine_is_watched_for_as_long_as_it_says():
    waited = []
    found = doctor.inspect(sleep=waited.append)
    assert waited == [doctor.WATCHED_S]
    assert found.machine.cores >= 1


def test_the_shell_shows_it(selab, monkeypatch):
    monkeypatch.setattr(doctor, "WATCHED_S", 0.0)
    status, out, _ = selab("machine", "--json", "-")
    assert status == 0
    assert {"machine", "surroundings", "problems"} == set(json.loads(out))
