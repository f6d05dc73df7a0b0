"""The CPU's implementations against the reference in double precision."""

import copy

import pytest
import torch
from torch import nn

from selab.attention.se import ADD_RELU, GatedJoin, SqueezeExcitation
from selab.errors import ModelError
from selab.kernels import cpu, dispatch

SHAPES = [(1, 1, 1, 1), (1, 3, 5, 7), (2, 17, 7, 7), (3, 64, 14, 9), (2, 300, 17, 17), (1, 5, 40, 33)]
FORMATS = [torch.contiguous_format, torch.channels_last]
needs_native = pytest.mark.skipif(bool(cpu.native_reason()), reason=cpu.native_reason() or "it is there")
IMPLS = [pytest.param("native", marks=needs_native), "torch"]
# Of the largest value: float32 sums of a map's values and their products, in another order than double precision.
FORWARD, GRADIENT = 1e-6, 1e-4


class Join(nn.Module):
    formula = ADD_RELU

    def forward(self, branch, shortcut):
        return torch.relu(branch + shortcut)


def block(channels, impl, **kinds):
    torch.manual_seed(channels)
    made = SqueezeExcitation(channels, min(16, channels), impl=impl, **kinds)
    for layer in (made.fc1, made.fc2):
        if layer.bias is not None:
            nn.init.normal_(layer.bias)
    return made


def in_double(made):
    twin = copy.deepcopy(made).double()
    twin.impl = "reference"
    return twin


def maps(shape, memory_format, joined):
    made = [torch.randn(shape).contiguous(memory_format=memory_format) for _ in range(2 if joined else 1)]
    return [one.requires_grad_() for one in made], [one.detach().double().requires_grad_() for one in made]


def assert_near(found, expected, tolerance):
    assert found.shape == expected.shape
    scale = max(float(expected.detach().abs().max()), 1e-3)
    assert float((found.detach().double() - expected.detach()).abs().max()) <= tolerance * scale


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("relu_in", [False, True])
@pytest.mark.parametrize("gate", ["sigmoid", "hardsigmoid"])
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_outputs_and_gradients_are_the_reference_s(impl, joined, relu_in, gate, activation):
    for shape in SHAPES:
        for memory_format in FORMATS:
            for bias in (False, True):
                fast = block(shape[1], impl, gate=gate, activation=activation, bias=bias)
                fast.relu_in = relu_in
                reference = in_double(fast)
                ours, theirs = maps(shape, memory_format, joined)
                run = GatedJoin(Join(), fast, "branch") if joined else fast
                other = GatedJoin(Join(), reference, "branch") if joined else reference
                out, expected = run(*ours), other(*theirs)
                assert out.stride() == ours[0].stride()
                assert_near(out, expected, FORWARD)
                cotangent = torch.randn(shape)
                out.backward(cotangent)
                expected.backward(cotangent.double())
                for one, two in zip(ours, theirs, strict=True):
                    assert_near(one.grad, two.grad, GRADIENT)
                for one, two in zip(fast.parameters(), reference.parameters(), strict=True):
                    assert_near(one.grad, two.grad, GRADIENT)
                with torch.inference_mode():
                    assert torch.equal(run(*(one.detach() for one in ours)), out)


def test_branch_and_shortcut_may_lie_differently_in_memory():
    fast = block(17, "auto")
    (branch, _), (exact, _) = maps((2, 17, 6, 5), torch.channels_last, joined=True)
    (shortcut, _), (other, _) = maps((2, 17, 6, 5), torch.contiguous_format, joined=True)
    out = GatedJoin(Join(), fast, "branch")(branch, shortcut)
    expected = GatedJoin(Join(), in_double(fast), "branch")(exact, other)
    cotangent = torch.randn(2, 17, 6, 5)
    out.backward(cotangent)
    expected.backward(cotangent.double())
    assert_near(out, expected, FORWARD)
    assert_near(branch.grad, exact.grad, GRADIENT)
    assert_near(shortcut.grad, other.grad, GRADIENT)


@pytest.mark.parametrize("threads", [1, 2, 3])
@needs_native
def test_threads_share_images_or_channels(threads):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for images in (1, 2, 5):
            for memory_format in FORMATS:
                fast = block(70, "native")
                x = torch.randn(images, 70, 40, 41).contiguous(memory_format=memory_format).requires_grad_()
                other = x.detach().double().requires_grad_()
                out, expected = fast(x), in_double(fast)(other)
                assert_near(out, expected, FORWARD)
                out.sum().backward()
                expected.sum().backward()
                assert_near(x.grad, other.grad, GRADIENT)
    finally:
        torch.set_num_threads(before)


