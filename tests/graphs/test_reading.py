"""ONNX files are data: what is wrong with one is said in one line, and nothing outside its folder is read."""

from contextlib import suppress

import numpy as np
import onnx
import pytest
import spelled
from onnx import helper, numpy_helper
from spelled import Net

from selab.errors import ModelError, SelabError, SpecError
from selab.graphs import reading
from selab.graphs.blocks import find_blocks
from selab.graphs.graph import Graph
from selab.graphs.reading import image_shape, read


def saved(path, model, **options):
    onnx.save_model(model, path, **options)
    return path


def network():
    net = Net()
    return net.model(spelled.pool_and_convolutions(net, "x"))


def with_weights_beside(folder):
    return saved(folder / "net.onnx", network(), save_as_external_data=True, location="net.data", size_threshold=0)


def test_weights_in_the_file_and_beside_it(tmp_path):
    inside = read(saved(tmp_path / "one.onnx", network()))
    beside = read(with_weights_beside(tmp_path))
    assert (tmp_path / "net.data").stat().st_size > 0
    for first, second in zip(inside.graph.initializer, beside.graph.initializer, strict=True):
        np.testing.assert_array_equal(numpy_helper.to_array(first), numpy_helper.to_array(second))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty; name an ONNX file"),
        (b"PK\x03\x04 a zip archive", "is not an ONNX"),
        (b"\x80\x02}q\x00.", "is not an ONNX"),
        (b'{"nodes": []}', "is not an ONNX"),
        (b"\xff" * 100, "is not an ONNX file, or is cut off; name an ONNX file, or copy it again"),
    ],
    ids=["empty", "zip", "pickle", "json", "noise"],
)
def test_another_file_is_refused(tmp_path, content, said):
    path = tmp_path / "net.onnx"
    path.write_bytes(content)
    with pytest.raises(SpecError, match=said) as error:
        read(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


def test_every_truncation_is_refused_or_still_a_network(tmp_path):
    whole = saved(tmp_path / "net.onnx", network()).read_bytes()
    for length in range(0, len(whole), 7):
        (tmp_path / "net.onnx").write_bytes(whole[:length])
        # Any other exception would be a fault.
        with suppress(SelabError):
            find_blocks(Graph(read(tmp_path / "net.onnx")))


def test_no_such_file_and_a_folder(tmp_path):
    with pytest.raises(SpecError, match="cannot be read: No such file"):
        read(tmp_path / "none.onnx")
    with pytest.raises(SpecError, match="cannot be read: Is a directory"):
        read(tmp_path)


def test_more_than_protobuf_can_hold(tmp_path, monkeypatch):
    path = saved(tmp_path / "net.onnx", network())
    monkeypatch.setattr(reading, "MOST_BYTES", 100)
    with pytest.raises(SpecError, match="at most 2 GiB; keep the weights beside it"):
        read(path)


def moved_to(path, location):
    model = onnx.load_model(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    path.write_bytes(model.SerializeToString())


@pytest.mark.parametrize("location", ["../secret", "/etc/passwd", "sub/../../secret", ""])
def test_weights_outside_of_the_folder_are_not_read(tmp_path, location):
    folder = tmp_path / "nets"
    folder.mkdir()
    (tmp_path / "secret").write_bytes(b"\0" * 10_000)
    path = with_weights_beside(folder)
    moved_to(path, location)
    with pytest.raises(SpecError, match="lie outside of its folder"):
        read(path)


def test_a_link_out_of_the_folder_is_not_followed(tmp_path):
    folder = tmp_path / "nets"
    folder.mkdir()
    path = with_weights_beside(folder)
    (folder / "net.data").rename(tmp_path / "secret")
    (folder / "net.data").symlink_to(tmp_path / "secret")
    with pytest.raises(SpecError, match="lie outside of its folder"):
        read(path)


def test_weights_that_are_missing_or_short(tmp_path):
    path = with_weights_beside(tmp_path)
    (tmp_path / "net.data").write_bytes(b"\0" * 8)
    with pytest.raises(SpecError, match=r"net.data has 8 bytes, 64 are needed; copy it again"):
        read(path)
    # A file that does not say how long the weights are.
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        kept = [entry for entry in tensor.external_data if entry.key != "length"]
        del tensor.external_data[:]
        tensor.external_data.extend(kept)
    path.write_bytes(model.SerializeToString())
    with pytest.raises(SpecError, match=r"net.data has 8 bytes, 64 are needed; copy it again"):
        read(path)
    (tmp_path / "net.data").unlink()
    with pytest.raises(SpecError, match=r"are in net.data, which is not there; copy it beside the file"):
        read(path)


def with_operator(domain):
    net = Net()
    net("Relu", "x")
    model = net.model("t1")
    model.graph.node[0].domain = domain
    model.opset_import.append(helper.make_opsetid(domain, 1))
    return model


def test_libraries_of_operators_are_not_loaded(tmp_path):
    path = saved(tmp_path / "net.onnx", with_operator("my.company"))
    with pytest.raises(SpecError, match=r"has operators of a library of its own \(my.company.Relu\)"):
        read(path)
    assert read(saved(path, with_operator("com.microsoft")))


def test_functions_are_written_out(tmp_path):
    """PyTorch's newer exporter wraps operators in functions of the file."""
    body = [helper.make_node("Neg", ["a"], ["b"]), helper.make_node("Relu", ["b"], ["c"])]
    function = helper.make_function("local", "Both", ["a"], ["c"], body, [helper.make_opsetid("", 17)])
    net = Net()
    net("Relu", "x")
    model = net.model("t1")
    model.graph.node[0].CopyFrom(helper.make_node("Both", ["x"], ["t1"], domain="local"))
    model.opset_import.append(helper.make_opsetid("local", 1))
    model.functions.append(function)
    assert [node.op_type for node in read(saved(tmp_path / "net.onnx", model)).graph.node] == ["Neg", "Relu"]


def test_the_image_input(tmp_path):
    assert image_shape(network(), "net") == ("x", (1, 8, 6, 6))
    net = Net(shape=("n", 8, 6, "w"))
    assert image_shape(net.model(net("Relu", "x")), "net") == ("x", (None, 8, 6, None))
    flat = Net(shape=(1, 8))
    with pytest.raises(ModelError, match=r"its input x has 2 dimensions; an image has 4"):
        image_shape(flat.model(flat("Relu", "x"), dims=2), "net")
