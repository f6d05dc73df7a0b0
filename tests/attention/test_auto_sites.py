from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from selab.attention.auto_sites import block_ends, trace_ends
from selab.attention.insert import insert_se
from selab.attention.se import SqueezeExcitation
from selab.attention.sites import declared_groups
from selab.errors import InsertionError, ModelError
from selab.meta import passages
from selab.models import catalog
from selab.models.build import build

NCHW = (1, 3, 16, 16)


def paths(model, input_nchw=NCHW):
    return [end.path for end in block_ends(model, input_nchw)]


def conv(channels=8, kernel_size=3, groups=1):
    return nn.Conv2d(channels, channels, kernel_size, padding=kernel_size // 2, groups=groups)


class Stem(nn.Module):
    """A stem, then blocks: the blocks' input is not the network's."""

    def __init__(self, *blocks, channels=8):
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(channels, 2)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class Basic(nn.Module):
    """relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x)), with one relu for both places, as torchvision has it."""

    def __init__(self, in_place=False, project=False):
        super().__init__()
        self.in_place = in_place
        self.conv1, self.bn1 = conv(), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = conv(), nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=in_place)
        self.shortcut = nn.Sequential(conv(kernel_size=1), nn.BatchNorm2d(8)) if project else None

    def forward(self, x):
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        shortcut = x if self.shortcut is None else self.shortcut(x)
        if self.in_place:
            out += shortcut
        else:
            out = shortcut + out
        return self.relu(out)


class Residual(nn.Module):
    """x + branch(x)."""

    def __init__(self, *branch):
        super().__init__()
        self.branch = nn.Sequential(*branch)

    def forward(self, x):
        return x + self.branch(x)


class DropPath(nn.Module):
    """Hands its input on in eval mode."""

    def forward(self, x):
        return x * 0.5 if self.training else x


class Gate(nn.Module):
    """x * sigmoid(conv(mean(x)))."""

    def __init__(self):
        super().__init__()
        self.conv = conv(kernel_size=1)

    def forward(self, x):
        return x * self.conv(x.mean((2, 3), keepdim=True)).sigmoid()