def statistics(channels, affine=True, eps=1e-5):
    generator = torch.Generator().manual_seed(channels)
    weight, bias, mean, var = torch.randn(4, channels, generator=generator).unbind()
    var[::3] = 0
    return cpu.Norm(weight if affine else None, bias if affine else None, mean, var.abs(), eps)


def normalised(norm, x):
    weight, bias, mean, var = (None if one is None else one.double() for one in norm[:4])
    return nn.functional.batch_norm(x.double(), mean, var, weight, bias, eps=norm.eps)


@needs_native
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("relu_in", [False, True])
@pytest.mark.parametrize("relu_out", [False, True])
@pytest.mark.parametrize("affine", [False, True])
@torch.no_grad
def test_a_batchnorm_before_a_block_is_part_of_it(in_place, joined, relu_in, relu_out, affine):
    for shape in [*SHAPES, (0, 3, 4, 4)]:
        for memory_format in FORMATS:
            made = block(shape[1], "auto")
            made.relu_in = relu_in
            formula, norm = made._params(relu_out=relu_out), statistics(shape[1], affine, eps=0.1)
            y, r = (torch.randn(shape).contiguous(memory_format=memory_format) for _ in range(2))
            assert not cpu.norm_refuses(y, norm)
            # The reference rectifies in place.
            m = in_double(made)(normalised(norm, y))
            expected = m + r.double() if joined else m
            expected = expected.relu() if relu_out else expected
            kept, shortcut = y.clone(), r if joined else None
            found = cpu.infer(y, shortcut, formula, native=True, in_place=in_place, norm=norm)
            assert (found is y) is in_place
            assert in_place or torch.equal(y, kept)
            assert found.stride() == kept.stride()
            if shape[0]:
                assert_near(found, expected, 2 * FORWARD)


@needs_native
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("affine", [None, False, True])
@torch.no_grad
def test_a_batchnorm_before_a_join_or_a_relu_is_part_of_it(in_place, joined, affine):
    for shape in SHAPES:
        for memory_format in FORMATS:
            norm = None if affine is None else statistics(shape[1], affine, eps=0.1)
            y, r = (torch.randn(shape).contiguous(memory_format=memory_format) for _ in range(2))
            x = y.double() if norm is None else normalised(norm, y)
            expected = torch.relu(x + r.double() if joined else x)
            found = cpu.activated(y, r if joined else None, norm, in_place=in_place)
            assert (found is y) is in_place
            assert_near(found, expected, FORWARD)


@needs_native
@pytest.mark.parametrize(("mean", "var"), [(0.0, 1e-30), (0.0, 1e30), (100.0, 1.0), (-1e3, 1e6)])
@pytest.mark.parametrize("memory_format", FORMATS)
@torch.no_grad
def test_means_and_variances_may_be_of_any_size(mean, var, memory_format):
    made = block(17, "auto")
    norm = cpu.Norm(None, None, torch.full((17,), mean), torch.full((17,), var), 1e-5)
    y = (mean + var**0.5 * torch.randn(2, 17, 9, 11)).contiguous(memory_format=memory_format)
    found = cpu.infer(y, None, made._params(), native=True, norm=norm)
    # A mean of many deviations leaves as many roundings of it in the differences.
    assert_near(found, in_double(made)(normalised(norm, y)), FORWARD * max(1, abs(mean) / var**0.5))


@needs_native
@pytest.mark.parametrize("relu_in", [False, True])
@pytest.mark.parametrize("memory_format", FORMATS)
@torch.no_grad
def test_what_is_not_finite_comes_through_a_batchnorm_as_by_torch(relu_in, memory_format):
    made = block(5, "auto")
    made.relu_in = relu_in
    norm = statistics(5, eps=0.1)
    norm.weight[3] = 0
    for channel, value in enumerate((float("nan"), float("inf"), -float("inf"), float("inf"), 0.0)):
        y = torch.randn(1, 5, 6, 7).contiguous(memory_format=memory_format)
        y[0, channel, 2, 3] = value
        expected = normalised(norm, y)
        rectified = cpu.activated(y, None, norm)
        torch.testing.assert_close(rectified.double(), expected.relu(), equal_nan=True, rtol=1e-5, atol=1e-5)
        reference = in_double(made)(expected)
        found = cpu.infer(y, None, made._params(), native=True, norm=norm)
        torch.testing.assert_close(found.double(), reference, equal_nan=True, rtol=1e-5, atol=1e-5)


