"""Operators that no pass without values can run: the message says which, and the next step counts them."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import selab
from selab.attention.auto_sites import trace_ends
from selab.cost.crosscheck import compare
from selab.errors import InsertionError, ModelError
from selab.meta import passages

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
NCHW = (2, 3, 8, 8)
NEXT_STEP = r'has no kernel for tensors without values; run it on real tensors: on="cpu", --on cpu$'


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.quant, self.dequant = torch.ao.quantization.QuantStub(), torch.ao.quantization.DeQuantStub()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()
        self.pointwise, self.fc = nn.Conv2d(8, 8, 1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.pointwise(self.relu(self.bn(self.conv(self.quant(x)))))
        out: Tensor = self.dequant(self.fc(F.adaptive_avg_pool2d(y, 1).flatten(1)))
        return out


# Of two images: 36 positions with 8 filters of 27 and of 8 weights, and 8 × 4 weights of the head.
MACS = 2 * (36 * 8 * 27 + 36 * 8 * 8 + 8 * 4)


@pytest.fixture
def quantised(monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """A network that was quantised statically, in eager mode."""
    engines = torch.backends.quantized.supported_engines
    if not {"fbgemm", "x86", "qnnpack"} & set(engines):
        pytest.skip("torch was built without an engine for quantised convolutions")
    engine = next(one for one in ("fbgemm", "x86", "qnnpack") if one in engines)
    monkeypatch.setattr(torch.backends.quantized, "engine", engine)
    ao: Any = torch.ao.quantization
    net: Any = Small().eval()
    net.qconfig = ao.get_default_qconfig(engine)
    prepared = ao.prepare(ao.fuse_modules(net, [["conv", "bn", "relu"]]))
    prepared(torch.randn(NCHW))
    made: nn.Module = ao.convert(prepared)
    return made


def test_a_quantised_convolution(quantised: nn.Module) -> None:
    for call in (
        lambda: selab.count(quantised, NCHW),
        lambda: passages(quantised, ["conv"], NCHW),
        lambda: trace_ends(quantised, NCHW),
    ):
        with pytest.raises(ModelError, match=f"quantized::conv2d_relu {NEXT_STEP}"):
            call()
    fusion = selab.fuse(quantised, input_nchw=NCHW)
    assert "quantized::conv2d_relu has no kernel" in fusion.in_place_reason
    cost = selab.count(quantised, NCHW, on="cpu")
    assert cost.macs.conv_linear == MACS
    assert cost.unknown == {}
    assert passages(quantised, ["conv"], NCHW, on="cpu")["conv"].output_shape == (2, 8, 6, 6)
    counters = compare(quantised, NCHW, on="cpu")
    # torch's counter knows none of the quantised operators, and each is named.
    assert (counters["torch"].total, counters["torch"].remainder) == (0, 0)


def test_a_quantised_map_is_no_site(quantised: nn.Module) -> None:
    with pytest.raises(InsertionError, match=r"conv: its output is of torch\.quint8.*before the network is quantised"):
        selab.insert_se(quantised, "conv", input_nchw=NCHW, reduction=4, on="cpu")
    assert selab.measure(quantised, baseline=quantised, input=NCHW, budget=0.05).phase == "forward"


class Tripled(nn.Module):
    def __init__(self, operator: Any) -> None:
        super().__init__()
        self.conv, self.operator = nn.Conv2d(3, 8, 3), operator

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.operator(self.conv(x))
        return out


@torch.library.custom_op("selab_tests::no_fake_triple", mutates_args=())
def triple(x: Tensor) -> Tensor:
    return x * 3


LIBRARY = torch.library.Library("selab_tests_of_old", "DEF")
LIBRARY.define("triple(Tensor x) -> Tensor")
LIBRARY.impl("triple", lambda x: x * 3, "CPU")


@pytest.mark.parametrize("operator", [triple, torch.ops.selab_tests_of_old.triple], ids=["custom_op", "Library"])
def test_an_operator_of_a_library(operator: Any) -> None:
    net = Tripled(operator)
    with pytest.raises(ModelError, match=f"triple {NEXT_STEP}"):
        selab.count(net, NCHW)
    cost = selab.count(net, NCHW, on="cpu")
    assert cost.macs.conv_linear == 2 * 36 * 8 * 27
    # It has no counting rule, which is listed.
    assert list(cost.unknown.values()) == [1]


class Aligned(nn.Module):
    """Computes a CTC loss in its forward; what the lengths are is a matter of the subclass."""

    def __init__(self, lengths: Any) -> None:
        super().__init__()
        self.head, self.lengths = nn.Conv1d(8, 5, 1), lengths

    def forward(self, x: Tensor) -> Tensor:
        y = self.head(x).permute(2, 0, 1).log_softmax(2)
        targets = torch.ones(x.shape[0], 6, dtype=torch.long)
        return F.ctc_loss(y, targets, *self.lengths(x), reduction="none")


def _of_values(x: Tensor) -> tuple[Tensor, Tensor]:
    return (x[:, 0] > -10).sum(1), (x[:, 0] > -10).sum(1).clamp(max=6)


@pytest.mark.parametrize(
    "lengths",
    [
        lambda x: ((x.shape[2],) * x.shape[0], (6,) * x.shape[0]),
        lambda x: (torch.full((x.shape[0],), x.shape[2]), torch.full((x.shape[0],), 6)),
        lambda x: (torch.full((len(x),), x.shape[2]), torch.tensor([6, 4, 6, 2][: len(x)])),
        lambda x: ((x[:, 0] > -10).sum(1), torch.full((len(x),), 6)),
        _of_values,
    ],
    ids=["numbers", "tensors", "of several lengths", "of values in time", "of values"],
)
def test_ctc_loss_in_forward(lengths: Any) -> None:
    # Four sequences of 300 steps: more values than a pass without them follows.
    net, shape = Aligned(lengths), (4, 8, 300)
    if lengths is _of_values:
        with pytest.raises(ModelError, match=r'values of a tensor.*; run it on real tensors: on="cpu", --on cpu$'):
            selab.count(net, shape)
    else:
        assert selab.count(net, shape) == selab.count(net, shape, on="cpu")
    cost = selab.count(net, shape, on="cpu")
    assert cost.macs.conv_linear == 4 * 300 * 8 * 5
    assert cost.unknown == {}
    # Two states for each label and one more, ten operations at each step.
    assert cost.by_operator["loss"].macs == 300 * (2 * 24 + 4) * 10
