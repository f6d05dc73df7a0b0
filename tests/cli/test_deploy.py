"""Export for another runtime and timings of a phone, on the command line."""

import json
from pathlib import Path

import onnx
import pytest
import spelled
from spelled import CHANNELS, SIZE, Net

pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.filterwarnings("ignore")
TIMED = "Model executed successfully 50 time(s) in {} ms.\n"


@pytest.fixture
def graph(tmp_path):
    net = Net(shape=("n", CHANNELS, "h", "w"))
    path = tmp_path / "net.onnx"
    onnx.save(net.model(spelled.paddle(net, net("Relu", "x"))), path)
    return path


def test_a_network_with_and_without_se(selab, tmp_path):
    path = tmp_path / "small.onnx"
    status, out, err = selab("export", "--arch", "se_small_cnn", "--to", "onnx", "--out", path)
    assert status == 0, err
    assert path.stat().st_size > 5_000_000
    said = " ".join(out.split())
    assert "SE blocks: 4 blocks written as pool-conv." in said
    assert "Note: the weights are random (--weights FILE)." in said
    assert "8 inputs of noise" in said
    assert [one.name for one in tmp_path.iterdir()] == ["small.onnx"]


def test_the_spelling_that_is_asked_for(selab, tmp_path):
    words = ("export", "--arch", "se_small_cnn", "--to", "onnx", "--spelling", "mean-linear", "--json", "-")
    status, out, _ = selab(*words, "--out", tmp_path / "a.onnx")
    assert status == 0
    facts = json.loads(out)
    assert (facts["exported"]["spelling"], facts["exported"]["blocks"]) == ("mean-linear", 4)
    assert facts["exported"]["agreement"]["max_relative"] < 1e-4
    kinds = [node.op_type for node in onnx.load(tmp_path / "a.onnx").graph.node]
    assert kinds.count("ReduceMean") == 4


def test_int8_says_what_both_choices_cost(selab, tmp_path):
    words = ("export", "--arch", "se_small_cnn", "--to", "onnx", "--dtype", "int8", "--float-blocks", "--json", "-")
    status, out, err = selab(*words, "--out", tmp_path / "a.onnx")
    assert status == 0, err
    facts = json.loads(out)
    assert facts["float_blocks"] is True
    one, other = facts["exported"]["agreement"], facts["agreement_otherwise"]
    assert 0 < one["max_relative"] < 0.5
    assert 0 < other["max_relative"] < 0.5
    assert (tmp_path / "a.onnx").stat().st_size < 2_000_000
    nodes = onnx.load(tmp_path / "a.onnx").graph.node
    layers = [node for node in nodes if node.op_type == "Conv" and "/se/" in node.name]
    made = {name for node in nodes if node.op_type == "DequantizeLinear" for name in node.output}
    assert len(layers) == 8
    assert not any(set(node.input) & made for node in layers)
    assert any("calibrated on noise" in remark for remark in facts["remarks"])


def test_an_onnx_file_in_int8(selab, graph, tmp_path):
    size = ("--input", f"{CHANNELS}x{SIZE}x{SIZE}")
    words = ("export", "--arch", graph, "--to", "onnx", "--dtype", "int8", "--out", tmp_path / "int8.onnx")
    status, out, err = selab(*words, *size)
    assert status == 0, err
    assert "int8, SE in fp32" in out
    kinds = [node.op_type for node in onnx.load(tmp_path / "int8.onnx").graph.node]
    assert "QuantizeLinear" in kinds


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--to", "tensorrt"), "--to tensorrt: unknown"),
        (("--to", "onnx", "--out", "net.pte"), "net.pte: is no name for onnxruntime; end it in .onnx"),
        (("--to", "onnx", "--dtype", "bf16"), "bf16: exported are fp32 and int8"),
        (("--to", "onnx", "--spelling", "nope"), "--spelling nope: there is no such spelling; allowed: pool-conv"),
        (("--to", "onnx", "--float-blocks"), "--float-blocks: is of quantised networks; add --dtype int8"),
        (("--to", "onnx", "--dtype", "int8", "--images", "nowhere"), "nowhere: is no folder"),
        (("--to", "onnx", "--input", "x=3x32x32"), "takes several inputs; only networks of one image"),
        (("--to", "onnx", "--out", "nowhere/else/net.onnx", "--weights", "missing.pt"), "missing.pt"),
    ],
)
def test_bad_input_is_one_line(selab, tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    status, _, err = selab("export", "--arch", "se_small_cnn", *words)
    assert status != 0
    assert said in " ".join(err.split())
    assert list(tmp_path.rglob("*.onnx")) == []


@pytest.mark.parametrize("name", ["executorch", "litert", "aoti"])
def test_a_runtime_that_takes_no_onnx_file(selab, graph, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    status, _, err = selab("export", "--arch", graph, "--to", name, "--input", f"{CHANNELS}x{SIZE}x{SIZE}")
    assert status != 0
    assert "is an ONNX network, which it does not take; use onnxruntime or openvino" in " ".join(err.split())
    assert [one.name for one in tmp_path.iterdir()] == ["net.onnx"]


def test_an_onnx_file_is_not_written_over_itself(selab, graph, tmp_path, monkeypatch):
    monkeypatch.chdir(Path(graph).parent)
    before = Path(graph).read_bytes()
    status, _, err = selab("export", Path(graph).name, "--to", "onnx", "--replace")
    assert status != 0
    assert f"{Path(graph).name}: is the network itself; name another file" in " ".join(err.split())
    assert Path(graph).read_bytes() == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("se_small_cnn", "--runtime", "onnxruntime", "--dtype", "bf16"), "--dtype bf16: runtime onnxruntime has it "),
        (
            ("GRAPH", "--runtime", "executorch"),
            "is an ONNX network, which it does not take; use onnxruntime or openvino",
        ),
    ],
)
def test_what_a_runtime_has_not_is_told_before_anything_is_counted(selab, graph, words, said):
    status, _, err = selab("profile", *(str(graph) if word == "GRAPH" else word for word in words))
    assert status != 0
    assert said in " ".join(err.split())
    assert "counting" not in err


