"""Networks of torchvision and timm, where these are installed: built, their own SE found, their block ends traced."""

import pytest
import torch
from torch import nn

from selab.attention.auto_sites import block_ends, trace_ends
from selab.attention.insert import insert_se
from selab.cost.count import count
from selab.errors import InsertionError, UnknownNameError
from selab.meta import passages
from selab.models import external
from selab.models.build import build

torchvision = pytest.importorskip(
    "torchvision", reason="torchvision is not installed: pip install 'selab[torchvision]'"
)
timm = pytest.importorskip("timm", reason="timm is not installed: pip install 'selab[timm]'")


def network(word):
    return build(external.find(word), device="meta").model


def ends(word):
    variant = external.find(word)
    return [end.path for end in block_ends(network(word), (1, *variant.input_chw))]


def names(pattern, depths):
    """`names("layer{}.{}.bn3", (3, 4))` counts the first number from 1 and the second from 0."""
    return [pattern.format(stage, block) for stage, depth in enumerate(depths, 1) for block in range(depth)]


# Blocks of each stage: ResNet-50 (arXiv 1512.03385, Table 1), ConvNeXt-T (arXiv 2201.03545, Sec. 2.2), RegNetY-400MF
# (arXiv 2003.13678, Fig. 19).
RESNET50, CONVNEXT_T, REGNETY_400MF = (3, 4, 6, 3), (3, 3, 9, 3), (1, 3, 6, 6)


class TestEnds:
    def test_torchvision_resnet50(self):
        assert ends("torchvision:resnet50") == names("layer{}.{}.bn3", RESNET50)

    def test_torchvision_mobilenet_v2(self):
        """17 bottlenecks (arXiv 1801.04381, Table 2), a residual where stride 1 meets equal channels."""
        repeats = (1, 2, 3, 4, 3, 3, 1)
        first = {1 + sum(repeats[:stage]) for stage in range(7)}
        own = {index: f"features.{index}.conv.{2 if index == 1 else 3}" for index in first}
        assert ends("torchvision:mobilenet_v2") == [own.get(index, f"features.{index}.conv") for index in range(1, 18)]

    def test_torchvision_mobilenet_v3_large(self):
        """15 bottlenecks (arXiv 1905.02244, Table 1); five change the shape, and their last layer is the end."""
        own = {2: 2, 4: 3, 7: 2, 11: 3, 13: 3}
        expected = [f"features.{index}.block" + (f".{own[index]}" if index in own else "") for index in range(1, 16)]
        assert ends("torchvision:mobilenet_v3_large") == expected

    def test_torchvision_regnet_y_400mf(self):
        """Each branch `f` has an SE block of its own in it, named as ours would be; so its last layer is the site."""
        found = ends("torchvision:regnet_y_400mf")
        assert len(found) == 16
        assert found == [
            f"trunk_output.block{stage}.block{stage}-{block}.f.c"
            for stage, depth in enumerate(REGNETY_400MF, 1)
            for block in range(depth)
        ]

    def test_timm_resnets(self):
        assert ends("timm:resnet50") == names("layer{}.{}.bn3", RESNET50)
        assert ends("timm:seresnet50") == names("layer{}.{}.se", RESNET50)

    def test_timm_efficientnet_b0(self):
        """16 blocks (arXiv 1905.11946, Table 1), the first without an expansion and so with one BN less."""
        repeats = (1, 2, 2, 3, 3, 4, 1)
        expected = [f"blocks.{stage}.{block}.bn3" for stage, depth in enumerate(repeats) for block in range(depth)]
        assert ends("timm:efficientnet_b0") == ["blocks.0.0.bn2", *expected[1:]]

    def test_convnext_tiny(self):
        """The scaled branch is no module's output; the module that drops paths hands it on."""
        found = ends("timm:convnext_tiny")
        assert found == [
            f"stages.{stage}.blocks.{block}.drop_path"
            for stage, depth in enumerate(CONVNEXT_T)
            for block in range(depth)
        ]
        assert len(ends("torchvision:convnext_tiny")) == sum(CONVNEXT_T) == 18

    def test_swin_has_maps_of_another_order(self):
        traced = trace_ends(network("torchvision:swin_t"), (1, 3, 224, 224))
        assert traced.found == ()
        [reason] = traced.left_out
        assert reason.endswith("its tensors are 1×56×56×96, not feature maps")

    def test_networks_without_ends(self):
        with pytest.raises(InsertionError, match="tracing finds no block end"):
            ends("torchvision:vit_b_16")

    @pytest.mark.parametrize(
        "word",
        [
            "torchvision:resnet50",
            "torchvision:mobilenet_v2",
            "torchvision:mobilenet_v3_large",
            "torchvision:regnet_y_400mf",
            "timm:seresnet50",
            "timm:efficientnet_b0",
            "timm:convnext_tiny",
        ],
    )
    def test_a_block_at_each_end_runs_once(self, word):
        model = network(word)
        found = ends(word)
        insertions = insert_se(model, found, reduction=4, input_nchw=(1, 3, 224, 224))
        assert [one.path for one in insertions] == found
        seen = passages(model, [f"{path}.se" for path in found], (1, 3, 224, 224))
        assert {passage.calls for passage in seen.values()} == {1}


