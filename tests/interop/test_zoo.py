"""Networks of timm and torchvision: identity blocks change no output, and counting equals torch's counter.

The fast tests have a few families; the slow ones have the smallest network of each of timm's modules.
"""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import selab
from selab.attention.se import SqueezeExcitation
from selab.cost.count import cost_of
from selab.cost.crosscheck import torch_counter
from selab.cost.tracer import op_trace
from selab.errors import InsertionError

torchvision = pytest.importorskip(
    "torchvision", reason="torchvision is not installed: pip install 'selab[torchvision]'"
)
timm = pytest.importorskip("timm", reason="timm is not installed: pip install 'selab[timm]'")

FEW = [
    "timm:mobilevit_xxs",
    "timm:iformer_t",
    "timm:ghostnetv3_050",
    "timm:test_convnext",
    "torchvision:shufflenet_v2_x0_5",
]
TOKENS = ["timm:test_vit", "timm:nest_tiny", "timm:mambaout_femto", "timm:sam2_hiera_tiny"]
# The smallest of each module: with feature maps (N, C, H, W), and with tokens.
WITH_MAPS = """
convmixer_768_32 convnext_zepto_rms cpubone_nano cs3darknet_focus_s csatv2 cspnext_tiny densenet121 dla46x_c dpn48b
edgenext_xx_small efficientformer_l1 efficientformerv2_s0 efficientvim_m1 efficientvit_b0 efficientvit_m0
ese_vovnet19b_slim_dw fasternet_t0 fastvit_t8 focalnet_tiny_srf gcvit_xxtiny ghostnet_050 hgnetv2_b0 hrnet_w18_small
iformer_t inception_next_atto inception_v3 lcnetv2_small legacy_seresnet18 legacy_xception lowformer_b0
maxvit_pico_rw_256 mobilenetv2_035 mobilenetv3_small_050 mobilevit_xxs nextvit_small nf_regnet_b0 poolformerv2_s12
rdnet_tiny regnetx_002 repghostnet_050 repvit_m1 resnet10t resnetv2_18 rexnet_100 selecsls42 shvit_s1 starnet_s050
swiftformer_xs tiny_vit_5m_224 tresnet_m visformer_tiny xception41p
"""
WITH_TOKENS = """
cait_xxs24_224 coat_tiny convit_tiny crossvit_tiny_240 davit_tiny deit_tiny_distilled_patch16_224
deit_tiny_patch16_224 gmlp_ti16_224 hiera_tiny_224 levit_128s mambaout_femto mvitv2_tiny nest_tiny pit_ti_224
pvt_v2_b0 sam2_hiera_tiny sequencer2d_s swin_tiny_patch4_window7_224 swinv2_cr_tiny_224 swinv2_tiny_window8_256
tnt_s_legacy_patch16_224 twins_svt_small vit_srelpos_small_patch16_224 vit_tiny_patch16_dinov3_qkvb volo_d1_224
xcit_nano_12_p8_224
"""


def network(word):
    """Return a network in eval mode, with BatchNorms that do something, and the shape of its input."""
    library, name = word.split(":")
    torch.manual_seed(0)
    if library == "timm":
        model = timm.create_model(name)
        chw = model.default_cfg["input_size"]
    else:
        model, chw = torchvision.models.get_model(name, weights=None), (3, 224, 224)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.eval(), (1, *chw)


def check_identity_blocks(word):
    model, size = network(word)
    x, state = torch.randn(size), {key: value.clone() for key, value in model.state_dict().items()}
    modules = [(path, type(module)) for path, module in model.named_modules()]
    with torch.no_grad():
        expected = model(x)
        inserted = selab.insert_se(model, "auto", init="identity", input_nchw=size)
        assert torch.equal(model(x), expected)
        assert {one.path for one in inserted} <= set(selab.check_inserted(model, input_nchw=size, inserted=inserted))
        # They do run: a gate that is no number reaches the output.
        for site in inserted:
            [block] = [
                one
                for one in model.get_submodule(site.path).children()
                if isinstance(one, SqueezeExcitation) and one.inserted
            ]
            block.fc2.weight.fill_(torch.nan)
        assert model(x).isnan().any()
        assert selab.remove_se(model) == len(inserted)
        assert torch.equal(model(x), expected)
    assert [(path, type(module)) for path, module in model.named_modules()] == modules
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def check_refusal(word):
    model, size = network(word)
    with pytest.raises(
        InsertionError, match=r"tracing finds no block end.*\(left out: .*not (feature maps|\(N, C, H, W\))"
    ):
        selab.insert_se(model, "auto", input_nchw=size)
    assert not any(isinstance(module, SqueezeExcitation) for module in model.modules())


def check_count(word):
    model, size = network(word)
    traced = op_trace(model, size, details=True)
    cost = cost_of(model, traced)
    assert cost.unknown == {}
    assert cost.params == sum(parameter.numel() for parameter in model.parameters())
    assert torch_counter(model, size, traced).remainder == 0


@pytest.mark.parametrize("word", FEW)
def test_identity_blocks_change_nothing(word):
    check_identity_blocks(word)


@pytest.mark.parametrize("word", TOKENS)
def test_a_network_without_feature_maps_is_refused_with_the_reason(word):
    check_refusal(word)


@pytest.mark.parametrize("word", FEW + TOKENS)
def test_counting_equals_torch(word):
    check_count(word)


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_MAPS.split())
def test_identity_blocks_and_counting_in_every_family(name):
    check_identity_blocks(f"timm:{name}")
    check_count(f"timm:{name}")


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_TOKENS.split())
def test_refusal_and_counting_in_every_family(name):
    check_refusal(f"timm:{name}")
    check_count(f"timm:{name}")


@pytest.mark.parametrize("name", ["ssdlite320_mobilenet_v3_large", "fasterrcnn_mobilenet_v3_large_320_fpn"])
def test_a_detection_network_is_counted_on_real_tensors(name):
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None, weights_backbone=None).eval()
    x = torch.zeros(1, 3, 320, 320)
    with pytest.raises(selab.SelabError, match=r'depends on the values of a tensor.*on="cpu"'):
        selab.count(model, x)
    with torch.no_grad(), FlopCounterMode(display=False) as theirs:
        model(x)
    cost = selab.count(model, x, on="cpu")
    assert 2 * cost.macs.conv_linear == theirs.get_total_flops()
    # What it removes depends on the boxes, so it has no rule, and is named.
    assert set(cost.unknown) == {"torchvision.nms"}


@pytest.mark.parametrize("name", ["r3d_18", "s3d"])
def test_a_video_network_is_counted(name):
    model, size = torchvision.models.get_model(name, weights=None).eval(), (1, 3, 16, 224, 224)
    traced = op_trace(model, size, details=True)
    assert cost_of(model, traced).unknown == {}
    assert torch_counter(model, size, traced).remainder == 0