class TestResidual:
    @pytest.mark.parametrize("in_place", [False, True])
    @pytest.mark.parametrize("project", [False, True])
    def test_the_branch_is_the_side_with_more_convolutions(self, in_place, project):
        model = Stem(Basic(in_place, project), Basic(in_place))
        assert paths(model) == ["blocks.0.bn2", "blocks.1.bn2"]
        assert block_ends(model, NCHW)[0].reason == "before the addition in blocks.0"

    def test_the_outermost_module_of_a_branch(self):
        assert paths(Stem(Residual(conv(), nn.BatchNorm2d(8)))) == ["blocks.0.branch"]

    def test_a_module_that_hands_on_is_not_the_one_that_made(self):
        class Block(Basic):
            def __init__(self):
                super().__init__()
                self.drop_path = DropPath()
                self.identity = nn.Identity()

            def forward(self, x):
                return self.drop_path(self.bn2(self.conv2(self.conv1(x)))) + self.identity(x)

        assert paths(Stem(Block(), Block())) == ["blocks.0.bn2", "blocks.1.bn2"]

    def test_a_module_that_hands_on_serves_where_no_module_made(self):
        class Scaled(Residual):
            def __init__(self):
                super().__init__(conv())
                self.gamma = nn.Parameter(torch.ones(8, 1, 1))
                self.drop_path = DropPath()

            def forward(self, x):
                return x + self.drop_path(self.gamma * self.branch(x))

        assert paths(Stem(Scaled())) == ["blocks.0.drop_path"]

    def test_before_what_no_module_returns(self):
        class Scaled(Residual):
            def forward(self, x):
                return x + 0.1 * F.relu(self.branch(x))

        assert paths(Stem(Scaled(conv()))) == ["blocks.0.branch"]

    def test_a_module_whose_child_has_the_blocks_name_is_not_free(self):
        block = Residual()
        block.branch = nn.Sequential(OrderedDict(se=Gate(), conv=conv()))
        assert paths(Stem(block)) == ["blocks.0.branch.conv"]

    def test_gates_inside_and_at_the_end_of_a_branch(self):
        model = Stem(Residual(conv(), Gate(), conv()), Residual(conv(), conv(), Gate()))
        assert paths(model) == ["blocks.0.branch", "blocks.1.branch"]

    def test_a_gate_that_a_block_computes_itself(self):
        class Gated(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv, self.bn, self.fc = conv(), nn.BatchNorm2d(8), conv(kernel_size=1)

            def forward(self, x):
                y = self.bn(self.conv(x))
                return x + y * self.fc(F.adaptive_avg_pool2d(y, 1)).sigmoid().expand_as(y)

        assert paths(Stem(Gated())) == ["blocks.0.bn"]

    def test_an_addition_inside_the_branch_of_the_same_block_is_no_end(self):
        class Nested(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.b, self.c = conv(), conv(), conv()

            def forward(self, x):
                y = self.a(x)
                return x + self.c(y + self.b(y))

        assert paths(Stem(Nested())) == ["blocks.0.c"]

    def test_a_block_inside_a_block_ends_too(self):
        assert paths(Stem(Residual(conv(), Residual(conv())))) == ["blocks.0.branch.1.branch", "blocks.0.branch"]

    def test_the_network_input_is_no_shortcut(self):
        model = nn.Sequential(Residual(conv(3)), Residual(conv(3)))
        assert paths(model) == ["1.branch"]

    def test_equal_sides_are_left_out(self):
        class Two(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.b = conv(), conv()

            def forward(self, x):
                return self.a(x) + self.b(x)

        ends = trace_ends(Stem(Two(), Basic()), NCHW)
        assert [end.path for end in ends.found] == ["blocks.1.bn2"]
        assert ends.left_out == (
            "the addition in blocks.0: both sides have as many convolutions, so neither is the branch",
        )

    def test_a_module_that_runs_twice_is_left_out(self):
        shared = Residual(conv(), nn.BatchNorm2d(8))
        ends = trace_ends(Stem(shared, shared, Basic()), NCHW)
        assert [end.path for end in ends.found] == ["blocks.2.bn2"]
        assert ends.left_out == ("the addition in blocks.0: no single module to attach to at the end of its branch",)

    def test_channels_last_maps_are_left_out(self):
        class Last(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv, self.fc = conv(), nn.Linear(8, 8)

            def forward(self, x):
                x = x.permute(0, 2, 3, 1)
                return (x + self.fc(self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))).permute(0, 3, 1, 2)

        ends = trace_ends(Stem(Last()), NCHW)
        assert ends.found == ()
        assert ends.left_out == ("the addition in blocks.0: its feature maps are not (N, C, H, W)",)

    def test_a_linear_layer_in_between_keeps_a_map_a_map(self):
        """As ConvNeXt: the channels go to the end for a linear layer, and come back."""

        class Block(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv, self.fc, self.drop_path = conv(groups=8), nn.Linear(8, 8), nn.Identity()

            def forward(self, x):
                y = self.fc(self.conv(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
                return x + self.drop_path(y)

        assert paths(Stem(Block())) == ["blocks.0.drop_path"]


def separable(*after):
    return nn.Sequential(conv(groups=8), nn.BatchNorm2d(8), nn.ReLU(), conv(kernel_size=1), nn.BatchNorm2d(8), *after)


class TestDepthwiseSeparable:
    def test_up_to_the_last_elementwise_operation(self):
        model = Stem(separable(nn.ReLU6(inplace=True)), separable(), nn.Sequential(nn.MaxPool2d(2), nn.ReLU()))
        assert paths(model) == ["blocks.0.5", "blocks.1.4"]
        assert block_ends(model, NCHW)[1].reason == "after the depthwise-separable block blocks.1"

    @pytest.mark.parametrize("activation", [nn.Hardswish, nn.Mish, nn.SiLU, nn.PReLU])
    def test_activations(self, activation):
        assert paths(Stem(separable(activation()))) == ["blocks.0.5"]

    def test_one_that_ends_in_an_addition_ends_there_once(self):
        assert paths(Stem(Residual(separable()))) == ["blocks.0.branch"]

    def test_one_inside_a_residual_branch_is_no_end(self):
        assert paths(Stem(Residual(separable(nn.ReLU()), separable()))) == ["blocks.0.branch"]

    def test_one_that_is_the_shortcut_is_no_end(self):
        class Projected(Residual):
            def __init__(self):
                super().__init__(conv(), conv(), conv())
                self.shortcut = separable()

            def forward(self, x):
                return self.branch(x) + self.shortcut(x)

        assert paths(Stem(Projected())) == ["blocks.0.branch"]

    def test_the_next_blocks_shortcut_does_not_hide_it(self):
        assert paths(Stem(separable(), Residual(conv()))) == ["blocks.0.4", "blocks.1.branch"]

    def test_a_gate_between_and_one_behind(self):
        between = nn.Sequential(conv(groups=8), nn.BatchNorm2d(8), Gate(), conv(kernel_size=1), nn.BatchNorm2d(8))
        assert paths(Stem(between, separable(Gate()))) == ["blocks.0.4", "blocks.1.5"]

    def test_an_activation_that_is_written_out(self):
        class Swish(nn.Module):
            def forward(self, x):
                return x * torch.sigmoid(x)

        assert paths(Stem(separable(Swish()))) == ["blocks.0.5"]

    def test_the_block_itself_where_it_applies_functions(self):
        class Functional(nn.Module):
            def __init__(self):
                super().__init__()
                self.depthwise, self.pointwise, self.bn = conv(groups=8), conv(kernel_size=1), nn.BatchNorm2d(8)

            def forward(self, x):
                return F.relu(self.bn(self.pointwise(F.relu(self.depthwise(x)))))

        assert paths(Stem(Functional(), Functional())) == ["blocks.0", "blocks.1"]

    def test_one_that_is_concatenated_is_no_end(self):
        class Both(nn.Module):
            def __init__(self):
                super().__init__()
                self.branch = separable()
                self.mix = nn.Conv2d(16, 8, 1)

            def forward(self, x):
                return self.mix(torch.cat((x, self.branch(x)), 1))

        ends = trace_ends(Stem(Both(), Both()), NCHW)
        assert [(end.path, end.kind) for end in ends.found] == [
            ("blocks.0", "concatenation"),
            ("blocks.1", "concatenation"),
        ]
        assert ends.left_out[0] == (
            "the depthwise-separable block blocks.0.branch: its feature map is concatenated with others"
        )


class TestCatalog:
    @pytest.mark.parametrize("name", ["resnet18", "resnet50", "shufflenet"])
    def test_the_branches_of_the_residual_group(self, name):
        model = build(catalog.find(name), device="meta").model
        expected = [f"{path}.branch" for path in declared_groups(model)["residual"]]
        assert paths(model, (1, 3, 224, 224)) == expected

    def test_the_thirteen_pointwise_convolutions_of_mobilenet(self):
        model = build(catalog.find("mobilenet"), device="meta").model
        assert paths(model, (1, 3, 224, 224)) == [f"blocks.{index}.pointwise" for index in range(13)]

    def test_vgg_ends_in_five_stages(self):
        """VGG-16: 2, 2, 3, 3 and 3 convolutions, each stage before a pooling (arXiv 1409.1556, Table 1)."""
        model = build(catalog.find("vgg16"), device="meta").model
        ends = block_ends(model, (1, 3, 224, 224))
        assert [end.kind for end in ends] == ["stage"] * 5
        shapes = [one.output_shape for one in passages(model, [end.path for end in ends], (1, 3, 224, 224)).values()]
        assert shapes == [(1, c, s, s) for c, s in ((64, 224), (128, 112), (256, 56), (512, 28), (512, 14))]

    def test_a_network_of_linear_layers_has_none(self):
        model = nn.Sequential(nn.Flatten(), nn.Linear(768, 8), nn.ReLU(), nn.Linear(8, 2))
        with pytest.raises(
            InsertionError, match=r"Sequential: tracing finds no block end.*--insert PATTERN.*selab sites"
        ):
            block_ends(model, NCHW)

    def test_blocks_that_have_attention_are_left_out(self):
        model = build(catalog.find("se_resnet50"), device="meta").model
        with pytest.raises(
            InsertionError, match=r"stage2.0.join.se: ends in an attention block already .* and 13 more"
        ):
            block_ends(model, (1, 3, 224, 224))


class TestInsertion:
    @pytest.mark.parametrize("name", ["resnet50", "mobilenet"])
    def test_a_block_at_each_end_runs_once(self, name):
        model = build(catalog.find(name), device="meta").model
        found = paths(model, (1, 3, 64, 64))
        # insert_se itself proves that each block runs once.
        insertions = insert_se(model, found, input_nchw=(1, 3, 64, 64))
        assert [one.path for one in insertions] == found
        assert sum(isinstance(module, SqueezeExcitation) for module in model.modules()) == len(found)

    def test_a_gate_of_one_half_halves_the_branch_and_nothing_else(self):
        torch.manual_seed(0)
        model = Stem(Basic(in_place=True), separable(nn.ReLU6()), Residual(conv())).eval()
        x = torch.randn(2, 3, 16, 16)
        with torch.no_grad():
            y = model.stem(x)
            basic = model.blocks[0]
            y = F.relu(0.5 * basic.bn2(basic.conv2(F.relu(basic.bn1(basic.conv1(y))))) + y)
            y = 0.5 * model.blocks[1](y)
            y = y + 0.5 * model.blocks[2].branch(y)
            expected = model.head(y.mean((2, 3)))
            insert_se(model, paths(model), reduction=2, input_nchw=NCHW)
            for block in model.modules():
                if isinstance(block, SqueezeExcitation):
                    for parameter in block.parameters():
                        parameter.zero_()
            torch.testing.assert_close(model(x), expected)


def test_the_model_is_left_alone():
    model = Stem(Basic(in_place=True)).train()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    block_ends(model, NCHW)
    assert model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_a_forward_pass_that_fails():
    with pytest.raises(ModelError, match=r"forward fails with an input of shape \(1, 5, 16, 16\)"):
        block_ends(Stem(Basic()), (1, 5, 16, 16))


class Branches(nn.Module):
    """The sum of parallel convolutions and BatchNorms, spelled in many ways, and ReLU as a function."""

    def __init__(self, join):
        super().__init__()
        self.join = join
        self.branches = nn.ModuleList(
            [nn.Sequential(conv(kernel_size=size), nn.BatchNorm2d(8)) for size in (3, 1)] + [nn.BatchNorm2d(8)]
        )

    def forward(self, x):
        return F.relu(self.join([branch(x) for branch in self.branches]))


def _in_a_loop(maps):
    total = 0
    for one in maps:
        total = total + one
    return total


def _in_place(maps):
    total = torch.zeros_like(maps[0])
    for one in maps:
        total += one
    return total


SUMS = {
    "operators": lambda maps: maps[0] + maps[1] + maps[2],
    "sum": sum,
    "a loop": _in_a_loop,
    "in place": _in_place,
    "stack and sum": lambda maps: torch.stack(maps).sum(0),
    "stack behind the channels": lambda maps: torch.stack(maps, 2).sum(2),
    "stack in the last place": lambda maps: torch.stack(maps, dim=-1).sum(dim=-1),
    "mean": lambda maps: torch.stack(maps, 1).mean(1),
    "concatenation and sum": lambda maps: torch.cat([one[None] for one in maps]).sum(0),
    "weights": lambda maps: 0.5 * maps[0] + 0.25 * maps[1] + maps[2],
}


class TestParallelSums:
    @pytest.mark.parametrize("join", SUMS.values(), ids=SUMS)
    def test_a_sum_is_found_however_it_is_spelled(self, join):
        ends = trace_ends(Stem(Branches(join), Branches(join)), NCHW)
        assert [(end.path, end.kind) for end in ends.found] == [("blocks.0", "parallel"), ("blocks.1", "parallel")]
        assert ends.left_out == ()

    @pytest.mark.parametrize("join", SUMS.values(), ids=SUMS)
    def test_a_sum_that_no_module_returns_is_listed(self, join):
        class Inline(Stem):
            def forward(self, x):
                for block in self.blocks:
                    x = Branches.forward(block, x if x.shape[1] == 8 else self.stem(x))
                return self.last(x)

        model = Inline(Branches(join), Branches(join))
        model.last = Basic()
        done = insert_se(model, "auto", input_nchw=NCHW, reduction=4, dry_run=True)
        assert [one.path for one in done] == ["last.bn2"]
        assert done.skipped == (
            "the sum of parallel convolutions in the network: re-parameterisation merges them into one convolution, "
            "and no module ends after their sum",
        )
        assert "; left out 1 site: the sum of parallel" in str(done)

    @pytest.mark.parametrize(
        ("join", "reason"),
        [
            (lambda maps: torch.stack(maps).cumsum(0)[-1], "`stack` is neither an addition nor a concatenation"),
            (lambda maps: torch.maximum(maps[0], maps[1]), "`maximum` is neither"),
            (lambda maps: torch.einsum("bnchw->nchw", torch.stack(maps)), "blocks.0"),
            (lambda maps: F.relu(maps[0]) + F.relu(maps[1]), "both sides have as many convolutions"),
            (lambda maps: F.relu(maps[0]) + F.relu(maps[1]) + F.tanh(maps[2] + maps[0]), "addition in blocks.0"),
        ],
    )
    def test_what_is_no_sum_of_linear_branches_is_listed(self, join, reason):
        ends = trace_ends(Stem(Branches(join), Basic()), NCHW)
        assert [end.path for end in ends.found] == ["blocks.1.bn2"]
        assert any(reason in one for one in ends.left_out)

    @pytest.mark.parametrize("branch", ["F.batch_norm", "F.conv2d"])
    def test_layers_as_functions(self, branch):
        class Functional(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv, self.bn, self.other = conv(), nn.BatchNorm2d(8), conv(kernel_size=1)

            def forward(self, x):
                y = F.conv2d(x, self.conv.weight, padding=1) if branch == "F.conv2d" else self.conv(x)
                if branch == "F.batch_norm":
                    y = F.batch_norm(y, self.bn.running_mean, self.bn.running_var, self.bn.weight, self.bn.bias)
                else:
                    y = self.bn(y)
                return F.relu(y + self.other(x))

        assert paths(Stem(Functional(), Functional())) == ["blocks.0", "blocks.1"]

    def test_a_residual_branch_of_functions_is_listed(self):
        class Functional(Basic):
            def forward(self, x):
                return F.relu(x + F.conv2d(x, self.conv1.weight, padding=1))

        done = insert_se(Stem(Functional(), Basic()), "auto", input_nchw=NCHW, reduction=4, dry_run=True)
        assert [one.path for one in done] == ["blocks.1.bn2"]
        assert done.skipped == ("the addition in blocks.0: no single module to attach to at the end of its branch",)

    def test_an_addition_of_the_input_is_listed(self):
        class Denoiser(nn.Module):
            def __init__(self):
                super().__init__()
                self.blocks, self.last = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), Basic()), nn.Conv2d(8, 3, 1)

            def forward(self, x):
                return x - self.last(self.blocks(x))

        ends = trace_ends(Denoiser(), NCHW)
        assert [end.path for end in ends.found] == ["blocks.1.bn2"]
        assert ends.left_out == ("the addition in the network: it adds the network's input",)


class ListOfImages(nn.Module):
    """Copies images (C, H, W) into a batch of zeros, as detectors do, and joins them with a shortcut."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.branch = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))

    def forward(self, images):
        height, width = (max(one.shape[axis] for one in images) for axis in (1, 2))
        batch = images[0].new_full((len(images), 3, height, width), 0)
        for place, image in zip(batch, images, strict=True):
            place[:, : image.shape[1], : image.shape[2]].copy_(image)
        x = self.stem(batch)
        return {"maps": [torch.relu(x + self.branch(x))]}


@pytest.mark.parametrize("sizes", [[(8, 8)], [(8, 12), (12, 8)]], ids=["one", "two of unequal size"])
def test_images_that_are_copied_into_a_batch_are_followed(sizes):
    example = ([torch.rand(3, *size) for size in sizes],)
    assert [one.path for one in insert_se(ListOfImages(), "auto", inputs=example, reduction=4)] == ["branch"]
