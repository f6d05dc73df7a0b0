"""`selab.fuse` on networks of timm and torchvision: the same outputs, gradients and keys."""

import copy

import pytest
import torch
from torch import nn

from selab.fusion.fuse import fuse
from selab.models import external

NETWORKS = [
    ("timm", "seresnet50", 16),
    ("timm", "mobilenetv3_large_100", 8),
    ("timm", "efficientnet_b0", 16),
    ("timm", "regnety_008", 14),
    ("timm", "seresnext50_32x4d", 16),
    ("torchvision", "mobilenet_v3_large", 8),
    ("torchvision", "efficientnet_b0", 16),
    ("torchvision", "regnet_y_400mf", 16),
]
SIZE = (2, 3, 96, 96)


def network(library, name):
    torch.manual_seed(0)
    if library == "timm":
        model = pytest.importorskip("timm").create_model(name, pretrained=False)
    else:
        model = pytest.importorskip("torchvision").models.get_model(name, weights=None)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2)
            # timm starts a residual branch at zero, and SE behind it would not be seen.
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return model


@pytest.mark.parametrize(("library", "name", "blocks"), NETWORKS)
def test_outputs_and_keys_stay_what_they_were(library, name, blocks):
    model = network(library, name).eval()
    fused = copy.deepcopy(model)
    fusion = fuse(fused, input_nchw=SIZE)
    assert len(fusion.blocks) == blocks == len(external.se_blocks(model))
    assert not [one for one in fusion.blocks if one.reason]
    assert all(one.in_place for one in fusion.blocks)
    assert list(fused.state_dict()) == list(model.state_dict())
    for (_, one), (_, two) in zip(model.named_modules(), fused.named_modules(), strict=True):
        assert isinstance(two, type(one))
    for memory_format in (torch.contiguous_format, torch.channels_last):
        example = torch.randn(SIZE).contiguous(memory_format=memory_format)
        with torch.inference_mode():
            expected, found = model(example.clone()), fused(example)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize(("library", "name", "blocks"), NETWORKS[:2] + NETWORKS[5:6])
def test_gradients_stay_what_they_were(library, name, blocks):
    model = network(library, name).double().eval()
    fused = copy.deepcopy(model)
    fuse(fused, input_nchw=SIZE)
    example = torch.randn(SIZE, dtype=torch.float64)
    for each in (model, fused):
        each(example).square().mean().backward()
    for (key, one), (_, two) in zip(model.named_parameters(), fused.named_parameters(), strict=True):
        # torch's hardsigmoid has a sixth in single precision, in double precision too (2.13).
        torch.testing.assert_close(two.grad, one.grad, rtol=0, atol=1e-6 * float(one.grad.abs().max()), msg=key)


@pytest.mark.parametrize("dynamic", [torch.export.Dim("batch"), torch.export.Dim.AUTO], ids=["named", "automatic"])
@pytest.mark.parametrize(("library", "name"), [("timm", "test_efficientnet"), ("torchvision", "mobilenet_v3_small")])
def test_an_exported_fused_network_takes_every_batch(library, name, dynamic):
    model = network(library, name).eval()
    fused = copy.deepcopy(model)
    fuse(fused, input_nchw=SIZE)
    with torch.no_grad():
        program = torch.export.export(fused, (torch.randn(SIZE),), dynamic_shapes=({0: dynamic},))
        assert all(one.upper > 2**40 for one in program.range_constraints.values())
        for images in (3, 5, 8):
            x = torch.randn(images, *SIZE[1:])
            expected = model(x)
            found = program.module()(x)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_a_copy_and_a_checkpoint_of_a_fused_network_are_as_before(tmp_path):
    model = network("timm", "mobilenetv3_large_100").eval()
    fused = copy.deepcopy(model)
    fuse(fused, input_nchw=SIZE)
    torch.save(fused.state_dict(), tmp_path / "weights.pt")
    model.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    example = torch.randn(SIZE)
    with torch.inference_mode():
        assert torch.equal(copy.deepcopy(fused)(example), fused(example))


def test_a_block_that_computes_something_else_stays_and_says_why():
    timm = pytest.importorskip("timm")
    block = timm.layers.SEModule(32, add_maxpool=True)
    fusion = fuse(nn.Sequential(nn.Conv2d(3, 32, 1), block), input_nchw=(1, 3, 8, 8))
    assert [one.reason for one in fusion.blocks] == ["unsupported: a maximum added to the mean"]
    gated = timm.layers.SEModule(32, gate_layer="tanh")
    assert "unsupported gate: Tanh" in fuse(nn.Sequential(gated), input_nchw=(1, 32, 8, 8)).blocks[0].reason


def test_a_subclass_may_compute_something_else():
    timm = pytest.importorskip("timm")

    class Other(timm.layers.SEModule):
        def forward(self, x):
            return x - super().forward(x)

    model = nn.Sequential(nn.Conv2d(3, 32, 1), Other(32))
    example = torch.randn(1, 3, 8, 8)
    expected = model(example)
    assert fuse(model, input_nchw=(1, 3, 8, 8)).blocks == ()
    assert torch.equal(model(example), expected)


