import os

import pytest
import torch

from selab.bench import machine as machine_module
from selab.bench.machine import (
    CpuReading,
    contention_flags,
    cores_of_others,
    cores_of_others_since,
    has_bf16,
    int8_words,
    machine,
    read_cpu,
    threads_and_affinity,
)


def test_a_machine_tells_what_decides_a_latency_and_nothing_private():
    here = machine()
    assert here.cores >= 1
    assert here.libraries["torch"] == torch.__version__
    assert here.name == here.name.lower()
    assert os.uname().nodename not in repr(here)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("flags : fpu avx512_vnni avx512f\n", "int8 products by the processor's avx512_vnni"),
        ("Features : fp asimd asimddp i8mm\n", "int8 products by the processor's asimddp, i8mm"),
        ("flags : fpu avx2 avx_vnni_int16\n", "int8 gains little here"),
        ("", None),
    ],
)
def test_whether_int8_pays(monkeypatch, text, said):
    monkeypatch.setattr(machine_module, "_read", {"/proc/cpuinfo": f"model name : ACME\n{text}"}.get)
    found = int8_words()
    assert found is None if said is None else said in found


@pytest.mark.parametrize(
    ("text", "has"),
    [
        ("flags : fpu avx512_bf16\n", True),
        ("Features : fp asimd bf16\n", True),
        ("flags : fpu avx512_vnni\n", False),
        ("", None),
    ],
)
def test_whether_bf16_pays(monkeypatch, text, has):
    monkeypatch.setattr(machine_module, "_read", {"/proc/cpuinfo": f"model name : ACME\n{text}"}.get)
    assert has_bf16() is has


@pytest.fixture
def host(monkeypatch):
    """Fake a machine: its processors, the ones in the process's mask, and files of cgroup v2."""

    def make(*, processors, mask, **files):
        monkeypatch.setattr(os, "cpu_count", lambda: processors)
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: mask, raising=False)
        texts = {"/proc/cpuinfo": "model name : ACME Core(TM) 9 CPU"}
        texts |= {f"/sys/fs/cgroup/{name.replace('_', '.', 1)}": text for name, text in files.items()}
        monkeypatch.setattr(machine_module, "_read", texts.get)

    return make


def test_the_name_does_not_follow_the_affinity_mask(host):
    host(processors=2, mask={0, 1})
    whole = machine()
    host(processors=2, mask={0})
    pinned = machine()
    assert (whole.name, whole.cores) == ("acme-core-9-2c", 2)
    assert (pinned.name, pinned.cores) == ("acme-core-9-2c", 1)


@pytest.mark.parametrize(
    ("files", "name"),
    [
        ({"cpuset_cpus.effective": "0-3,8\n"}, "acme-core-9-5c"),
        ({"cpu_max": "150000 100000"}, "acme-core-9-2c"),
        ({"cpu_max": "max 100000", "cpuset_cpus.effective": ""}, "acme-core-9-64c"),
    ],
)
def test_the_name_counts_the_processors_of_the_container(host, files, name):
    host(processors=64, mask={3}, **files)
    assert (machine().name, machine().cores) == (name, 1)


def reading(at, busy=0.0, stolen=0.0, own=0.0, faults=0):
    return CpuReading(at_s=at, busy_s=busy, stolen_s=stolen, own_s=own, page_faults=faults)


@pytest.mark.parametrize(
    ("after", "threads", "names"),
    [
        (reading(10, busy=10, own=10), 1, []),
        (reading(10, busy=10.5, own=10), 1, []),
        (reading(10, busy=15, own=10), 1, ["neighbours"]),
        (reading(10, busy=23, own=10), 1, ["contention"]),
        (reading(10, busy=25, own=20), 2, ["contention"]),
        (reading(10, busy=10, own=10, stolen=0.5), 1, ["stolen_time"]),
        (reading(10, busy=20, own=20), 4, ["oversubscribed"]),
        (reading(10, busy=10, own=10, faults=90_000), 1, []),
        (reading(10, busy=10, own=10, faults=900_000), 1, ["page_faults"]),
    ],
)
def test_flags(after, threads, names):
    flags = contention_flags(reading(0), after, threads=threads, cores=2)
    assert [flag.name for flag in flags] == names


def test_without_counters_there_is_nothing_to_tell():
    assert contention_flags(None, None, threads=1, cores=2) == []


def test_readings_too_near_tell_nothing_of_others():
    # A step of the counters is 10 ms: over 20 ms it would be half a core.
    assert cores_of_others(reading(0), reading(0.02, busy=0.03, own=0.02)) == 0
    assert cores_of_others(reading(0), reading(1.0, busy=1.5, own=1.0)) == pytest.approx(0.5)


@pytest.mark.skipif(read_cpu() is None, reason="no counters here")
def test_others_are_told_over_a_time_that_is_long_enough(monkeypatch):
    asked = []
    monkeypatch.setattr("selab.bench.machine.cores_of_others", lambda *both: asked.append(both) or 0.25)
    assert cores_of_others_since(read_cpu()) == 0.25
    (before, after), *_ = asked
    assert after.at_s - before.at_s >= 0.2
    assert cores_of_others_since(None) == 0


def test_counters_grow():
    before, after = read_cpu(), read_cpu()
    assert before is None or after.at_s >= before.at_s


def test_threads_and_affinity_come_back():
    before = torch.get_num_threads(), os.sched_getaffinity(0)
    inside = []

    def fail():
        inside.extend([torch.get_num_threads(), len(os.sched_getaffinity(0))])
        raise KeyError

    with pytest.raises(KeyError), threads_and_affinity(1):
        fail()
    assert inside == [1, 1]
    assert (torch.get_num_threads(), os.sched_getaffinity(0)) == before