class TestBuilding:
    def test_torchvision_resnet50_is_the_catalogs_with_strides_in_the_3x3(self):
        """Parameters as torchvision documents them (ResNet50_Weights); the second summand is what the strides cost."""
        cost = count(network("torchvision:resnet50"), (1, 3, 224, 224))
        assert cost.params == 25_557_032
        assert cost.macs.conv_linear == 3_857_973_248 + 231_211_008

    @pytest.mark.parametrize("name", ["inception_v3", "googlenet"])
    def test_a_tensor_in_train_mode_too(self, name):
        model = network(f"torchvision:{name}").train()
        size = external.find(f"torchvision:{name}").input_chw[1]
        assert model(torch.empty(2, 3, size, size, device="meta")).shape == (2, 1000)

    def test_a_regnet_that_cannot_be_made_on_meta(self):
        assert all(parameter.is_meta for parameter in network("torchvision:regnet_y_400mf").parameters())

    def test_inputs_are_the_networks_own(self):
        assert external.find("timm:tf_efficientnet_b1").input_chw == (3, 240, 240)
        assert external.find("timm:resnet50.a1_in1k").input_chw == (3, 224, 224)
        assert external.find("torchvision:inception_v3").input_chw == (3, 299, 299)

    @pytest.mark.parametrize(
        ("word", "near"),
        [
            ("torchvision:resnet5", "did you mean resnet50"),
            (
                "torchvision:fasterrcnn_resnet50_fpn",
                "is no classification network; detectors .* faster_rcnn_NETWORK_fpn",
            ),
            ("timm:efficientnet-b0", "did you mean efficientnet_b0"),
            ("timm:resnet50.a1_in1", "did you mean resnet50.a1_in1k"),
        ],
    )
    def test_unknown_names(self, word, near):
        with pytest.raises(UnknownNameError, match=near):
            external.find(word)


class TestTheirOwnBlocks:
    @pytest.mark.parametrize(
        ("word", "blocks"),
        [
            ("torchvision:resnet50", 0),
            ("torchvision:regnet_y_400mf", 16),
            ("torchvision:efficientnet_b0", 16),
            # The SE column of arXiv 1905.02244, Table 1.
            ("torchvision:mobilenet_v3_large", 8),
            ("timm:seresnet50", 16),
            ("timm:legacy_seresnet50", 16),
            ("timm:efficientnet_b0", 16),
            ("timm:ecaresnet50t", 16),
            ("timm:ese_vovnet19b_dw", 4),
        ],
    )
    def test_are_found(self, word, blocks):
        assert len(external.se_blocks(network(word))) == blocks

    def test_are_priced_by_stage(self):
        """SE-ResNet-50 of timm: sum over its blocks of 2 * C * C/16 weights and the two layers' biases."""
        model = network("timm:seresnet50")
        cost = count(model, (1, 3, 224, 224), se_blocks=external.se_blocks(model))
        channels = [256] * 3 + [512] * 4 + [1024] * 6 + [2048] * 3
        assert cost.se.blocks == 16
        assert cost.se.params == sum(2 * c * (c // 16) + c // 16 + c for c in channels)


def test_every_end_is_a_module_that_can_hold_a_block():
    """An Identity that hands a branch on becomes a site with a block of its own in it."""
    model = network("timm:convnext_tiny")
    insert_se(model, ends("timm:convnext_tiny")[:1], input_nchw=(1, 3, 224, 224))
    assert isinstance(model.get_submodule("stages.0.blocks.0.drop_path.inner"), nn.Identity)
    assert any(key.startswith("stages.0.blocks.0.drop_path.se.") for key in model.state_dict())