@pytest.mark.parametrize("how", ["assigned", "maximum", "layer", "copied", "double"])
def test_what_was_decided_is_decided_anew_after_a_change(how):
    timm = pytest.importorskip("timm")
    block = timm.layers.SEModule(32).requires_grad_(False)
    nn.init.normal_(block.fc2.bias)
    model = nn.Sequential(nn.Conv2d(3, 32, 1), block).requires_grad_(False)
    fuse(model, input_nchw=(1, 3, 8, 8))
    example = torch.randn(1, 3, 8, 8)
    for _ in range(2):
        model(example)
    if how == "copied":
        model = copy.deepcopy(model)
        block = model[1]
        nn.init.normal_(block.fc1.weight)
    elif how == "assigned":
        block.fc1.weight = nn.Parameter(torch.randn_like(block.fc1.weight), requires_grad=False)
    elif how == "maximum":
        block.add_maxpool = True
    elif how == "layer":
        block.gate = nn.Tanh()
    else:
        model, example = model.double(), example.double()
    fresh = timm.layers.SEModule(32, add_maxpool=how == "maximum").to(example.dtype)
    fresh.load_state_dict(block.state_dict())
    fresh.gate = block.gate
    torch.testing.assert_close(model(example), fresh(model[0](example)))


@pytest.mark.parametrize(("library", "name", "_"), [NETWORKS[0], NETWORKS[2], NETWORKS[5]])
def test_a_fused_network_can_be_saved_as_a_whole(library, name, _, tmp_path):
    fused = network(library, name).eval()
    fuse(fused, input_nchw=SIZE)
    torch.save(fused, tmp_path / "network.pt")
    loaded = torch.load(tmp_path / "network.pt", weights_only=False)
    example = torch.randn(SIZE)
    with torch.inference_mode():
        assert torch.equal(loaded(example), fused(example))
    assert [type(one) for one in loaded.modules()] == [type(one) for one in fused.modules()]


def test_a_hook_that_keeps_what_a_convolution_returns_keeps_that():
    model = network("timm", "efficientnet_b0").eval()
    fused = copy.deepcopy(model)
    fuse(fused, input_nchw=SIZE)
    example, kept = torch.randn(SIZE), []
    with torch.inference_mode():
        fused(example)
        for each in (model, fused):
            each.conv_stem.register_forward_hook(lambda _module, _args, out: kept.append(out))
            each(example)
    assert torch.equal(*kept)


@pytest.mark.parametrize(
    ("name", "kind", "blocks", "stepwise"),
    [
        ("legacy_seresnet18", "SEModule", 8, 0),
        ("ese_vovnet19b_slim_dw", "EffectiveSEModule", 4, 4),
        ("ecaresnet26t", "EcaModule", 8, 8),
        ("hgnet_tiny", "EseModule", 5, 5),
        ("test_convnext", "", 0, 0),
        ("gcresnext26ts", "GlobalContext", 8, 0),
        ("skresnet18", "SelectiveKernel", 8, 0),
    ],
)
def test_every_related_block_of_timm_is_fast_or_named(name, kind, blocks, stepwise):
    model = network("timm", name).eval()
    fused = copy.deepcopy(model)
    fusion = fuse(fused, input_nchw=SIZE)
    assert [one.kind for one in fusion.blocks] == [kind] * blocks
    assert sum(one.stepwise for one in fusion.blocks) == stepwise
    assert all(one.stepwise or one.reason.startswith("unsupported: ") or one.in_place for one in fusion.blocks)
    example = torch.randn(SIZE)
    with torch.inference_mode():
        expected, found = model(example.clone()), fused(example)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("layers", [{"act_layer": "gelu"}, {"act_layer": "hard_swish"}, {"norm_layer": nn.BatchNorm2d}])
def test_blocks_of_timm_with_other_layers_run_stepwise(layers):
    timm = pytest.importorskip("timm")
    model = nn.Sequential(nn.Conv2d(3, 32, 1), timm.layers.SEModule(32, **layers)).eval()
    fused = copy.deepcopy(model)
    fusion = fuse(fused, input_nchw=(1, 3, 8, 8))
    assert [(one.stepwise, one.reason != "") for one in fusion.blocks] == [(True, True)]
    x = torch.randn(2, 3, 8, 8)
    with torch.inference_mode():
        torch.testing.assert_close(fused(x), model(x))


def test_blocks_that_quantization_must_see_are_named():
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.quantization.mobilenet_v3_large(weights=None).eval()
    reasons = {one.reason for one in fuse(model).blocks}
    assert reasons == {"unsupported: quantization must see each of its operations"}


def test_a_detection_network_is_fused_and_its_backbone_suggested():
    detection = pytest.importorskip("torchvision").models.detection
    model = detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None).eval()
    assert str(fuse(model)).startswith("fused 8 SE blocks")
    assert str(fuse(model.backbone)).startswith("fused 8 SE blocks (in place)")


@pytest.mark.parametrize(("library", "kind"), [("torchvision", "BasicBlock"), ("timm", "BasicBlock")])
def test_additions_in_the_code_of_a_library_are_named(library, kind):
    fusion = fuse(network(library, "resnet18"), input_nchw=SIZE)
    assert fusion.inline_joins == (kind,) * 8
    assert str(fusion).endswith("; left 8 residual additions unchanged: written in the code of BasicBlock")