@needs_native
def test_which_batchnorms_are_refused():
    norm, y = statistics(4), torch.randn(1, 4, 5, 5)
    other = "the running statistics do not match the feature map"
    assert cpu.norm_refuses(y, norm) == ""
    assert cpu.norm_refuses(y, norm._replace(mean=norm.mean.double())) == other
    assert cpu.norm_refuses(y, norm._replace(var=norm.var[:2])) == other
    assert cpu.norm_refuses(y, norm._replace(bias=torch.zeros(8)[::2])) == other
    for one in (y.double(), y[:, :, ::2], y[0]):
        assert "the feature map is not float32" in cpu.norm_refuses(one, norm)


def test_gradients_by_differences():
    fast = block(3, "torch", activation="silu").double()
    x, shortcut = (torch.randn(2, 3, 4, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    join = GatedJoin(Join(), fast, "branch")
    assert torch.autograd.gradcheck(join, (x, shortcut))
    parameters = dict(fast.named_parameters())

    def by_weights(*values):
        return torch.func.functional_call(fast, dict(zip(parameters, values, strict=True)), (x.detach(),))

    assert torch.autograd.gradcheck(by_weights, tuple(parameters.values()))


@pytest.mark.parametrize("impl", IMPLS)
def test_gates_out_of_reach_of_single_precision_stay_finite(impl):
    fast = block(4, impl, bias=True)
    for logit, expected in ((-200.0, 0.0), (200.0, 1.0)):
        nn.init.zeros_(fast.fc2.weight)
        nn.init.constant_(fast.fc2.bias, logit)
        torch.testing.assert_close(fast(torch.ones(1, 4, 3, 3)), torch.full((1, 4, 3, 3), expected), atol=1e-30, rtol=0)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("relu_in", [False, True])
def test_a_nan_in_the_map_is_not_hidden(impl, relu_in):
    fast = block(2, impl)
    fast.relu_in = relu_in
    x = torch.zeros(1, 2, 3, 300)
    x[0, 1, 2, 250] = float("nan")
    assert torch.isnan(fast(x)[0, 1, 2, 250])


@pytest.mark.parametrize("impl", IMPLS)
def test_the_output_takes_the_input_s_place_only_where_allowed_and_without_gradients(impl):
    fast = block(4, impl)
    x = torch.randn(1, 4, 6, 6)
    kept = x.clone()
    with torch.no_grad():
        fast(x)
        assert torch.equal(x, kept)
    fast.can_overwrite = True
    fast(x.requires_grad_())
    assert torch.equal(x, kept)
    with torch.no_grad():
        out = fast(x)
    assert out.data_ptr() == x.data_ptr()


@pytest.mark.parametrize("impl", IMPLS)
def test_it_saves_no_more_for_backward_than_the_reference(impl):
    def saved(module):
        storages = {}
        weights = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}

        def pack(tensor):
            if isinstance(tensor, nn.Parameter) or tensor.untyped_storage().data_ptr() in weights:
                return tensor
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        branch = torch.randn(2, 64, 14, 14).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            module(branch * 1, torch.randn(2, 64, 14, 14))
        return sum(storages.values())

    fast = block(64, impl)
    reference = copy.deepcopy(fast)
    reference.impl = "reference"
    assert saved(GatedJoin(Join(), fast, "branch")) <= saved(GatedJoin(Join(), reference, "branch"))


class TestChoice:
    def test_a_plain_float_map_takes_the_fastest(self):
        expected = ("torch", cpu.native_reason()) if cpu.native_reason() else ("native", "")
        assert block(4, "auto").runtime(torch.randn(1, 4, 3, 3)) == expected

    @pytest.mark.parametrize(
        ("changed", "why"),
        [
            ({"squeeze": "max"}, "unsupported squeeze: max"),
            ({"gate": "tanh"}, "unsupported gate: tanh"),
        ],
    )
    def test_other_kinds_run_as_written(self, changed, why):
        fast = block(4, "auto", **changed)
        impl, reason = fast.runtime(torch.randn(1, 4, 3, 3))
        assert impl == "reference"
        assert why in reason
        assert fast(torch.randn(1, 4, 3, 3)).shape == (1, 4, 3, 3)

    def test_a_hook_inside_sees_its_module_run(self):
        fast, seen = block(4, "auto"), []
        handle = fast.fc1.register_forward_hook(lambda *_: seen.append(1))
        fast(torch.randn(1, 4, 3, 3))
        assert seen
        assert fast.runtime(torch.randn(1, 4, 3, 3)) == ("reference", "a hook is registered on one of its layers")
        handle.remove()
        assert fast.runtime(torch.randn(1, 4, 3, 3))[0] != "reference"

    def test_a_layer_of_another_kind_runs(self):
        fast = block(4, "auto")
        fast.gate = nn.Tanh()
        assert fast.runtime(torch.randn(1, 4, 3, 3)) == ("reference", "unsupported gate: Tanh")

    def test_modes_transforms_and_devices_see_every_operation(self):
        fast = block(4, "auto").requires_grad_(False)
        assert "device: meta" in fast.runtime(torch.randn(1, 4, 3, 3, device="meta"))[1]
        reasons = []
        torch.func.vmap(lambda x: reasons.append(fast.runtime(x)[1]) or x)(torch.randn(2, 1, 4, 3, 3))
        assert "transformed" in reasons[0]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert "autocast" in fast.runtime(torch.randn(1, 4, 3, 3))[1]
        assert "bfloat16" in fast.runtime(torch.randn(1, 4, 3, 3).bfloat16())[1]

    def test_what_is_asked_for_and_cannot_run_is_said(self):
        with pytest.raises(ModelError, match="impl 'native': unsupported squeeze: max; use impl='auto'"):
            block(4, "native", squeeze="max")(torch.randn(1, 4, 3, 3))

    @needs_native
    def test_a_map_that_is_not_dense_goes_by_torch(self):
        fast = block(4, "auto")
        x = torch.randn(2, 4, 6, 6)[:, :, ::2]
        assert fast.runtime(x) == ("torch", "the feature map is neither contiguous nor channels last")
        assert_near(fast(x), in_double(fast)(x.double()), FORWARD)

    def test_without_the_native_code_torch_operations_do_it(self, monkeypatch):
        monkeypatch.setattr(cpu, "_native", None)
        monkeypatch.setattr(cpu, "_WHY_NOT", "it was not built")
        fast = block(4, "auto")
        x = torch.randn(1, 4, 3, 3)
        assert fast.runtime(x) == ("torch", "it was not built")
        assert_near(fast(x), in_double(fast)(x.double()), FORWARD)
        assert torch.equal(cpu.add_relu(x, -2 * x), torch.relu(-x))


def test_a_layer_that_gets_a_forward_of_its_own_is_called_from_then_on():
    fast, x = block(4, "auto").eval(), torch.randn(1, 4, 3, 3)
    with torch.no_grad():
        for _ in range(2):
            assert_near(fast(x), in_double(fast)(x.double()), FORWARD)
        fast.fc2.forward = lambda x: x.new_zeros(x.shape[0], 4)
        torch.testing.assert_close(fast(x), x / 2)
        del fast.fc2.forward
        assert_near(fast(x), in_double(fast)(x.double()), FORWARD)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("INTERFACE = 1", "the native code is out of date"),
        ("", "the native code is out of date"),
        ("raise ImportError('no symbol')", "the native code does not load: no symbol"),
        (None, "the native code was not built"),
    ],
)
def test_a_library_that_cannot_be_used_is_not_called(source, reason, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    name = f"native_stand_in_{len(reason)}_{len(source or '')}"
    if source is not None:
        (tmp_path / f"{name}.py").write_text(source)
    module, why = cpu._load(name)
    assert module is None
    assert why == f"{reason}; reinstall selab from source, with a C compiler available"


def test_adding_and_rectifying_is_one_node():
    branch, shortcut = (torch.randn(2, 3, 5, 5, requires_grad=True) for _ in range(2))
    out = cpu.AddReLU.apply(branch, shortcut)
    assert torch.equal(out, torch.relu(branch + shortcut))
    cotangent = torch.randn_like(out)
    for found, expected in zip(
        torch.autograd.grad(out, (branch, shortcut), cotangent),
        torch.autograd.grad(torch.relu(branch + shortcut), (branch, shortcut), cotangent),
        strict=True,
    ):
        assert torch.equal(found, expected)


def test_names_of_implementations_are_those_of_the_choice():
    assert dispatch.IMPLS == ("auto", "reference", "torch", "native", "operator")


class TestCompiled:
    """The form that a compiler is shown; `aot_eager` goes the whole way but for the generated code."""

    @pytest.mark.parametrize("images", [1, 9])
    @pytest.mark.parametrize("joined", [False, True])
    @pytest.mark.parametrize("relu_in", [False, True])
    def test_is_one_graph_with_the_reference_s_outputs_and_gradients(self, images, joined, relu_in):
        torch.compiler.reset()
        fast = block(17, "auto", activation="silu", gate="hardsigmoid")
        fast.relu_in = relu_in
        reference = in_double(fast)
        ours, theirs = maps((images, 17, 6, 5), torch.contiguous_format, joined)
        run = GatedJoin(Join(), fast, "branch") if joined else fast
        other = GatedJoin(Join(), reference, "branch") if joined else reference
        out, expected = torch.compile(run, fullgraph=True, backend="aot_eager")(*ours), other(*theirs)
        assert_near(out, expected, FORWARD)
        out.sum().backward()
        expected.sum().backward()
        for one, two in zip((*ours, *fast.parameters()), (*theirs, *reference.parameters()), strict=True):
            assert_near(one.grad, two.grad, GRADIENT)

    def test_one_image_needs_no_matrix_product(self):
        torch.compiler.reset()
        seen = []

        def look(graph, _example):
            seen.extend(str(node.target) for node in graph.graph.nodes)
            return graph

        compiled = torch.compile(block(32, "auto").requires_grad_(False), fullgraph=True, backend=look)
        compiled(torch.randn(1, 32, 4, 4))
        assert not [name for name in seen if "linear" in name or "addmm" in name]
        seen.clear()
        compiled(torch.randn(8, 32, 4, 4))
        assert [name for name in seen if "linear" in name]

    @needs_native
    def test_what_was_decided_before_is_not_compiled_in(self):
        torch.compiler.reset()
        fast = block(8, "auto").requires_grad_(False)
        x = torch.randn(1, 8, 4, 4)
        with torch.inference_mode():
            fast(x)
            assert "_cached_call" in fast.__dict__
            expected = fast(x)
            torch.testing.assert_close(torch.compile(fast, fullgraph=True, backend="aot_eager")(x), expected)


@needs_native
class TestDecidedOnce:
    """The native block in inference goes on as it was decided, until anything is no longer as it was."""

    @staticmethod
    def fresh():
        fast = block(8, "auto").requires_grad_(False)
        x = torch.randn(2, 8, 6, 6)
        with torch.no_grad():
            fast(x)
            assert fast._cached_call[1](x, None) is not None
        return fast, x

    @pytest.mark.parametrize(
        "changed",
        [
            lambda x: x[:1],
            lambda x: x.double(),
            lambda x: x.contiguous(memory_format=torch.channels_last),
            lambda x: x.to("meta"),
            lambda x: nn.Parameter(x),
        ],
        ids=["shape", "dtype", "layout", "device", "class"],
    )
    def test_another_map_is_decided_anew(self, changed):
        fast, x = self.fresh()
        with torch.no_grad():
            assert fast._cached_call[1](changed(x), None) is None

    def test_gradients_modes_and_hooks_are_seen(self):
        fast, x = self.fresh()
        again = fast._cached_call[1]
        assert again(x, None) is None  # gradients are recorded here
        with torch.no_grad():
            assert again(x, None) is not None
            with torch.autocast("cpu"):
                assert again(x, None) is None
            handle = fast.activation.register_forward_hook(lambda *_: None)
            assert again(x, None) is None
            handle.remove()
            assert again(x, None) is not None

    @pytest.mark.parametrize("how", ["assigned", "data", "double", "module", "kind"])
    def test_other_weights_and_layers_are_seen(self, how):
        fast, x = self.fresh()
        if how == "assigned":
            fast.fc1.weight = nn.Parameter(torch.randn_like(fast.fc1.weight))
        elif how == "data":
            fast.fc2.weight.data = torch.randn_like(fast.fc2.weight)
        elif how == "double":
            fast.double()
            x = x.double()
        elif how == "module":
            fast.fc1 = nn.Linear(8, fast.squeeze_channels)
        else:
            fast.gate = nn.Tanh()
        expected = copy.deepcopy(fast)
        expected.impl = "reference"
        with torch.no_grad():
            torch.testing.assert_close(fast(x), expected(x))

    def test_nothing_is_kept_where_gradients_are_recorded(self):
        fast = block(8, "auto")
        fast(torch.randn(2, 8, 6, 6))
        assert "_cached_call" not in fast.__dict__

    def test_a_copy_has_weights_of_its_own(self):
        fast, x = self.fresh()
        twin = copy.deepcopy(fast)
        nn.init.zeros_(twin.fc2.weight)
        nn.init.zeros_(twin.fc2.bias)
        with torch.no_grad():
            torch.testing.assert_close(twin(x), x / 2)
            assert not torch.equal(fast(x), x / 2)

    def test_fewer_hidden_channels_are_not_read_beyond_their_end(self):
        fast, x = self.fresh()
        fast.fc1.weight.data, fast.fc1.bias.data = fast.fc1.weight.data[:0], fast.fc1.bias.data[:0]
        fast.fc2.weight.data = fast.fc2.weight.data[:, :0]
        with torch.no_grad():
            torch.testing.assert_close(fast(x), x * torch.sigmoid(fast.fc2.bias)[:, None, None])
