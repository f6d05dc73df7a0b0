"""The SE block as one operator of torch's: what it computes, and how autograd, compilers and autocast see it."""

import itertools
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from selab.errors import DeviceError, ModelError
from selab.kernels import cpu, dispatch, ops
from selab.kernels.cpu import BlockParams

GATED, BACKWARD = torch.ops.selab.gated.default, torch.ops.selab.gated_backward.default
FORMATS = [torch.contiguous_format, torch.channels_last]
PLAIN = ("relu", "sigmoid", 1.0, 0.0, False, True)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
# Of the largest value. fp64: torch's own gradient of the hard sigmoid has its 1 / 6 in fp32. fp32: up to 12544 terms of
# a map are added up in another order. Halves: computed in fp32 and rounded once, by half of epsilon; twice that leaves
# room for the fp32 part. The layers' gradients add up the images too, see `check`.
TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def weights(channels, units, dtype=torch.float32, device="cpu", biases=True):
    shapes = (units, channels), (units,), (channels, units), (channels,)
    made = [(torch.randn(shape) / shape[-1] ** 0.5).to(device, dtype).requires_grad_() for shape in shapes]
    return made if biases else [made[0], None, made[2], None]


def a_map(*shape, dtype=torch.float32, device="cpu", memory_format=torch.contiguous_format):
    made = (torch.randn(shape, device=device) + 0.5).to(dtype).contiguous(memory_format=memory_format)
    return made.requires_grad_()


def by_torch(y, shortcut, w1, b1, w2, b2, activation, gate, scale, offset, relu_in, relu_out):
    """The block, written down once more."""
    m = F.relu(y) if relu_in else y
    hidden = F.linear(m.mean((2, 3)), w1, b1)
    logits = F.linear(getattr(F, activation)(hidden), w2, b2)
    out = m * (scale * getattr(F, gate)(logits) + offset)[:, :, None, None]
    out = out if shortcut is None else shortcut + out
    return F.relu(out) if relu_out else out


def doubles(tensors):
    return [None if one is None else one.detach().double().requires_grad_() for one in tensors]


def assert_near(found, expected, tolerance):
    assert found.shape == expected.shape
    scale = float(expected.detach().abs().max().clamp_min(1e-3))
    assert float((found.detach().double() - expected.detach()).abs().max()) <= tolerance * scale


def check(tensors, settings):
    """Output and all gradients of the operator on these, against autograd in float64."""
    twins = doubles(tensors)
    expected = by_torch(*twins, *settings)
    found = GATED(*tensors, *settings)[0]
    y = tensors[0]
    assert_near(found, expected, TOLERANCES[y.dtype])
    assert (found.dtype, found.stride()) == (y.dtype, y.stride())
    # Of halves the ReLU cuts where the rounded output is not above zero.
    dout = torch.randn(y.shape, device=y.device).to(y.dtype)
    dout[(found == 0) != (expected == 0)] = 0
    found.backward(dout)
    expected.backward(dout.double())
    for one, twin in zip(tensors, twins, strict=True):
        if one is not None:
            assert one.grad.dtype == one.dtype
            assert_near(one.grad, twin.grad, max(TOLERANCES[one.dtype], 2e-5 if one.dim() < 4 else 0))


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_against_float64(dtype, memory_format):
    torch.manual_seed(0)
    for biases, joined, relu_in, relu_out in itertools.product((False, True), repeat=4):
        y, shortcut = (a_map(3, 17, 5, 7, dtype=dtype, memory_format=memory_format) for _ in range(2))
        words = ("silu", "hardsigmoid") if biases else ("relu", "sigmoid")
        layers = weights(17, 5, torch.float64 if dtype == torch.float64 else torch.float32, biases=biases)
        check([y, shortcut if joined else None, *layers], (*words, 2.0, -0.25, relu_in, relu_out))


