import torch
from torch import nn

from selab.meta import evaluating, first_line, meta_twin, passages


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.tied = nn.Conv2d(3, 4, 3)
        self.tied.weight = self.conv.weight
        self.bn = nn.BatchNorm2d(4)
        self.plain = torch.ones(4, 1, 1)  # neither parameter nor buffer

    def forward(self, x):
        return self.bn(self.conv(x) + self.tied(x)) * self.plain


def test_a_twin_has_no_values_and_keeps_ties():
    net = Net()
    net.conv.weight.requires_grad_(False)
    twin = meta_twin(net)
    assert all(tensor.is_meta for tensor in [*twin.parameters(), *twin.buffers(), twin.plain])
    assert twin.conv.weight is twin.tied.weight
    assert not twin.conv.weight.requires_grad
    assert twin(torch.empty(2, 3, 8, 8, device="meta")).shape == (2, 4, 6, 6)
    assert not net.conv.weight.is_meta


def test_passages_report_shapes_and_calls_and_leave_the_model_alone():
    net = nn.Sequential(Net(), nn.Flatten(), nn.Linear(4 * 36, 2)).train()
    state = {key: value.clone() for key, value in net.state_dict().items()}
    seen = passages(net, ["0.conv", "0.bn", "2"], (5, 3, 8, 8))
    assert seen["0.conv"].input_shape == (5, 3, 8, 8)
    assert seen["0.conv"].output_shape == (5, 4, 6, 6)
    assert seen["0.bn"].calls == 1
    assert seen["2"].output_shape == (5, 2)
    assert net.training
    assert not any(module._forward_hooks for module in net.modules())
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())


def test_each_module_gets_its_own_mode_back():
    net = nn.Sequential(nn.ReLU(), nn.Dropout())
    net[1].eval()
    with evaluating(net):
        assert not net[0].training
    assert net.training
    assert net[0].training
    assert not net[1].training


def test_first_line():
    assert first_line(ValueError("one\ntwo")) == "one"
    assert first_line(KeyError()) == "KeyError"
