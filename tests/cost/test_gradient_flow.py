"""The backward pass against torch's own counter over a real one, for networks in which not every gradient flows."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from selab.cost.count import count


class Parts(nn.Module):
    """Two convolutions, two layers and a forward pass that uses them as it likes."""

    def __init__(self, forward: Callable[["Parts", Tensor], Any], frozen: str = "") -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.head, self.aux = nn.Linear(8, 5), nn.Linear(8, 5)
        self.run = forward
        for name in frozen.split():
            self.get_submodule(name).requires_grad_(False)

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


@dataclass
class Result:
    logits: Tensor
    extra: Tensor


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return gradients[0] @ w.T, x.T @ gradients[0]


def pooled(x: Tensor) -> Tensor:
    return x.mean((2, 3))


def in_place_on_a_view(net: Parts, x: Tensor) -> Tensor:
    y = net.a(x)
    y[:, :4].mul_(y[:, 4:].sigmoid())
    return net.head(pooled(net.b(y.clone())))


def overwritten(net: Parts, x: Tensor) -> Tensor:
    y = net.a(x).clone()
    y.zero_()
    return net.head(pooled(net.b(y)))


def under_no_grad(net: Parts, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = net.a(x)
    return net.head(pooled(net.b(y)))


def without_inference(net: Parts, x: Tensor) -> Tensor:
    with torch.inference_mode():
        y = net.a(x)
    return net.head(pooled(net.b(y.clone())))


def half_detached(net: Parts, x: Tensor) -> Tensor:
    y = net.a(x)
    return net.head(pooled(net.b(y).detach() + y))


def two_results(net: Parts, x: Tensor) -> dict[str, list[Tensor]]:
    y = pooled(net.b(net.a(x)))
    return {"out": [net.head(y)], "aux": [net.aux(y.detach())]}


def attention(net: Parts, x: Tensor) -> Tensor:
    y = net.a(x).flatten(2).mT
    return net.head((y @ y.mT).softmax(-1) @ y.detach())


def largest(net: Parts, x: Tensor) -> Tensor:
    return net.head(pooled(net.b(x[:, :1].expand(-1, 8, -1, -1)) * net.a(x).argmax().float()))


def one_chunk(net: Parts, x: Tensor) -> Tensor:
    first, second = pooled(net.b(net.a(x))).chunk(2, 1)
    return net.head(torch.cat([first, second.detach()], 1))


NETWORKS: dict[str, Callable[[], Parts]] = {
    "all of it": lambda: Parts(lambda net, x: net.head(pooled(net.norm(net.b(F.relu(net.a(x))))))),
    "first frozen": lambda: Parts(lambda net, x: net.head(pooled(net.b(net.a(x)))), "a"),
    "middle frozen": lambda: Parts(lambda net, x: net.head(pooled(net.b(net.a(x)))), "b"),
    "head frozen": lambda: Parts(lambda net, x: net.head(pooled(net.b(net.a(x)))), "head"),
    "backbone frozen": lambda: Parts(lambda net, x: net.head(pooled(net.norm(net.b(net.a(x))))), "a b norm"),
    "all frozen": lambda: Parts(lambda net, x: net.head(pooled(net.b(net.a(x)))), "a b head aux norm"),
    "detached": lambda: Parts(lambda net, x: net.head(pooled(net.b(net.a(x)).detach()))),
    "half detached": lambda: Parts(half_detached),
    "data": lambda: Parts(lambda net, x: net.head(pooled(net.b(net.a(x).data)))),
    "under no_grad": lambda: Parts(under_no_grad),
    "inference mode": lambda: Parts(without_inference),
    "a head that is not returned": lambda: Parts(
        lambda net, x: (net.aux(pooled(y := net.a(x))), net.head(pooled(net.b(y))))[1]
    ),
    "a comparison": lambda: Parts(lambda net, x: net.head(pooled(net.b((net.a(x) > 0).float())))),
    "an index of the largest": lambda: Parts(largest),
    "a mask": lambda: Parts(lambda net, x: net.head(pooled(net.b(net.a(x)) * (net.a(x) > 0)))),
    "a step function": lambda: Parts(lambda net, x: net.head(pooled(net.b(net.a(x).round())))),
    "two results": lambda: Parts(two_results),
    "an object": lambda: Parts(lambda net, x: Result(net.head(pooled(net.a(x))), pooled(net.b(net.a(x)).detach()))),
    "in place on a view": lambda: Parts(in_place_on_a_view),
    "overwritten": lambda: Parts(overwritten),
    "attention": lambda: Parts(attention),
    "a function of one's own": lambda: Parts(
        lambda net, x: Product.apply(Product.apply(pooled(net.a(x)), net.head.weight.T), net.aux.weight)
    ),
    "a function that is not used": lambda: Parts(
        lambda net, x: (Product.apply(pooled(net.a(x)), net.head.weight.T), net.head(pooled(net.a(x))))[1]
    ),
    "checkpoint": lambda: Parts(
        lambda net, x: net.head(pooled(checkpoint(net.b, net.a(x), use_reentrant=False).detach() + net.a(x)))
    ),
    "one of two chunks": lambda: Parts(one_chunk),
}


def tensors_of(output: Any) -> list[Tensor]:
    values = vars(output).values() if isinstance(output, Result) else [output]
    return [x for x in torch.utils._pytree.tree_leaves(list(values)) if isinstance(x, Tensor) and x.requires_grad]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_backward_pass_is_the_one_that_torch_runs(name: str, training: bool) -> None:
    net = NETWORKS[name]().train(training)
    x = torch.randn(2, 3, 6, 6)
    outputs = tensors_of(net(x))
    with warnings.catch_warnings(), FlopCounterMode(display=False) as counter:
        warnings.simplefilter("ignore")
        if outputs:
            torch.stack([y.sum() for y in outputs]).sum().backward()  # type: ignore[no-untyped-call]
    assert 2 * count(net, x, training=training).macs_backward.conv_linear == counter.get_total_flops()