@pytest.mark.parametrize("words", [*itertools.product(("relu", "silu"), ("sigmoid", "hardsigmoid"))])
@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("relus", [(False, False), (True, True)])
def test_gradients_by_differences(words, joined, relus):
    torch.manual_seed(0)
    y, shortcut = (a_map(2, 5, 3, 4, dtype=torch.float64) for _ in range(2))
    layers = weights(5, 3, torch.float64)

    def out(*tensors):
        return GATED(tensors[0], shortcut if joined else None, *tensors[1:], *words, 2.0, 0.5, *relus)[0]

    assert torch.autograd.gradcheck(out, (y, *layers))
    if joined:
        assert torch.autograd.gradcheck(lambda s: GATED(y, s, *layers, *words, 2.0, 0.5, *relus)[0], (shortcut,))


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("relu_out", [False, True])
def test_torch_s_own_checks_of_operators(dtype, memory_format, joined, relu_out):
    y, shortcut = (a_map(2, 6, 3, 5, dtype=dtype, memory_format=memory_format) for _ in range(2))
    layers = weights(6, 2, biases=joined)
    settings = ("silu", "sigmoid", 2.0, 0.5, True)
    torch.library.opcheck(GATED, (y, shortcut if joined else None, *layers, *settings, relu_out))
    plain = [None if one is None else one.detach() for one in (y, shortcut if joined else None, *layers)]
    out, *kept = GATED(*plain, *settings, relu_out)
    needs = [True, joined, True, joined, True, joined]
    known = (torch.randn_like(out), plain[0], out if relu_out else None, plain[2], plain[4], *kept)
    torch.library.opcheck(BACKWARD, (*known, *settings, needs))
    torch.library.opcheck(BACKWARD, (*known, *settings, [False, joined, False, False, True, False]))


