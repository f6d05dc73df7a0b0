"""A request is resolved once; the job is a value that says where its record goes and how to ask for it again."""

import shlex

import msgspec
import pytest

from selab.bench.heap import has_mallopt
from selab.errors import SelabError, SpecError, UnknownNameError
from selab.experiments.job import Job, Request, job_of, resolve
from selab.models import catalog
from selab.records.types import PHASES


def job(**changes):
    return resolve(Request(arch="se_small_cnn", **changes))


def test_the_workload_and_the_plan_come_from_the_request():
    made = job(batch=4, resolution=64, threads=2, quick=True, budget_s=3.0, fused=True)
    assert (made.workload.batch, made.workload.input_chw, made.workload.threads) == (4, (3, 64, 64), 2)
    assert made.workload.fused
    assert made.plan.target_half_width == 0.01
    assert job(thorough=True).plan.target_half_width < job().plan.target_half_width < made.plan.target_half_width
    assert job().workload.threads == 1


def test_an_input_is_taken_before_the_network_s_own_and_a_resolution_before_both():
    assert job(input_chw=(3, 48, 40)).workload.input_chw == (3, 48, 40)
    assert job(input_chw=(1, 48, 40), resolution=20).workload.input_chw == (1, 20, 20)


@pytest.mark.parametrize("arch", ["se_small_cnn", "resnet18+block=eca,stages=2-3", "resnet18+block=cbam"])
def test_a_job_travels_as_json(arch):
    made = resolve(Request(arch=arch, phases=("forward",), processes=3))
    assert msgspec.json.decode(msgspec.json.encode(made), type=Job) == made


def test_another_process_looks_no_name_up(monkeypatch):
    encoded = msgspec.json.encode(job())

    def fail(*_, **__):
        raise AssertionError("a name was looked up")

    monkeypatch.setattr(catalog, "find", fail)
    monkeypatch.setattr(catalog, "baseline_of", fail)
    made = msgspec.json.decode(encoded, type=Job)
    assert [one.name for one in made.pair] == ["se_small_cnn", "small_cnn"]
    assert made.changed(threads=3, quick=True).workload.threads == 3


def test_a_record_of_some_phases_has_a_path_of_its_own(tmp_path):
    whole, forward, two = (job(phases=phases) for phases in (PHASES, PHASES[:1], PHASES[1:]))
    names = [one.path(tmp_path, "m").name for one in (whole, forward, two)]
    start = f"se_small_cnn.cpu-b1-32-fp32{'-held' if has_mallopt() else ''}-t1"
    assert names == [f"{start}.json", f"{start}.forward.json", f"{start}.backward+forward_backward.json"]
    assert forward.paths(tmp_path, "m") == (tmp_path / "m" / names[1], tmp_path / "m" / names[0])
    assert whole.paths(tmp_path, "m") == (tmp_path / "m" / names[0],)


def test_the_path_names_another_baseline_alone(tmp_path):
    assert job(baseline="small_cnn").against is None
    other = job(baseline="se_small_cnn+reduction=8")
    assert other.against == "se_small_cnn+reduction=8"
    assert other.path(tmp_path, "m").name.startswith("se_small_cnn-vs-se_small_cnn+reduction=8.")


def test_the_command_asks_for_the_same_again():
    made = job(batch=8, memory_format="channels_last", held_heap=True, phases=("forward",), cold=True)
    options = "--arch se_small_cnn --batch 8 --cold --channels-last --hold-heap --phase forward"
    assert made.command() == f"selab profile {options}"
    assert shlex.split(made.command("tax"))[:2] == ["selab", "tax"]


@pytest.mark.parametrize(
    ("asked", "there", "held"),
    [
        ({}, True, True),
        ({}, False, False),
        ({"device": "cuda"}, True, False),
        ({"held_heap": False}, True, False),
        ({"held_heap": True}, False, True),
    ],
)
def test_the_heap_is_held_where_that_can_be_done_unless_the_user_says(monkeypatch, asked, there, held):
    monkeypatch.setattr("selab.experiments.job.has_mallopt", lambda: there)
    made = job(**asked)
    assert made.workload.held_heap is held
    said = {True: ["--hold-heap"], False: ["--free-heap"], None: []}[asked.get("held_heap")]
    assert [word for word in made.command().split() if "heap" in word] == said


def test_fresh_processes_are_the_default_on_a_cpu():
    assert not Request(arch="x").in_this_process
    assert Request(arch="x", processes=1).in_this_process
    assert Request(arch="x", device="cuda").in_this_process
    assert not Request(arch="x", device="cuda", processes=3).in_this_process


def test_a_baseline_is_missed_only_where_it_is_needed(toy):
    made = resolve(Request(arch="small_cnn"))
    assert made.baseline is None
    with pytest.raises(SpecError, match="is a baseline itself; profile its variant: --arch se_small_cnn"):
        _ = made.pair
    with pytest.raises(SpecError, match="has no baseline; name what to compare with"):
        _ = resolve(Request(arch=f"{toy}:toy")).pair


def test_networks_of_other_inputs_are_not_compared():
    with pytest.raises(SpecError, match=r"--baseline small_cnn: its input is \[3, 32, 32\], that of se_resnet18"):
        resolve(Request(arch="se_resnet18", baseline="small_cnn"))
    given = Request(arch="se_resnet18", baseline="small_cnn", input_chw=(3, 32, 32))
    assert job_of(given, catalog.find("se_resnet18"), catalog.find("small_cnn")).workload.input_chw == (3, 32, 32)


def test_an_unknown_name_says_where_it_was_given():
    with pytest.raises(UnknownNameError, match="--baseline small_cn: no such architecture; did you mean small_cnn"):
        job(baseline="small_cn")


# ------------------------------------------------------------------------------------------------------ other runtimes
def test_another_runtime_runs_forward_on_a_heap_of_its_own():
    made = job(runtime="openvino", dtype="int8", float_blocks=True, spelling="mean-conv", images="photos")
    assert made.request.phases == ("forward",)
    assert not made.workload.held_heap
    assert made.workload.slug == "cpu-b1-32-int8-openvino-mean-conv-floatse-t1"
    words = made.command()
    for part in ("--runtime openvino", "--dtype int8", "--float-blocks", "--spelling mean-conv", "--images photos"):
        assert part in words


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"spelling": "mean-conv"}, "--spelling: is of exported networks; add --runtime NAME"),
        ({"images": "photos"}, "--images: is of exported networks"),
        ({"float_blocks": True}, "--float-blocks: is of exported networks"),
        ({"runtime": "openvino", "float_blocks": True}, "--float-blocks: is of quantised networks; add --dtype int8"),
        ({"runtime": "openvino", "phases": ("backward",)}, "--phase backward: runtime openvino runs forward only"),
        ({"runtime": "openvino", "spelling": "no"}, "--spelling no: there is no such spelling; allowed: pool-conv"),
        ({"runtime": "openvino", "fused": True}, "--fused: is of networks in PyTorch; leave it out with --runtime"),
        ({"frozen": True}, "--freeze: is of compiled networks; add --compile"),
        (
            {"frozen": True, "compiled": True, "phases": ("forward_backward",)},
            "frozen weights runs forward only",
        ),
    ],
)
def test_what_only_other_runtimes_have(asked, said):
    with pytest.raises(SelabError, match=said):
        job(**asked)


def test_frozen_weights_are_for_inference():
    made = job(compiled=True, frozen=True, held_heap=False)
    assert made.request.phases == ("forward",)
    assert made.workload.slug == "cpu-b1-32-fp32-frozen-t1"
    assert "frozen" in made.workload.words()
    assert "--compile --freeze" in made.command()
