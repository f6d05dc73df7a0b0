"""Parameters of quantised layers, which torch packs: they are counted as those of the layers that they came from."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import selab
from selab.cost.crosscheck import compare

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
ao: Any = torch.ao.quantization


@pytest.fixture(autouse=True)
def _engine(monkeypatch: pytest.MonkeyPatch) -> None:
    engines = [one for one in ("fbgemm", "x86", "qnnpack") if one in torch.backends.quantized.supported_engines]
    if not engines:
        pytest.skip("torch was built without an engine for quantised layers")
    monkeypatch.setattr(torch.backends.quantized, "engine", engines[0])


def converted(*layers: nn.Module) -> nn.Module:
    net: Any = nn.Sequential(ao.QuantStub(), *layers, ao.DeQuantStub()).eval()
    net.qconfig = ao.get_default_qconfig(torch.backends.quantized.engine)
    prepared = ao.prepare(net)
    prepared(torch.randn(1, 3, 16, 16))
    made: nn.Module = ao.convert(prepared)
    return made


@pytest.mark.parametrize("bias", [True, False])
def test_static_quantisation(bias: bool) -> None:
    net = converted(
        nn.Conv2d(3, 16, 3, bias=bias),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, groups=2, bias=bias),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 5, bias=bias),
    )
    cost = selab.count(net, (2, 3, 16, 16), on="cpu")
    assert cost.params == 16 * 27 + 16 * 8 * 9 + 16 * 5 + (16 + 16 + 5 if bias else 0)
    # The scale and the zero point of the input.
    assert cost.buffer_elements == 2


def test_a_shared_layer_counts_once() -> None:
    quant, conv, relu, dequant = converted(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU()).children()
    net = nn.Sequential(quant, conv, relu, conv, dequant)
    assert selab.count(net, (1, 3, 16, 16), on="cpu").params == 3 * 27 + 3


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(8, 4), (2, 8)),
        (nn.Linear(8, 4, bias=False), (2, 8)),
        (nn.LSTM(8, 3), (5, 2, 8)),
        (nn.LSTM(8, 3, num_layers=2, bidirectional=True), (5, 2, 8)),
        (nn.GRU(8, 3), (5, 2, 8)),
        (nn.LSTMCell(8, 3), (2, 8)),
    ],
    ids=["linear", "without a bias", "LSTM", "four directions", "GRU", "cell"],
)
@pytest.mark.parametrize("dtype", [torch.qint8, torch.float16])
def test_dynamic_quantisation(layer: nn.Module, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if dtype is torch.float16 and isinstance(layer, nn.LSTMCell):
        pytest.skip("torch has no such cell")
    expected = sum(p.numel() for p in layer.parameters())
    kinds = {nn.Linear, nn.LSTM, nn.GRU, nn.LSTMCell}
    net = ao.quantize_dynamic(nn.Sequential(layer, nn.Identity()), kinds, dtype=dtype)
    assert not list(net.parameters())
    cost = selab.count(net, (torch.randn(shape),), on="cpu")
    assert cost.params == expected


def test_the_layers_of_a_block() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 1), selab.SqueezeExcitation(8, 2))
    plain = selab.count(net, (1, 3, 4, 4))
    quantised = selab.count(ao.quantize_dynamic(net, {nn.Linear}), (1, 3, 4, 4), on="cpu")
    assert (quantised.params, quantised.se.params) == (plain.params, plain.se.params)
    assert quantised.se.params == 8 * 4 + 4 + 4 * 8 + 8


def test_a_counter_that_cannot_trace_them_says_so_in_one_short_line() -> None:
    net = converted(nn.Conv2d(3, 16, 3))
    failed = compare(net, (1, 3, 16, 16), on="cpu")["fvcore"]
    assert failed.total is None
    assert failed.error == "fvcore fails on this model: torch.jit.trace cannot follow the packed weights of its layers"


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("got <Odd object at 0x7f01ab> twice\nand more", "ValueError: got Odd twice"),
        ("got <my.own.Odd object at 0x55E1562C7420>.", "ValueError: got my.own.Odd"),
        ("got <function f at 0x7f01ab>", "ValueError: got function f"),
        ("<3 layers, 0x10>", "ValueError: <3 layers, 0x10>"),
        ("", "ValueError: ValueError"),
    ],
)
def test_the_message_of_a_failed_counter_has_no_address(message: str, expected: str) -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if torch.jit.is_tracing():
                raise ValueError(message)
            return x + 1

    failed = compare(Net(), (1, 3, 4, 4))["fvcore"]
    assert failed.error == f"fvcore fails on this model: {expected}"
