import pytest
import torch
from torch import nn

from selab.attention.se import GatedJoin, SqueezeExcitation, squeeze_width
from selab.cost.count import count
from selab.errors import InsertionError

GATES = ["sigmoid", "tanh", "relu", "hardsigmoid"]


def test_the_block_is_the_paper_s_formula():
    torch.manual_seed(0)
    block = SqueezeExcitation(8, reduction=2).double()
    x = torch.randn(3, 8, 5, 4, dtype=torch.float64)
    squeezed = x.sum((2, 3)) / 20
    hidden = (squeezed @ block.fc1.weight.T + block.fc1.bias).clamp(min=0)
    gate = 1 / (1 + torch.exp(-(hidden @ block.fc2.weight.T + block.fc2.bias)))
    torch.testing.assert_close(block(x), x * gate[:, :, None, None])


def test_max_squeeze_takes_the_largest_value_of_each_map():
    block = SqueezeExcitation(4, reduction=2, squeeze="max")
    x = torch.arange(24.0).reshape(1, 4, 2, 3)
    assert block.squeeze(x).tolist() == [[5.0, 11.0, 17.0, 23.0]]


@pytest.mark.parametrize(("bias", "expected"), [(False, 2 * 64 * 4), (True, 2 * 64 * 4 + 64 + 4)])
def test_parameters(bias, expected):
    assert sum(p.numel() for p in SqueezeExcitation(64, bias=bias).parameters()) == expected


@pytest.mark.parametrize(
    ("channels", "reduction", "divisor", "expected"),
    [
        (64, 16, 1, 4),
        (30, 16, 1, 1),
        (64, 16, 8, 8),  # 4 is under the smallest multiple
        (72, 4, 8, 24),  # 18 would round to 16, which loses over a tenth
        (960, 4, 8, 240),
    ],
)
def test_squeeze_width(channels, reduction, divisor, expected):
    assert squeeze_width(channels, reduction, divisor) == expected


@pytest.mark.parametrize("gate", GATES)
def test_gate_at_one_returns_the_input(gate):
    block = SqueezeExcitation(6, reduction=2, gate=gate, init="identity")
    x = torch.randn(2, 6, 3, 3)
    assert torch.equal(block(x), x)


@pytest.mark.parametrize("gate", GATES)
def test_identity_init_learns(gate):
    torch.manual_seed(0)
    block = SqueezeExcitation(6, reduction=2, gate=gate, init="identity")
    x, target = torch.randn(8, 6, 3, 3), torch.randn(8, 6, 3, 3)
    optimizer = torch.optim.SGD(block.parameters(), lr=0.1)
    seen = {}
    for step in range(2):
        optimizer.zero_grad()
        (block(x) - target).square().mean().backward()
        seen[step] = (block.fc1.weight.grad.abs().max().item(), block.fc2.weight.grad.abs().max().item())
        optimizer.step()
    assert seen[0][1] > 1e-4, "the second layer must learn from the first step"
    assert seen[1][0] > 1e-6, "the first layer must follow in the second"
    assert not torch.equal(block(x), x)


def test_a_saturated_sigmoid_would_not_learn():
    """Why identity is not a large bias: it returns one as well, and its gradient is nothing."""
    block = SqueezeExcitation(6, reduction=2)
    nn.init.zeros_(block.fc2.weight)
    nn.init.constant_(block.fc2.bias, 40.0)
    x = torch.randn(8, 6, 3, 3)
    assert torch.equal(block(x), x)
    (block(x) - 1).square().mean().backward()
    assert block.fc2.weight.grad.abs().max().item() == 0