@pytest.mark.parametrize("shape", [(2, 5, 3, 4), (1, 1, 4, 4), (2, 5, 1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_fake_is_like_the_result(shape, dtype):
    from torch._subclasses.fake_tensor import FakeTensorMode

    channels = shape[1]
    views = [a_map(*shape, dtype=dtype, memory_format=memory_format).detach() for memory_format in FORMATS]
    wide = torch.randn(*shape[:3], 2 * shape[3]).to(dtype)
    layers = [one.detach() for one in weights(channels, 2)]
    for y in (*views, wide[..., ::2]):
        found = GATED(y, y, *layers, *PLAIN)
        with FakeTensorMode() as mode:
            fakes = [mode.from_tensor(one) for one in (y, *layers)]
            fake = GATED(fakes[0], fakes[0], *fakes[1:], *PLAIN)
        for one, other in zip(found, fake, strict=True):
            assert (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ParameterList(weights(6, 2))

    def forward(self, y, shortcut):
        return GATED(y.abs(), shortcut, *self.layers, *PLAIN)[0].sin()


def calls(graph):
    return [node.target for node in graph.nodes if node.op == "call_function"]


def test_compilers_see_one_operator_each_way():
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    graphs = []

    def keep(module, _):
        graphs.append(calls(module.graph))
        return make_boxed_func(module.forward)

    block, y, shortcut = Block(), a_map(2, 6, 5, 3), a_map(2, 6, 5, 3)
    compiled = torch.compile(block, fullgraph=True, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep))
    compiled(y, shortcut).sum().backward()
    assert [(graph.count(GATED), graph.count(BACKWARD)) for graph in graphs] == [(1, 0), (0, 1)]
    found = [one.grad for one in (y, shortcut, *block.parameters())]
    for one in (y, shortcut, *block.parameters()):
        one.grad = None
    block(y, shortcut).sum().backward()
    for one, twin in zip(found, (y, shortcut, *block.parameters()), strict=True):
        torch.testing.assert_close(one, twin.grad)


def test_compiled_whole():
    block, y = Block(), a_map(2, 6, 5, 3)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(y, y), block(y, y))


def test_export_sees_one_operator():
    block, y = Block(), a_map(2, 6, 5, 3).detach()
    exported = torch.export.export(block, (y, y))
    assert calls(exported.graph).count(GATED) == 1
    torch.testing.assert_close(exported.module()(y, y), block(y, y))


def test_autocast_leaves_the_weights_as_they_are():
    y, layers = a_map(2, 6, 5, 3, dtype=torch.bfloat16), weights(6, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, squeezed, hidden, logits = GATED(y, y, *layers, *PLAIN)
    assert out.dtype == torch.bfloat16
    assert {one.dtype for one in (squeezed, hidden, logits)} == {torch.float32}
    assert torch.equal(out, GATED(y, y, *layers, *PLAIN)[0])
    out.sum().backward()
    assert layers[0].grad.dtype == torch.float32


@pytest.mark.parametrize("relu_out", [False, True])
def test_no_more_maps_are_saved_than_the_branch_and_the_output(relu_out):
    y, shortcut, layers = a_map(2, 6, 5, 3), a_map(2, 6, 5, 3), weights(6, 2)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda one: saved.append(one) or one, lambda one: one):
        out = GATED(y, shortcut, *layers, *PLAIN[:5], relu_out)[0]
    maps = {one.data_ptr() for one in saved if one.dim() == 4}
    assert maps == ({y.data_ptr(), out.data_ptr()} if relu_out else {y.data_ptr()})


def test_the_shortcut_s_gradient_is_the_output_s_own_without_a_relu():
    y, shortcut, layers = a_map(2, 6, 5, 3), a_map(2, 6, 5, 3), weights(6, 2)
    out = GATED(y, shortcut, *layers, *PLAIN[:5], False)[0]
    dout = torch.randn_like(out)
    (found,) = torch.autograd.grad(out, shortcut, dout)
    assert found.data_ptr() == dout.data_ptr()


@pytest.mark.parametrize("learning", [*itertools.product((False, True), repeat=3)])
def test_only_what_learns_gets_a_gradient(learning):
    torch.manual_seed(0)
    tensors = [a_map(2, 6, 5, 3), a_map(2, 6, 5, 3), *weights(6, 2)]
    twins = doubles(tensors)
    for both in (tensors, twins):
        for one, learns in zip(both, (*learning, True, learning[0], True), strict=True):
            one.requires_grad_(learns)
    GATED(*tensors, *PLAIN)[0].sum().backward()
    by_torch(*twins, *PLAIN).sum().backward()
    for one, twin in zip(tensors, twins, strict=True):
        assert (one.grad is None) == (twin.grad is None)
        if one.grad is not None:
            assert_near(one.grad, twin.grad, 1e-5)


def test_the_squeezed_values_and_logits_are_not_differentiated():
    out, *others = GATED(a_map(2, 6, 5, 3), None, *weights(6, 2), *PLAIN)
    assert out.requires_grad
    assert not any(one.requires_grad for one in others)


def higher_derivatives(function, tensors):
    """Gradients of a sum of squares, and twice those of their own sum of squares."""
    found, total = [], function(*tensors).square().sum()
    for _ in range(3):
        gradients = torch.autograd.grad(total, tensors, create_graph=True)
        found += gradients
        total = sum(one.square().sum() for one in gradients)
    return found


@pytest.mark.parametrize("relus", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("node", ["operator", "autograd function"])
def test_second_and_third_derivatives_are_those_of_torch(node, activation, joined, relus):
    tensors = [a_map(2, 6, 5, 3), a_map(2, 6, 5, 3) if joined else None, *weights(6, 2)]
    tensors = [one for one in doubles(tensors) if one is not None]
    settings = (activation, "sigmoid", 2.0, 0.5, *relus)

    def apart(given):
        return (given[0], given[1], given[2:]) if joined else (given[0], None, given[1:])

    def fast(*given):
        y, shortcut, layers = apart(given)
        if node == "operator":
            return GATED(y, shortcut, *layers, *settings)[0]
        return cpu.Gated.apply(y, shortcut, *layers, BlockParams(*layers, *settings), False)

    def plain(*given):
        y, shortcut, layers = apart(given)
        return by_torch(y, shortcut, *layers, *settings)

    for one, other in zip(higher_derivatives(fast, tensors), higher_derivatives(plain, tensors), strict=True):
        assert_near(one, other, 1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_second_derivatives_have_the_types_of_their_tensors(dtype):
    tensors = [a_map(2, 6, 5, 3, dtype=dtype), *weights(6, 2)]
    for one, like in zip(
        higher_derivatives(lambda y, *layers: GATED(y, None, *layers, *PLAIN)[0], tensors), tensors * 3, strict=True
    ):
        assert (one.dtype, one.shape) == (like.dtype, like.shape)


def test_the_backward_operator_alone_has_no_derivative():
    y, layers = a_map(2, 6, 5, 3), weights(6, 2)
    out, *kept = GATED(y, None, *layers, *PLAIN)
    needs = [True, False, True, True, True, True]
    first = BACKWARD(out.detach(), y, out.detach(), layers[0], layers[2], *kept, *PLAIN[:5], needs)[0]
    with pytest.raises(ModelError, match="no derivative of its own; use"):
        first.sum().backward()


def test_an_empty_batch():
    y = torch.empty(0, 6, 5, 3, requires_grad=True)
    out = GATED(y, None, *weights(6, 2), *PLAIN)[0]
    out.sum().backward()
    assert out.shape == y.grad.shape == (0, 6, 5, 3)


def refused(**changes):
    y, layers = torch.randn(2, 6, 5, 3), [one.detach() for one in weights(6, 2)]
    named = dict(zip(("y", "shortcut", "w1", "b1", "w2", "b2"), (y, y, *layers), strict=True))
    named |= {"activation": "relu", "gate": "sigmoid"}
    return {**named, **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gate": "tanh"}, "gate 'tanh': allowed: sigmoid, hardsigmoid"),
        ({"activation": "gelu"}, "activation 'gelu': allowed: relu, silu"),
        ({"y": torch.zeros(2, 6)}, r"y is \(2, 6\) of float32 on cpu: it must be \(N, C, H, W\)"),
        ({"y": torch.zeros(2, 6, 5, 3, dtype=torch.int32)}, "of int32 on cpu: .*float32, bfloat16, float16, float64"),
        ({"shortcut": torch.zeros(2, 6, 5, 1)}, r"shortcut is \(2, 6, 5, 1\)"),
        ({"shortcut": torch.zeros(2, 6, 5, 3).half()}, "shortcut is .* of float16"),
        ({"w1": torch.zeros(2, 7)}, r"w1 is \(2, 7\) of float32 on cpu: it must be \(2, 6\)"),
        ({"w2": torch.zeros(6, 3)}, r"w2 is \(6, 3\)"),
        ({"b1": torch.zeros(2).half()}, r"b1 is \(2,\) of float16 on cpu: it must be \(2,\) of float32"),
        ({"b2": torch.zeros(5)}, r"b2 is \(5,\)"),
    ],
)
def test_what_is_refused(changes, message):
    arguments = refused(**changes)
    with pytest.raises(ModelError, match=f"selab::gated: .*{message}.*use the block's separate operators"):
        GATED(*arguments.values(), 1.0, 0.0, False, False)
    assert ops.refuses(**arguments)


def test_what_is_taken():
    assert ops.refuses(**refused()) == ""


def test_the_gpu_refuses_more(monkeypatch):
    y, w1 = torch.empty(2, 8, 4, 4, device="meta"), torch.empty(600, 8, device="meta")
    assert ops._gpu_refuses(y, w1) == "squeeze width 600: the GPU kernels take up to 512"
    assert ops._gpu_refuses(y[:0], w1[:4]) == "y has no elements"
    wide = torch.empty(1, 2**15, 2**8, 2**8, device="meta")
    assert "fewer than 2^31 elements" in ops._gpu_refuses(wide, w1[:4])
    assert ops._gpu_refuses(y, w1[:512]) == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_why_there_is_no_gpu():
    assert ops.gpu_reason() == "torch finds no CUDA device"
    with pytest.raises(DeviceError, match="selab::gated on CUDA: torch finds no CUDA device; otherwise use"):
        ops._gpu()


def test_why_a_gpu_cannot_run_them(monkeypatch):
    monkeypatch.setattr(ops.torch.version, "hip", None)
    monkeypatch.setattr(ops, "_HAS_TRITON", False)
    assert ops._why_not(9, 0) == "triton is not installed; pip install triton"
    monkeypatch.setattr(ops, "_HAS_TRITON", True)
    assert ops._why_not(9, 0) == ""
    assert "compute capability 6.1, Triton needs 7.0" in ops._why_not(6, 1)
    monkeypatch.setattr(ops.torch.version, "hip", "6.0")
    assert "ROCm" in ops._why_not(9, 4)


def test_the_reason_can_be_asked_for_inside_a_compiled_function():
    def ask(x):
        return x + 1 if ops.gpu_reason() else x - 1

    x = torch.zeros(2)
    assert torch.equal(torch.compile(ask, fullgraph=True, backend="eager")(x), ask(x))


@pytest.mark.parametrize("compiling", [False, True])
def test_what_is_refused_is_not_chosen(compiling):
    asked = []

    def run(y, shortcut, *layers):
        chosen, reason = dispatch.choose("operator", y, shortcut, BlockParams(*layers))
        asked.append((chosen, reason))
        return y + 1

    run = torch.compile(run, fullgraph=True, backend="eager") if compiling else run
    y, layers = torch.randn(2, 6, 5, 3), [one.detach() for one in weights(6, 2)]
    run(y, y, *layers)
    run(y, y.half(), *layers)
    run(y, y, layers[0].half(), *layers[1:])
    assert [chosen for chosen, _ in asked] == ["operator", "reference", "reference"]
    assert asked[0][1] == ""
    assert asked[1][1].startswith("shortcut is (2, 6, 5, 3) of float16 on cpu, y is (2, 6, 5, 3) of float32 on cpu")
    assert asked[2][1] == "b1 is (2,) of float32 on cpu: it must be (2,) of float16 on cpu"


def test_triton_is_imported_when_it_is_needed():
    code = "import sys; from selab.kernels import ops; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


RESNET50 = [(256, 56), (512, 28), (1024, 14), (2048, 7)]
MOBILENET = [(64, 112), (128, 56), (256, 28), (512, 14), (1024, 7)]
ODD_SIZES = [(1, 1), (3, 5), (17, 7), (72, 28), (40, 9)]


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize(("channels", "side"), RESNET50 + MOBILENET + ODD_SIZES)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_gpu_against_float64(channels, side, memory_format, dtype):
    torch.manual_seed(0)
    kind = {"dtype": dtype, "device": "cuda", "memory_format": memory_format}
    for images, settings in ((1, PLAIN), (5, ("silu", "hardsigmoid", 2.0, -0.25, True, False)), (33, PLAIN)):
        y, shortcut = (a_map(images, channels, side, side, **kind) for _ in range(2))
        layers = weights(channels, max(1, channels // 16), device="cuda")
        check([y, shortcut if settings is PLAIN else None, *layers], settings)


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize("memory_format", FORMATS)
def test_in_a_cuda_graph(memory_format):
    kind = {"dtype": torch.bfloat16, "device": "cuda", "memory_format": memory_format}
    y, shortcut, layers = a_map(4, 64, 14, 14, **kind), a_map(4, 64, 14, 14, **kind), weights(64, 4, device="cuda")
    tensors = (y, shortcut, *layers)

    def step():
        out = GATED(*tensors, *PLAIN)[0]
        # A graph that lives on would keep the gradients' nodes of its stream.
        return out.detach(), *torch.autograd.grad(out, tensors, torch.ones_like(out))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        y.copy_(a_map(4, 64, 14, 14, **kind))
    graph.replay()
    for found, expected in zip(captured, step(), strict=True):
        assert torch.equal(found, expected)


class TestJoin:
    def test_torch_s_own_checks(self):
        pair = (a_map(2, 3, 4, 5), a_map(2, 3, 4, 5))
        torch.library.opcheck(torch.ops.selab.add_relu.default, pair)

    def test_output_and_gradients(self):
        branch, shortcut = a_map(2, 3, 4, 5, dtype=torch.float64), a_map(2, 3, 4, 5, dtype=torch.float64)
        assert torch.equal(torch.ops.selab.add_relu(branch, shortcut), torch.relu(branch + shortcut))
        assert torch.autograd.gradcheck(torch.ops.selab.add_relu, (branch, shortcut))

    def test_what_a_gpu_refuses(self, monkeypatch):
        monkeypatch.setattr(ops, "gpu_reason", lambda: "")
        y = a_map(2, 3, 4, 5)
        assert ops.refuses_join(y, y) == ""
        assert "they must match" in ops.refuses_join(y, y[:1])
        assert "it must be (N, C, H, W)" in ops.refuses_join(y.double(), y.double())

    @pytest.mark.cuda
    @needs_cuda
    def test_on_a_gpu(self):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for memory_format in FORMATS:
                branch, shortcut = (
                    a_map(3, 65, 9, 7, dtype=dtype, device="cuda", memory_format=memory_format) for _ in range(2)
                )
                out = torch.ops.selab.add_relu(branch, shortcut).detach()
                expected = torch.relu(branch.detach().double() + shortcut.detach().double())
                error = (out.double() - expected).abs().max() / expected.abs().max()
                assert float(error) <= TOLERANCES[dtype]
