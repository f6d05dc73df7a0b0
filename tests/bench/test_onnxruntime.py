"""ONNX networks are measured in ONNX Runtime by the same sampler."""

import numpy as np
import onnx
import onnxruntime
import pytest
import spelled
import torch
from spelled import CHANNELS, SIZE, Net
from torch import nn

from selab.bench.backends import backend, together
from selab.bench.latency import measure_phase, measure_short, networks
from selab.bench.sampler import Plan
from selab.deploy.onnx import export_onnx
from selab.errors import DeviceError, ModelError, SpecError
from selab.experiments.job import Request, resolve
from selab.graphs.blocks import find_blocks
from selab.graphs.graph import Graph
from selab.graphs.module import OnnxNetwork
from selab.graphs.reading import read
from selab.models.build import build
from selab.models.catalog import find
from selab.records.store import read_record
from selab.records.types import PHASES

PLAN = Plan(warmup_least_s=0.0, warmup_most_s=0.05, sample_s=1e-4, budget_s=0.05)


def network(spelling=spelled.pool_and_convolutions):
    net = Net(shape=("n", CHANNELS, "h", "w"))
    return OnnxNetwork(net.model(spelling(net, net("Relu", "x"))), "net.onnx")


@pytest.fixture
def work(workload):
    def made(**changes):
        return workload(**{"input_chw": (CHANNELS, SIZE, SIZE), "runtime": "onnxruntime", **changes})

    return made


@pytest.mark.parametrize("threads", [1, 2])
def test_a_network_against_itself_without_its_blocks(work, threads):
    one = network()
    with networks(one.without_blocks(), one, work(threads=threads, batch=3)) as nets:
        raw = measure_phase(nets, "forward", PLAN)["wall"]
        (short,) = measure_short(nets, ("forward",), PLAN.short(0.02))
    assert len(raw.run.quads) >= 1
    assert len(raw.controls) == 2
    assert (short.method, len(short.controls)) == ("wall", 1)


def test_it_runs_forward_only(work):
    runtime = backend("onnxruntime")
    assert runtime.phases == ("forward",)
    assert together(runtime, work(), PHASES) == [(one,) for one in PHASES]
    one = network()
    with networks(one, one, work()) as nets, pytest.raises(ModelError, match="cannot run backward"):
        measure_phase(nets, "backward", PLAN)


def test_the_input_is_that_of_the_seed(work):
    runtime = backend("onnxruntime")
    outputs = []
    for seed in (1, 1, 2):
        session = runtime.prepare(network(), work(), seed=seed)
        runtime.check_output(session, "net")
        outputs.append(session.outputs()[0])
    np.testing.assert_array_equal(outputs[0], outputs[1])
    assert not np.array_equal(outputs[0], outputs[2])
    assert outputs[0].shape == (2, CHANNELS, SIZE, SIZE)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"device": "cuda"}, "--device cuda"),
        ({"dtype": "bf16"}, "--dtype bf16"),
        ({"memory_format": "channels_last"}, "--channels-last"),
        ({"compiled": True}, "--compile"),
        ({"fused": True}, "--fused"),
        ({"mode": "train"}, "--mode train"),
    ],
)
def test_what_it_has_not(work, changes, said):
    with pytest.raises(DeviceError, match=f"{said}: runtime onnxruntime has it not"):
        backend("onnxruntime").prepare(network(), work(**changes), seed=0)


def test_a_module_is_no_onnx_network(work):
    with pytest.raises(ModelError, match="Identity is no ONNX network; name a file"):
        backend("onnxruntime").prepare(nn.Identity(), work(), seed=0)


def test_what_the_runtime_refuses_is_one_line(work):
    net = Net(shape=("n", CHANNELS, "h", "w"))
    reshaped = net("Reshape", "x", net.constant(np.array([7, 11], np.int64)))
    one = OnnxNetwork(net.model(reshaped, dims=2), "net.onnx")
    with (
        pytest.raises(ModelError, match="baseline: ONNX Runtime fails: ") as error,
        networks(one, one, work()),
    ):
        pass
    assert "\n" not in str(error.value)


def test_an_output_that_is_not_finite(work):
    net = Net(shape=("n", CHANNELS, "h", "w"))
    one = OnnxNetwork(net.model(net("Log", net("Neg", net("Abs", "x")))), "net.onnx")
    with pytest.raises(ModelError, match="its output holds NaN"), networks(one, one, work()):
        pass


def test_pytorch_does_not_run_it():
    with pytest.raises(ModelError, match=r"net\.onnx: is an ONNX network, which PyTorch does not run"):
        network()(None)


# ------------------------------------------------------------------------------------------------- on a command line
@pytest.fixture
def file(tmp_path):
    path = tmp_path / "net.onnx"
    onnx.save(network(spelled.paddle).model, path)
    return path