@pytest.mark.parametrize("gate", ["sigmoid", "tanh", "hardsigmoid"])
def test_identity_is_not_read_without_its_stretch(gate):
    identity = SqueezeExcitation(6, reduction=2, gate=gate, init="identity")
    with pytest.raises(RuntimeError, match="gate_affine"):
        SqueezeExcitation(6, reduction=2, gate=gate).load_state_dict(identity.state_dict())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"reduction": 7}, "reduction 7 is larger than the 6 channels"),
        ({"reduction": 0}, "at least 1"),
        ({"reduction": 2, "gate": "softmax"}, "allowed: sigmoid, tanh, relu, hardsigmoid"),
        ({"reduction": 2, "squeeze": "std"}, "allowed: avg, max"),
        ({"reduction": 2, "init": "zeros"}, "allowed: he, identity"),
        ({"squeeze_channels": 0}, "at least 1"),
        ({"reduction": 2, "gate": "relu", "bias": False, "init": "identity"}, "needs bias=True"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(InsertionError, match=message):
        SqueezeExcitation(6, **arguments)


class _Add(nn.Module):
    def forward(self, branch, shortcut):
        return branch + shortcut


@pytest.mark.parametrize("edge", ["branch", "shortcut", "output"])
def test_gated_join_gates_its_edge(edge):
    block = SqueezeExcitation(4, reduction=2)
    branch, shortcut = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    expected = {
        "branch": block(branch) + shortcut,
        "shortcut": branch + block(shortcut),
        "output": block(branch + shortcut),
    }[edge]
    torch.testing.assert_close(GatedJoin(_Add(), block, edge)(branch, shortcut), expected)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_memory_format_is_kept(memory_format):
    x = torch.randn(2, 8, 6, 6).contiguous(memory_format=memory_format)
    y = SqueezeExcitation(8, reduction=2)(x)
    assert y.is_contiguous(memory_format=memory_format)


def test_bf16_autocast_keeps_the_type_of_the_map():
    block = SqueezeExcitation(8, reduction=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert block(torch.randn(2, 8, 6, 6, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("squeeze", ["avg", "max", "none"])
@pytest.mark.parametrize("gate", ["sigmoid", "tanh", "relu", "hardsigmoid"])
@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("init", ["he", "identity"])
def test_macs_are_the_counter_s(squeeze, gate, activation, init):
    block = SqueezeExcitation(32, 4, squeeze=squeeze, gate=gate, activation=activation, init=init).eval()
    cost = count(block, (1, 32, 5, 7))
    assert block.macs(5, 7) == cost.macs.all
    assert cost.se.squeeze.macs == (0 if squeeze == "none" else 32 * 35)
    # Where the gate of a whole map is stretched, the stretch cannot be told from a scale.
    assert cost.se.scale.macs == 32 * 35 * (2 if squeeze == "none" and block.gate_affine is not None else 1)
    assert not cost.unknown


def test_without_a_squeeze_the_layers_run_at_every_position():
    torch.manual_seed(0)
    block = SqueezeExcitation(6, 2, squeeze="none", activation="silu").double()
    x = torch.randn(2, 6, 3, 4, dtype=torch.float64)
    hidden = torch.einsum("nchw,sc->nshw", x, block.fc1.weight) + block.fc1.bias[:, None, None]
    factor = torch.einsum("nshw,cs->nchw", hidden * hidden.sigmoid(), block.fc2.weight) + block.fc2.bias[:, None, None]
    torch.testing.assert_close(block(x), x * factor.sigmoid())
    # The same weights as with a squeeze: a checkpoint fits both.
    assert block.state_dict().keys() == SqueezeExcitation(6, 2).state_dict().keys()


@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("hooked", ["fc1", "activation", "fc2", "gate"])
def test_backward_hooks_on_a_layer_see_the_gradients_of_plain_pytorch(activation, hooked):
    torch.manual_seed(0)
    block = SqueezeExcitation(8, reduction=2, activation=activation).double()
    x = torch.randn(2, 8, 3, 3, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(block(x).square().sum(), x)
    layer, seen, kept = getattr(block, hooked), [], []
    layer.register_full_backward_hook(lambda _m, _grads_in, grads_out: seen.append(grads_out[0]))
    block.fc1.register_forward_hook(lambda _m, _args, out: kept.append(out))
    (grad,) = torch.autograd.grad(block(x).square().sum(), x)
    torch.testing.assert_close(grad, expected)
    assert len(seen) == 1
    # What a forward hook keeps is the layer's output, not that of the activation after it.
    torch.testing.assert_close(kept[0], x.mean((2, 3)) @ block.fc1.weight.T + block.fc1.bias)
