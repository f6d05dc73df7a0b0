"""Every layer of torch.nn is counted without an unknown operator."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from selab.cost.count import count

MAP1, MAP2, MAP3 = (2, 4, 8), (2, 4, 8, 8), (2, 4, 8, 8, 8)
MAPS = {"1d": MAP1, "2d": MAP2, "3d": MAP3}

# Layers with arguments of their own.
ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "AdaptiveLogSoftmaxWithLoss": (8, 20, [5, 10]),
    "Bilinear": (8, 7, 5),
    "ChannelShuffle": (2,),
    "CircularPad1d": (1,),
    "CircularPad2d": (1,),
    "CircularPad3d": (1,),
    "CrossMapLRN2d": (3,),
    "Embedding": (10, 4),
    "EmbeddingBag": (10, 4),
    "Flatten": (),
    "Fold": (8, 3),
    "GroupNorm": (2, 4),
    "LayerNorm": (8,),
    "LinearCrossEntropyLoss": (8, 20),
    "LocalResponseNorm": (3,),
    "LPPool1d": (2.0, 2),
    "LPPool2d": (2.0, 2),
    "LPPool3d": (2.0, 2),
    "FractionalMaxPool2d": (2, 4),
    "FractionalMaxPool3d": (2, 4),
    "MultiheadAttention": (8, 2),
    "PixelShuffle": (2,),
    "PixelUnshuffle": (2,),
    "RMSNorm": (8,),
    "Softmax": (1,),
    "Softmin": (1,),
    "LogSoftmax": (1,),
    "SyncBatchNorm": (4,),
    "Threshold": (0.1, 0.0),
    "Transformer": (8, 2, 1, 1, 16),
    "TransformerDecoderLayer": (8, 2, 16),
    "TransformerEncoderLayer": (8, 2, 16),
    "Unflatten": (1, (2, 2)),
    "Unfold": (3,),
    "Upsample": (None, 2),
    "UpsamplingBilinear2d": (None, 2),
    "UpsamplingNearest2d": (None, 2),
}
# What holds no arithmetic of its own, is made of other layers, or is abstract.
WITHOUT = {
    *("Container", "Module", "ModuleDict", "ModuleList", "ParameterDict", "ParameterList", "Sequential"),
    *("RNNBase", "RNNCellBase", "LinearCrossEntropyOptions", "TransformerDecoder", "TransformerEncoder"),
}
# Lazy layers have no shapes yet.
LAYERS = [name for name in nn.modules.__all__ if name not in WITHOUT and not name.startswith("Lazy")]


def index(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.long)


def floats(*shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
    return tuple(torch.zeros(shape) for shape in shapes)


INPUTS: dict[str, tuple[Tensor, ...]] = {
    "AdaptiveLogSoftmaxWithLoss": (torch.zeros(6, 8), index(6)),
    "Bilinear": floats((3, 8), (3, 7)),
    "CosineEmbeddingLoss": floats((6, 8), (6, 8), (6,)),
    "CrossEntropyLoss": (torch.zeros(6, 8), index(6)),
    "CTCLoss": (torch.zeros(12, 2, 5), index(2, 4)),
    "Embedding": (index(3),),
    "EmbeddingBag": (index(3, 2),),
    "Fold": floats((2, 18, 36)),
    "GaussianNLLLoss": floats((6, 8), (6, 8), (6, 8)),
    "GRUCell": floats((2, 8)),
    "LSTMCell": floats((2, 8)),
    "RNNCell": floats((2, 8)),
    "LinearCrossEntropyLoss": (torch.zeros(6, 8), index(6)),
    "MarginRankingLoss": floats((6,), (6,), (6,)),
    "MultiheadAttention": floats(MAP1, MAP1, MAP1),
    "MultiLabelMarginLoss": (torch.zeros(6, 8), index(6, 8)),
    "MultiMarginLoss": (torch.zeros(6, 8), index(6)),
    "NLLLoss": (torch.zeros(6, 8), index(6)),
    "NLLLoss2d": (torch.zeros(2, 4, 8, 8), index(2, 8, 8)),
    "Transformer": floats(MAP1, MAP1),
    "TransformerDecoderLayer": floats(MAP1, MAP1),
    "TripletMarginLoss": floats((6, 8), (6, 8), (6, 8)),
    "TripletMarginWithDistanceLoss": floats((6, 8), (6, 8), (6, 8)),
}


def made(name: str) -> nn.Module:
    """Return a layer of this name with small sizes."""
    kind = getattr(nn, name)
    if name in ARGUMENTS:
        return kind(*ARGUMENTS[name])
    if name.startswith("Conv"):
        return kind(4, 6, 3)
    if "BatchNorm" in name or "InstanceNorm" in name:
        return kind(4)
    if name.startswith(("Adaptive", "MaxPool", "AvgPool")):
        return kind(2)
    if "Pad" in name:
        return kind(1, 0.0) if name.startswith("Constant") else kind(1)
    if name in ("Linear", "GRU", "LSTM", "RNN", "GRUCell", "LSTMCell", "RNNCell"):
        return kind(8, 6)
    return kind()


class CTC(nn.Module):
    """The loss with its lengths given as numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.loss = nn.CTCLoss()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.loss(x, y, (12, 12), (4, 4))


class Unpooled(nn.Module):
    def __init__(self, dims: str) -> None:
        super().__init__()
        self.pool = getattr(nn, f"MaxPool{dims}")(2, return_indices=True)
        self.unpool = getattr(nn, f"MaxUnpool{dims}")(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.unpool(*self.pool(x))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_a_layer_of_torch_is_counted(name: str) -> None:
    layer = CTC() if name == "CTCLoss" else Unpooled(name[-2:]) if name.startswith("MaxUnpool") else made(name)
    loss = floats((6, 8), (6, 8)) if name.endswith("Loss") or name in ("CosineSimilarity", "PairwiseDistance") else None
    inputs = INPUTS.get(name) or loss or floats(MAPS.get(name[-2:], MAP2))
    if name in ("LSTM", "GRU", "RNN", "TransformerEncoderLayer"):
        inputs = floats(MAP1)
    for training in (False, True):
        assert count(layer, inputs, training=training).unknown == {}