def test_a_file_that_is_there_stays(selab, tmp_path):
    path = tmp_path / "a.onnx"
    path.write_bytes(b"mine")
    status, _, err = selab("export", "--arch", "se_small_cnn", "--to", "onnx", "--out", path)
    assert status != 0
    assert "exists; use --replace" in err
    assert path.read_bytes() == b"mine"


# ------------------------------------------------------------------------------------------------------------- measured
def test_a_profile_in_int8(selab, tmp_path, quick_plans):
    words = ("profile", "--arch", "se_small_cnn", "--runtime", "onnxruntime", "--dtype", "int8", "--threads", 1)
    status, out, err = selab(*words, "--budget", 0.5, "--out", tmp_path)
    assert status == 0, err
    assert "written as pool-conv" in " ".join(out.split())
    (path,) = tmp_path.rglob("*.json")
    assert "int8-onnxruntime" in path.name


def test_a_tax_of_spellings_and_the_one_to_use(selab, tmp_path, quick_plans):
    words = ("tax", "--arch", "se_small_cnn", "--runtime", "onnxruntime", "--budget", 1)
    status, out, err = selab(*words, "--impl", "pool-conv", "--impl", "late", "--out", tmp_path)
    assert status == 0, err
    said = " ".join(out.split())
    assert "Spelling to use in onnxruntime: " in said
    assert "late blocks only" in said


def test_the_tax_of_an_onnx_file(selab, graph, tmp_path, quick_plans):
    size = ("--input", f"{CHANNELS}x{SIZE}x{SIZE}")
    status, out, err = selab("tax", "--arch", graph, *size, "--budget", 1, "--out", tmp_path / "r")
    assert status == 0, err
    assert "as it is" in out
    assert "late blocks only: left out: none of its blocks have maps" in " ".join(out.split())


def test_spellings_are_no_implementations_of_pytorch(selab, tmp_path):
    status, _, err = selab("tax", "--arch", "se_small_cnn", "--impl", "pool-conv", "--out", tmp_path)
    assert status != 0
    assert "--impl pool-conv: no such implementation" in " ".join(err.split())


# -------------------------------------------------------------------------------------------------------------- a phone
def test_timings_of_a_phone(selab, tmp_path):
    files = []
    for place, (base, variant) in enumerate([(100, 110), (120, 132), (100, 112)]):
        for name, milliseconds in (("base", base), ("variant", variant)):
            (tmp_path / f"{name}{place}.txt").write_text(TIMED.format(milliseconds))
            files += [f"--{name}", tmp_path / f"{name}{place}.txt"]
    words = ("import", "--arch", "se_mobilenet", "--from", "executorch", "--on-device", "Pixel 8", "--threads", 4)
    status, out, err = selab(*words, *files, "--out", tmp_path / "r")
    assert status == 0, err
    assert "+10.7 %" in out
    (path,) = (tmp_path / "r").rglob("*.json")
    assert path.parent == tmp_path / "r" / "pixel-8" / "imported"
    assert path.name == "se_mobilenet-vs-mobilenet.executorch-fp32-t4.json"
    # The device's folder holds no profile.
    for folder in (tmp_path / "r", tmp_path / "r" / "pixel-8"):
        status, out, err = selab("table", "runtimes", "--profiles", folder, "--format", "markdown")
        assert status == 0, err
        assert "SE on devices" in out
        assert "| se_mobilenet against mobilenet | Pixel 8 | executorch | fp32 | 4 | 2.000 ms |" in out
    status, _, err = selab(*words, *files, "--out", tmp_path / "r")
    assert status != 0
    assert "exists; use --replace" in err


