"""Empty, tiny, strided and overlapping feature maps give what the reference gives, or are left to torch."""

import pytest
import torch
from torch import nn

from selab.attention.se import SqueezeExcitation
from selab.kernels import cpu


def channels_last(*shape):
    return torch.randn(shape).contiguous(memory_format=torch.channels_last)


MAPS = {
    "no image": lambda: torch.randn(0, 6, 4, 5),
    "no image, channels last": lambda: channels_last(0, 6, 4, 5),
    "one position": lambda: torch.randn(3, 6, 1, 1),
    "one position, channels last": lambda: channels_last(3, 6, 1, 1),
    "one row": lambda: channels_last(2, 6, 1, 7),
    "one channel": lambda: torch.randn(2, 1, 4, 5),
    "one channel, channels last": lambda: channels_last(2, 1, 4, 5),
    "every other image": lambda: torch.randn(4, 6, 4, 5)[::2],
    "every other channel": lambda: torch.randn(2, 12, 4, 5)[:, ::2],
    "every other column": lambda: torch.randn(2, 6, 4, 10)[..., ::2],
    "a window of a large map": lambda: torch.randn(2, 6, 300, 301)[..., 7:11, 3:8],
    "positions swapped": lambda: torch.randn(2, 6, 5, 4).transpose(2, 3),
    "images swapped with channels": lambda: torch.randn(6, 2, 4, 5).transpose(0, 1),
    "one image with a huge stride": lambda: torch.randn(6 * 20).as_strided((1, 6, 4, 5), (2**40, 20, 5, 1)),
    "repeated images": lambda: torch.randn(1, 6, 4, 5).expand(3, -1, -1, -1),
    "repeated positions": lambda: torch.randn(2, 6, 1, 1).expand(-1, -1, 4, 5),
    "overlapping rows": lambda: torch.randn(100).as_strided((2, 6, 4, 5), (6, 3, 2, 1)),
    "an offset": lambda: torch.randn(1 + 2 * 6 * 20)[1:].view(2, 6, 4, 5),
}


def block(channels, impl):
    torch.manual_seed(channels)
    made = SqueezeExcitation(channels, 1 if channels == 1 else 2, impl=impl)
    nn.init.normal_(made.fc2.bias)
    return made


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("relu_in", [False, True])
def test_output_and_gradients(name, relu_in):
    x = MAPS[name]()
    ours, theirs = block(x.shape[1], "auto"), block(x.shape[1], "reference")
    ours.relu_in = theirs.relu_in = relu_in
    before = x.clone()
    with torch.inference_mode():
        for _ in range(2):
            torch.testing.assert_close(ours(x), theirs(x))
    results = []
    for one in (ours, theirs):
        given = x.detach().requires_grad_()
        out = one(given)
        out.square().sum().backward()
        results.append((out.detach(), given.grad, *(parameter.grad for parameter in one.parameters())))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(x, before)


@pytest.mark.skipif(bool(cpu.native_reason()), reason=cpu.native_reason() or "it is there")
@pytest.mark.parametrize("name", MAPS)
def test_the_native_code_takes_dense_maps_only(name):
    x = MAPS[name]()
    dense = x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)
    assert (cpu.activated_refuses(x, None) == "") == dense
    if dense:
        with torch.no_grad():
            torch.testing.assert_close(cpu.activated(x, x, None, "silu"), nn.functional.silu(x + x))
            torch.testing.assert_close(cpu.native_squeezed(x), x.mean((2, 3)))
