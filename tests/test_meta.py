import pytest
import torch
from torch import nn

from selab.errors import ModelError
from selab.meta import FakePass, RealPass, evaluating, example_arguments, first_line, meta_twin, passages


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


class Doubled(nn.Module):
    def forward(self, x):
        return x * 2


def test_a_twin_has_no_values_and_keeps_ties():
    net = Net()
    net.conv.weight.requires_grad_(False)
    twin = meta_twin(net)
    assert all(tensor.is_meta for tensor in [*twin.parameters(), *twin.buffers(), twin.plain])
    assert twin.conv.weight is twin.tied.weight
    assert not twin.conv.weight.requires_grad
    assert twin(torch.empty(2, 3, 8, 8, device="meta")).shape == (2, 4, 6, 6)
    assert not net.conv.weight.is_meta


def test_passages_name_the_module_whose_output_a_module_takes_as_it_is():
    inner = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Identity())
    net = nn.Sequential(inner, nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 1), Doubled())
    seen = passages(net, [path for path, _ in net.named_modules() if path], (1, 3, 8, 8))
    # The innermost and first one: nn.Identity and the nn.Sequential return what the convolution returned.
    assert {path: one.source for path, one in seen.items()} == {
        "0": "",
        "0.0": "",
        "0.1": "0.0",
        "1": "0.0",
        "2": "1",
        # Changed in place, it is another value than the norm's.
        "3": "2",
        "4": "3",
    }
    seen = passages(nn.Sequential(net[4], nn.ReLU()), ["1"], (1, 3, 8, 8))
    assert seen["1"].source == ""


def test_sources_in_inference_mode():
    class Inferring(nn.Sequential):
        def forward(self, x):
            with torch.inference_mode():
                return super().forward(x)

    seen = passages(Inferring(nn.Conv2d(3, 4, 3), nn.ReLU()), ["0", "1"], (1, 3, 8, 8))
    assert (seen["0"].source, seen["1"].source) == ("", "0")


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


def test_fake_tensors_report_the_device_of_the_network():
    net = Net()
    fakes = FakePass(net, (2, 3, 8, 8))
    with fakes.running():
        out = fakes()
        made = torch.arange(4)
    assert out.shape == (2, 4, 6, 6)
    assert out.device == made.device == torch.device("cpu")
    assert isinstance(fakes.model.conv.weight, nn.Parameter)
    assert fakes.model.conv.weight is fakes.model.tied.weight
    assert not any(torch.equal(a, torch.zeros(1)) for a in net.parameters())


def test_small_values_are_known():
    class Steered(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("steps", torch.tensor([2]))

        def forward(self, x):
            steps = self.steps.clone()
            steps[0] += 1
            for _ in range(int(steps)):
                x = x + torch.tensor([1.0, 2.0]).sum().item()
            return x[torch.arange(4) > 1]

    net = Steered()
    fakes = FakePass(net, (4, 3))
    with fakes.running():
        assert fakes().shape == (2, 3)
    assert net.steps.item() == 2


def test_channels_last_stays_so():
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2))
    net = net.to(memory_format=torch.channels_last).eval()
    x = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
    fakes = FakePass(net, x)
    with fakes.running():
        assert fakes().stride() == net(x).stride()


def test_example_arguments():
    net, x = Net(), torch.ones(1, 3, 8, 8)
    assert example_arguments(net, (1, 3, 8, 8))[0][0].shape == (1, 3, 8, 8)
    assert example_arguments(net, (1, 3, 8, 8), device="meta")[0][0].is_meta
    assert example_arguments(net, x) == ((x,), {})
    assert example_arguments(net, {"x": x}) == ((), {"x": x})
    args, kwargs = example_arguments(net, ({"a": [x]}, 2), device="meta")
    assert args[0]["a"][0].is_meta
    assert args[1] == 2
    assert kwargs == {}


def test_passages_take_nested_inputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(1, 4, 1)

        def forward(self, batch, *, depth):
            return self.a(batch["rgb"]) + self.b(depth)

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.two = Two()

        def forward(self, batch, depth):
            return self.two(batch, depth=depth)

    rgb, depth = torch.ones(2, 3, 4, 4), torch.ones(2, 1, 4, 4)
    seen = passages(Outer(), ["two.a", "two.b", "two"], ({"rgb": rgb}, depth))
    assert seen["two.a"].output_shape == seen["two.b"].output_shape == (2, 4, 4, 4)
    assert seen["two"].input_kind == "dict"


@pytest.mark.parametrize("kind", [FakePass, RealPass])
def test_a_lazy_module_is_refused_in_words(kind):
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.LazyConv2d(8, 3))
    with pytest.raises(ModelError, match=r"1 \(LazyConv2d\) has parameters without a shape; run the network once"):
        kind(net, (1, 3, 8, 8))
    net(torch.ones(1, 3, 8, 8))
    kind(net, (1, 3, 8, 8))
