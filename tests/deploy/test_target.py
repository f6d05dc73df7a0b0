"""Runtimes to export for, and what is said when one cannot be used."""

import importlib
import re
from pathlib import Path

import onnx
import pytest
import spelled
import torch
from spelled import CHANNELS, SIZE, Net
from torch import nn

from selab.bench.machine import available_cores
from selab.deploy import target as targets
from selab.deploy.onnx import TARGET, _with_opset, block_operators, export_onnx, onnx_of
from selab.deploy.target import FIXED_THREADS, REGISTRY, Order, counted, exporting, needed, place_of, target
from selab.errors import DeviceError, ModelError, RecordError, UnknownNameError
from selab.experiments.job import Request, resolve
from selab.experiments.profiling import Profile
from selab.graphs.module import OnnxNetwork
from selab.records.types import RUNTIMES, TORCH


def order(tmp_path, **changes):
    made = {"model": nn.Conv2d(3, 4, 1).eval(), "image": (1, 3, 8, 8), "path": tmp_path / "a.onnx", "name": "net"}
    return Order(**{**made, **changes})


def graph():
    net = Net(shape=("n", CHANNELS, "h", "w"))
    return OnnxNetwork(net.model(spelled.pool_and_convolutions(net, net("Relu", "x"))), "net.onnx")


def test_every_runtime_but_pytorch_has_an_exporter():
    assert tuple(REGISTRY) == tuple(name for name in RUNTIMES if name != TORCH)


def test_a_file_type_stands_for_its_runtime():
    assert target("onnx") is target("onnxruntime") is TARGET


def test_a_name_that_is_none():
    with pytest.raises(UnknownNameError, match=r"--to openvin: unknown.*openvino.*allowed: onnx, onnxruntime"):
        target("openvin", option="--to")


@pytest.mark.parametrize(("runtime", "extra"), [("openvino", "openvino"), ("onnxruntime", "onnx")])
def test_a_missing_package_names_what_installs_it(runtime, extra):
    said = rf"runtime {runtime}: needs the package nowhere, which is not installed; run pip install 'selab\[{extra}\]'"
    with pytest.raises(DeviceError, match=said), needed(runtime):
        importlib.import_module("nowhere.at_all")


def test_a_package_that_does_not_load():
    said = rf"does not load with torch {re.escape(torch.__version__)}: libnothing\.so.*its own"
    with pytest.raises(DeviceError, match=said), needed("litert"):
        raise ImportError("libnothing.so: cannot open")


def test_a_failure_names_the_module(tmp_path):
    class Odd(nn.Module):
        def forward(self, x):
            raise RuntimeError("no such operator: aten::odd")

    said = r"net: cannot be exported for executorch \(in Odd\): no such operator"
    with pytest.raises(ModelError, match=said), exporting(order(tmp_path), "executorch"):
        nn.Sequential(Odd())(torch.zeros(1))


@pytest.mark.parametrize("name", [name for name in REGISTRY if name not in ("onnxruntime", "openvino")])
def test_an_onnx_network_is_not_for_every_runtime(tmp_path, name):
    with pytest.raises(ModelError, match=f"is an ONNX network, which runtime {name} does not take"):
        targets.only_module(order(tmp_path, model=graph()), name)


def test_counted():
    assert counted(["b", "a", "b"]) == {"b": 2, "a": 1}


# ---------------------------------------------------------------------------------------------------------------- onnx
def test_it_is_written_whole_or_not_at_all(tmp_path):
    class Odd(nn.Module):
        def forward(self, x):
            return torch.special.airy_ai(x)

    with pytest.raises(ModelError, match=r"net: cannot be exported to ONNX \(in Odd\): .*airy"):
        TARGET.write(order(tmp_path, model=Odd()))
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "folder").mkdir()
    with pytest.raises(RecordError):
        TARGET.write(order(tmp_path, path=tmp_path / "folder"))


def test_the_mode_is_restored(tmp_path):
    net = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout())
    net[1].eval()
    export_onnx(net, (1, 3, 4, 4), tmp_path / "a.onnx", name="net")
    assert [one.training for one in net.modules()] == [True, True, False]


def test_operators_without_names_get_some(tmp_path):
    network = graph()
    for node in network.model.graph.node:
        node.name = ""
    model = onnx_of(order(tmp_path, model=network, image=(1, CHANNELS, SIZE, SIZE)))
    names = [node.name for node in model.graph.node]
    assert all(names)
    assert len(set(names)) == len(names)
    inside = set(block_operators(model))
    assert {node.op_type for node in model.graph.node if node.name not in inside} == {"Relu"}


def images(number=3):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, CHANNELS, SIZE, SIZE, generator=generator) for _ in range(number)]