def test_the_baseline_is_the_same_file_without_its_blocks(file):
    job = resolve(Request(arch=str(file), input_chw=(CHANNELS, SIZE, SIZE)))
    assert job.baseline is not None
    assert job.baseline.name == f"{file}:no_se"
    assert (job.workload.runtime, job.workload.held_heap, job.request.phases) == ("onnxruntime", False, ("forward",))
    assert job.variant.facts_hash != job.baseline.facts_hash
    with pytest.raises(SpecError, match="--phase backward: runtime onnxruntime runs forward only"):
        resolve(Request(arch=str(file), phases=("backward",)))


def test_count_sites_and_show(selab, file):
    size = ("--input", f"{CHANNELS}x{SIZE}x{SIZE}")
    status, out, _ = selab("count", "--arch", file, *size)
    assert (status, "1 block" in out) == (0, True)
    status, out, _ = selab("sites", "--arch", file, *size)
    assert (status, "8→2" in out, "6×6" in out) == (0, True, True)
    status, out, _ = selab("show", file, *size)
    assert (status, "1 hardsigmoid" in out) == (0, True)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("count",), "the size of its input is free (8x?x?); give it as --input CxHxW"),
        (("count", "--input", "3x6x6"), "its input is ?x8x?x?, not 1x3x6x6; only the ? may be chosen"),
        (("count", "--input", "8x6x6", "--se", "reduction=4,sites=a"), "an ONNX network takes no blocks"),
        (("sites", "--input", "8x6x6", "--depth", 2), "has no tree of modules"),
        (("profile", "--input", "8x6x6", "--compile"), "--compile: runtime onnxruntime has it not"),
        (("profile", "--input", "8x6x6", "--phase", "backward"), "runs forward only"),
    ],
)
def test_bad_input_is_one_line(selab, file, tmp_path, words, said):
    command, *others = words
    out = ("--out", tmp_path / "r", "--budget", 0.2) if command == "profile" else ()
    status, _, err = selab(command, "--arch", file, *others, *out)
    assert status != 0
    assert said in " ".join(err.split())
    assert not (tmp_path / "r").exists()


def test_a_profile(selab, file, tmp_path, quick_plans):
    words = ("profile", "--arch", file, "--input", f"{CHANNELS}x{SIZE}x{SIZE}", "--threads", 1, "--budget", 0.5)
    status, out, _ = selab(*words, "--out", tmp_path / "r")
    assert status == 0
    assert "forward, 1 thr" in out
    (record,) = (tmp_path / "r").rglob("*.json")
    assert "onnxruntime" in record.name


def test_a_file_without_a_block_names_the_next_step(selab, tmp_path):
    net = Net()
    onnx.save(net.model(net("Relu", "x")), tmp_path / "plain.onnx")
    status, _, err = selab("profile", "--arch", tmp_path / "plain.onnx", "--out", tmp_path / "r")
    assert status != 0
    assert "has no SE block" in " ".join(err.split())


# -------------------------------------------------------------------------------------------------- networks of PyTorch
def test_a_network_of_the_catalog_is_exported_and_measured(selab, tmp_path, quick_plans):
    words = ("profile", "--arch", "se_small_cnn", "--runtime", "onnxruntime", "--threads", 1, "--budget", 0.5)
    status, _, err = selab(*words, "--out", tmp_path / "r")
    assert status == 0, err
    (path,) = (tmp_path / "r").rglob("*.json")
    record = read_record(path)
    assert (record.arch, record.workload.runtime, list(record.latency)) == ("se_small_cnn", "onnxruntime", ["forward"])
    assert record.cost.macs_backward.all > 0  # counted in PyTorch
    assert "--runtime onnxruntime" in record.command


@pytest.mark.parametrize("arch", ["se_small_cnn", "se_shufflenet_v2_x0_5", "mobilenet_v3_small"])
def test_what_is_exported_computes_the_same_and_has_its_blocks(arch, tmp_path):
    variant = find(arch)
    built = build(variant, seed=3)
    image = (1, *variant.input_chw)
    export_onnx(built.model, image, tmp_path / "net.onnx", name=arch)
    assert built.model.training
    model = read(tmp_path / "net.onnx")
    assert len(find_blocks(Graph(model))) == len(built.insertions)
    x = torch.randn(image, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = built.model.eval()(x).numpy()
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": x.numpy()})
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


def test_a_network_that_cannot_be_exported_is_named(tmp_path):
    class Odd(nn.Module):
        def forward(self, x):
            return torch.linalg.matrix_exp(x[..., :4, :4])

    with pytest.raises(ModelError, match=r"odd: cannot be exported to ONNX \(in Odd\): ") as error:
        export_onnx(Odd(), (1, 3, 8, 8), tmp_path / "net.onnx", name="odd")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "net.onnx").exists()
