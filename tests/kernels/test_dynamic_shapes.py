"""Exported and compiled blocks take every batch and every size of feature map, not those of the example alone."""

import pytest
import torch
from torch import nn

from selab.attention.se import GatedJoin, SqueezeExcitation
from selab.fusion.fuse import fuse

AUTO = torch.export.Dim.AUTO
DYNAMIC = {
    "a named batch": {0: torch.export.Dim("batch")},
    "an automatic batch": {0: AUTO},
    "named sizes": {0: torch.export.Dim("batch"), 2: torch.export.Dim("height"), 3: torch.export.Dim("width")},
    "automatic sizes": {0: AUTO, 2: AUTO, 3: AUTO},
}
# The form for the compiler changes at 4 images.
BATCHES = (1, 3, 4, 5, 9)


class Join(nn.Module):
    formula = "relu(branch + shortcut)"

    def forward(self, branch, shortcut):
        return (branch + shortcut).relu()


class Residual(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.conv = nn.Conv2d(16, 16, 3, padding=1)
        self.bn = nn.BatchNorm2d(16)
        self.join = GatedJoin(Join(), SqueezeExcitation(16, 4, **options), "branch")

    def forward(self, x):
        return self.join(self.bn(self.conv(x)), x)


def network(**options):
    torch.manual_seed(0)
    block = SqueezeExcitation(16, 4, activation="silu", gate="hardsigmoid", **options)
    layers = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(inplace=True), block, Residual(**options)
    return nn.Sequential(*layers).eval().requires_grad_(False)


def fused(**options):
    model = network(**options)
    fuse(model, input_nchw=(1, 3, 8, 8))
    for one in model.modules():
        if isinstance(one, SqueezeExcitation):
            one.impl = options.get("impl", "auto")
    return model


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("dynamic", DYNAMIC)
@pytest.mark.parametrize("impl", ["auto", "operator"])
def test_an_exported_network_takes_every_batch(impl, dynamic, strict):
    plain, model = network(), fused(impl=impl)
    example = torch.randn(2, 3, 8, 10)
    program = torch.export.export(model, (example,), dynamic_shapes=(DYNAMIC[dynamic],), strict=strict)
    assert all(one.upper > 2**40 for one in program.range_constraints.values())
    sizes = (8, 10) if len(DYNAMIC[dynamic]) == 1 else (5, 7)
    # An automatic size is never one: torch's own rule.
    for batch in BATCHES[1:] if AUTO in DYNAMIC[dynamic].values() else BATCHES:
        x = torch.randn(batch, 3, *sizes)
        torch.testing.assert_close(program.module()(x), plain(x))


@pytest.mark.parametrize("batch", [2, 4, 5])
def test_a_static_batch_stays_static(batch):
    x = torch.randn(batch, 3, 8, 8)
    program = torch.export.export(fused(), (x,))
    assert not program.range_constraints
    torch.testing.assert_close(program.module()(x), network()(x))


@pytest.mark.parametrize("grad", [False, True])
def test_a_network_compiled_with_dynamic_sizes_is_compiled_once(grad):
    torch.compiler.reset()
    graphs = []

    def backend(graph, _example):
        graphs.append(graph)
        return graph

    plain, model = network().requires_grad_(grad), fused().requires_grad_(grad)
    compiled = torch.compile(model, backend=backend, dynamic=True, fullgraph=True)
    # The first sizes all differ: the compiler takes equal ones for one symbol.
    for batch in sorted(BATCHES[1:], reverse=True):
        x = torch.randn(batch, 3, 6 + batch, 8)
        torch.testing.assert_close(compiled(x), plain(x))
    assert len(graphs) == 1


@pytest.mark.filterwarnings("ignore")  # torch's exporter meets deprecations of torch
def test_onnx_with_dynamic_axes():
    pytest.importorskip("onnxscript")
    program = torch.onnx.export(
        fused(),
        (torch.randn(2, 3, 8, 8),),
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("batch"), 2: AUTO, 3: AUTO},),
        verbose=False,
    )
    (given,) = program.model.graph.inputs
    assert [isinstance(one, int) for one in given.shape] == [False, True, False, False]
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(program.model_proto.SerializeToString())
    for batch in BATCHES:
        x = torch.randn(batch, 3, 6, 9)
        (found,) = session.run(None, {given.name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), network()(x), rtol=1e-4, atol=1e-5)