def quantised(tmp_path, network, **changes):
    pytest.importorskip("onnxruntime")
    path = tmp_path / "int8.onnx"
    wanted = {"image": (1, CHANNELS, SIZE, SIZE), "precision": "int8", "images": images(), "path": path}
    TARGET.write(order(tmp_path, model=network, **wanted, **changes))
    return onnx.load(path)


@pytest.mark.filterwarnings("ignore")
def test_int8_of_an_onnx_network_with_its_blocks_and_without(tmp_path):
    def quantised_layers(**changes):
        model = quantised(tmp_path, graph(), **changes)
        made = {node.output[0]: node.op_type for node in model.graph.node}
        return [made.get(node.input[1]) for node in model.graph.node if node.op_type == "Conv"]

    assert quantised_layers() == ["DequantizeLinear"] * 2
    assert quantised_layers(float_blocks=()) == [None] * 2


@pytest.mark.filterwarnings("ignore")
def test_int8_of_an_onnx_network_that_is_too_old_for_it():
    new = graph().model
    assert _with_opset(new, 13, "net") is new
    x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, (1, 3, 4, 4))
    y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, (1, 3, 4, 4))

    def old(kind, version):
        graph = onnx.helper.make_graph([onnx.helper.make_node(kind, ["x"], ["y"])], "g", [x], [y])
        return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", version)])

    assert _with_opset(old("Relu", 11), 13, "net").opset_import[0].version == 13
    with pytest.raises(ModelError, match=r"net: has opset 11, int8 needs 13, and onnx cannot convert it .* openvino"):
        _with_opset(old("Upsample", 11), 13, "net")


def test_int8_has_unsigned_activations(tmp_path):
    model = quantised(tmp_path, graph())
    kinds = {one.name: one.data_type for one in model.graph.initializer}
    points = {kinds[node.input[2]] for node in model.graph.node if node.op_type == "QuantizeLinear"}
    assert points == {onnx.TensorProto.UINT8}


def test_the_changes_of_layout_are_counted(tmp_path):
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3))
    made = order(tmp_path, model=net.eval(), image=(1, 3, 16, 16))
    TARGET.write(made)
    found = TARGET.partitions(made.path)
    assert found.subgraphs is None
    assert found.reorders == found.operators.get("ReorderInput", 0) + found.operators.get("ReorderOutput", 0)
    assert sum(found.operators.values()) >= 2


def test_a_program_is_compiled_for_its_number_of_threads(tmp_path, monkeypatch):
    """With layouts of weights for another number it takes several times as long."""
    compiled = []

    def fake(_program, *, package_path, inductor_configs):
        compiled.append((torch.get_num_threads(), inductor_configs["freezing"]))
        (tmp_path / "written").write_text(package_path)
        Path(package_path).write_bytes(b"compiled")

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", fake)
    before = torch.get_num_threads()
    for threads in (1, 2):
        target("aoti").write(order(tmp_path, path=tmp_path / "a.pt2", threads=threads))
    assert compiled == [(1, True), (2, True)]
    assert torch.get_num_threads() == before
    assert (tmp_path / "a.pt2").read_bytes() == b"compiled"


def test_only_such_a_program_has_one_row():
    rows = {
        runtime: Profile(resolve(Request(arch="se_small_cnn", runtime=runtime, phases=("forward",)))).measures_all_cores
        for runtime in ("onnxruntime", "aoti")
    }
    assert rows == {"onnxruntime": available_cores() > 1, "aoti": False}
    assert {"aoti"} == FIXED_THREADS


class Spectrum(nn.Module):
    def forward(self, x):
        return torch.fft.fft2(x).real


def test_an_operator_that_cannot_be_exported_is_named_with_its_module(tmp_path, capfd):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.spectrum = nn.Conv2d(3, 4, 1), Spectrum()

        def forward(self, x):
            return self.spectrum(self.conv(x))

    said = r"net: cannot be exported to ONNX \(in spectrum \(Spectrum\)\): .*aten::fft_fft2"
    with pytest.raises(ModelError, match=said):
        target("onnx").write(order(tmp_path, model=Net().eval()))
    # The exporter prints its whole graph.
    assert capfd.readouterr() == ("", "")
    assert not (tmp_path / "a.onnx").exists()


@pytest.mark.parametrize(
    ("message", "place"),
    [
        ("torch._ops.aten._fft_c2c.default is not there", " (in 1 (Spectrum))"),
        ("aten::conv2d", " (in 0 (Conv2d))"),
        ("aten::nothing of the kind", ""),
        ("no operator", ""),
    ],
)
def test_the_module_of_an_operator(message, place):
    net = nn.Sequential(nn.Conv2d(3, 4, 1), Spectrum())
    assert place_of(net, torch.zeros(1, 3, 4, 4), RuntimeError(message)) == place
    assert not net[0]._forward_hooks
    assert place_of(net, torch.zeros(1, 5, 4, 4), RuntimeError(message)) in ("", " (in 0 (Conv2d))")