def test_one_run_of_each_has_no_interval(selab, tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(TIMED.format(100))
    files = ("--base", tmp_path / "a.txt", "--variant", tmp_path / "b.txt")
    words = ("import", "--arch", "se_mobilenet", "--from", "executorch", "--on-device", "a phone")
    status, out, _ = selab(*words, *files, "--out", tmp_path / "r")
    assert status == 0
    assert "no interval" in " ".join(out.split()).lower()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--from", "aoti"), "--from aoti: has no tool that is read; allowed: litert"),
        (("--from", "litert"), "is no output of benchmark_model"),
        (("--arch", "mobilenet", "--from", "executorch"), "mobilenet has no baseline of its own"),
        (("--from", "executorch", "--base", "a.txt"), "2 runs of the baseline and 1 of the network"),
        (("--from", "executorch", "--variant", "a.txt", "--base", "b.txt"), "a.txt: is given for the baseline and for"),
    ],
)
def test_timings_that_are_none(selab, tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(TIMED.format(100))
    arch = () if "--arch" in words else ("--arch", "se_mobilenet")
    files = ("--base", "a.txt", "--variant", "b.txt", "--on-device", "a phone")
    status, _, err = selab("import", *arch, *words, *files)
    assert status != 0
    assert said in " ".join(err.split())
    assert not (tmp_path / "results").exists()


def test_threads_are_for_what_is_compiled(selab, tmp_path):
    words = ("export", "--arch", "se_small_cnn", "--to", "onnx", "--threads", 2, "--out", tmp_path / "a.onnx")
    status, _, err = selab(*words)
    assert status != 0
    assert "a file for onnxruntime runs on any number of threads" in " ".join(err.replace("│", " ").split())
    assert not list(tmp_path.iterdir())


OWN = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(4, 2), nn.Linear(2, 4)

    def forward(self, x):
        return x * torch.sigmoid(self.two(torch.relu(self.one(x.mean((2, 3))))))[:, :, None, None]

class Net(nn.Module):
    def __init__(self, block=True):
        super().__init__()
        self.conv, self.se, self.fc = nn.Conv2d(3, 4, 3), Block() if block else nn.Identity(), nn.Linear(4, 5)

    def forward(self, x):
        return self.fc(self.se(self.conv(x)).mean((2, 3)))

def plain():
    return Net(block=False)

class Chooses(Net):
    def forward(self, x):
        return super().forward(x + 1 if x.sum() > 0 else x)
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(OWN)
    return ("export", "--to", "onnx", "--input", "3x16x16", "--out", "net.onnx")


def test_blocks_of_a_class_of_your_own_are_said_to_stay(selab, own):
    status, out, err = selab(*own, "--arch", "own.py:Net")
    assert status == 0, err
    said = " ".join(out.split())
    assert "SE blocks: 1 block left in the operators that they are written in." in said
    assert "No baseline is known; --baseline NAME shows what the blocks add." in said
    status, out, err = selab(*own, "--arch", "own.py:Net", "--baseline", "own.py:plain", "--replace", "--json", "-")
    assert status == 0, err
    facts = json.loads(out)["exported"]
    assert (facts["blocks"], facts["left"]) == (0, 1)
    assert facts["without_blocks"]["bytes"] < facts["with_blocks"]["bytes"]


def test_a_network_that_chooses_by_values_is_not_exported(selab, own, tmp_path):
    """A traced program goes one way for all inputs."""
    status, _, err = selab(*own, "--arch", "own.py:Chooses")
    assert status != 0
    assert "net.onnx: computes something else than the network: an output differs by" in " ".join(err.split())
    assert [one.name for one in tmp_path.iterdir() if one.suffix == ".onnx"] == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ("train", "--arch", "FILE", "--data", "synthetic"),
            "is an ONNX network; only networks in PyTorch are trained",
        ),
        (("compare", "FILE", "small_cnn", "--data", "synthetic"), "is an ONNX network; only networks in PyTorch"),
        (("eval", "--arch", "FILE", "--weights", "x.pt", "--data", "synthetic"), "is an ONNX network"),
        (("profile", "--arch", "FILE", "--se", "reduction=8"), "an ONNX network takes no blocks; leave --se and"),
        (("profile", "--arch", "FILE", "--runtime", "torch"), "runs in onnxruntime; leave the option out"),
        (("tax", "--arch", "FILE", "--runtime", "torch"), "runs in onnxruntime; leave the option out"),
        (
            ("blocks", "--arch", "FILE", "--images", ".", "--runtime", "torch"),
            "runs in onnxruntime; leave the option out",
        ),
        (("count", "--arch", "empty.onnx"), "empty.onnx: is empty; name an ONNX file"),
        (("profile", "--arch", "se_small_cnn", "--dtype", "int8"), "onnxruntime, openvino, executorch, litert, aoti"),
    ],
)
def test_what_an_onnx_file_is_not_for(selab, graph, tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.onnx").touch()
    status, _, err = selab(*(str(graph) if word == "FILE" else word for word in words))
    assert status != 0
    assert said in " ".join(err.split())
    assert err.count("error:") == 1
    assert not (tmp_path / "data").exists()
