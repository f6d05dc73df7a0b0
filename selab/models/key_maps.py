"""Key maps: which external networks compute the same function as selab's, and how their state-dict keys map.

Equal shapes do not mean equal functions. torchvision's ResNet-50 strides in the 3x3, Caffe's in the 1x1, and tensors of
one fit the other. So only pairs that are declared here are converted. tests/interop builds both networks of each
pair and compares their logits. Pairs that fit in shape but compute something else are declared with the difference.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import accumulate, pairwise

from selab.errors import UnknownNameError, nearest

# (regular expression, replacement), applied one after the other to every key.
Rule = tuple[str, str]
Rules = tuple[Rule, ...]


@dataclass(frozen=True, kw_only=True)
class Port:
    """An external network and the equal one of selab.

    Attributes:
        source: `timm`, `torchvision` or `cadene` (pretrained-models.pytorch).
        model: its name in the source.
        arch: its name in selab.
        rules: from keys of the source to keys of selab.
        folds_bias: whether only the source's convolutions have biases before the BN. A bias is then subtracted from the
            BN's running mean, which keeps the function in eval mode.
        unequal: why the two differ although every tensor fits; empty if they are equal.
    """

    source: str
    model: str
    arch: str
    rules: Rules
    folds_bias: bool = False
    unequal: str = ""


def renamed(key: str, rules: Iterable[Rule]) -> str:
    """Return selab's name of a key; a key that no rule matches stays as it is, or is only partly renamed."""
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key)
    return key


def port_for(source: str, arch: str) -> Port:
    """Return the declared pair of a source and one of selab's networks.

    Raises:
        UnknownNameError: no such source, the source has no equal network, or a similar one computes something else. The
            message lists what the source has, nearest names first.
    """
    sources = sorted({port.source for port in PORTS})
    if source not in sources:
        raise UnknownNameError(f"--from {source}: no such source{nearest(source, sources)}")
    found = [port for port in (*PORTS, *DETECTORS, *UNEQUAL) if (port.source, port.arch) == (source, arch)]
    if found and not found[0].unequal:
        return found[0]
    reason = f"{source}'s {found[0].model} {found[0].unequal}" if found else f"{source} has no network that equals it"
    known = [port.arch for port in (*PORTS, *DETECTORS) if port.source == source]
    known.sort(key=lambda name: -SequenceMatcher(None, arch, name).ratio())
    shown = ", ".join(known[:6]) + (", …" if len(known) > 6 else "")
    raise UnknownNameError(f"--arch {arch}: {reason}; from {source} there are {shown} (`selab weights list` lists all)")


# --------------------------------------------------------------------------------------------------------------- rules
def _counted(pattern: str, replacement: str, pairs: Iterable[tuple[object, object]]) -> Rules:
    """Return one rule for each pair of numbers, (source, selab), filled into the braces."""
    return tuple((pattern.format(theirs), replacement.format(ours)) for theirs, ours in pairs)


def _flat(blocks: tuple[int, ...], *, first: int = 0) -> tuple[tuple[int, str], ...]:
    """Return pairs of a block's index in one list that starts at `first`, and `stage.block` in selab."""
    places = [f"{stage}.{block}" for stage, count in enumerate(blocks, start=1) for block in range(count)]
    return tuple(enumerate(places, start=first))


def _vgg_places() -> tuple[tuple[int, str], ...]:
    """Return pairs of a convolution's index in VGG-16's list of layers, and `block_convolution` in selab."""
    names = [f"{block}_{conv}" for block, convs in enumerate((2, 2, 3, 3, 3), start=1) for conv in range(1, convs + 1)]
    # A convolution, its BN and its ReLU are three layers, and a pooling follows each block.
    layers = [3 + (name[0] != after[0]) for name, after in pairwise(names)]
    return tuple(zip(accumulate(layers, initial=0), names, strict=True))


_RESIDUAL_STAGES: Rules = (
    *_counted(r"^layer{}\.", "stage{}.", ((n, n + 1) for n in range(1, 5))),
    (r"^(stage\d\.\d+)\.((?:conv|bn)\d)\.", r"\1.branch.\2."),
    (r"^(stage\d\.\d+)\.downsample\.0\.", r"\1.shortcut.conv."),
    (r"^(stage\d\.\d+)\.downsample\.1\.", r"\1.shortcut.bn."),
)
_RESNET: Rules = (
    (r"^conv1\.", "stem.conv."),
    (r"^bn1\.", "stem.bn."),
    *_RESIDUAL_STAGES,
    (r"^(stage\d\.\d+)\.se\.", r"\1.join.se."),
    (r"^fc\.", "head.fc."),
)
_CAFFE_RESNET: Rules = (*_RESNET[:-1], (r"^last_linear\.", "head.fc."))
_CAFFE_SE_RESNET: Rules = (
    (r"^layer0\.conv1\.", "stem.conv."),
    (r"^layer0\.bn1\.", "stem.bn."),
    *_RESIDUAL_STAGES,
    (r"^(stage\d\.\d+)\.se_module\.", r"\1.join.se."),
    (r"^last_linear\.", "head.fc."),
)
_SENET154: Rules = ((r"^layer0\.", "stem."), *_CAFFE_SE_RESNET[2:])
# Translated from Lua: containers have numbers instead of names.
_CADENE_RESNEXT: Rules = (
    (r"^features\.0\.", "stem.conv."),
    (r"^features\.1\.", "stem.bn."),
    *_counted(r"^features\.{}\.", "stage{}.", ((n, n - 2) for n in range(4, 8))),
    *_counted(
        r"^(stage\d\.\d+)\.0\.0\.{}\.",
        r"\1.branch.{}.",
        ((r"0\.0", "conv1"), (r"0\.1", "bn1"), (r"0\.3", "conv2"), (r"0\.4", "bn2"), ("1", "conv3"), ("2", "bn3")),
    ),
    *_counted(r"^(stage\d\.\d+)\.0\.1\.{}\.", r"\1.shortcut.{}.", ((0, "conv"), (1, "bn"))),
    (r"^last_linear\.", "head.fc."),
)
_VGG_FEATURES: Rules = (
    *_counted(r"^features\.{}\.", "conv{}.conv.", _vgg_places()),
    *_counted(r"^features\.{}\.", "conv{}.bn.", ((place + 1, name) for place, name in _vgg_places())),
    (r"^conv", "features.conv"),
)
_VGG_TORCHVISION: Rules = (
    *_VGG_FEATURES,
    *_counted(r"^classifier\.{}\.", "head.fc{}.", ((0, 6), (3, 7), (6, 8))),
)
_VGG_TIMM: Rules = (
    *_VGG_FEATURES,
    (r"^head\.fc\.", "head.fc8."),
    *_counted(r"^pre_logits\.fc{}\.", "head.fc{}.", ((1, 6), (2, 7))),
)
_CONV_AND_BN: Rules = ((r"\.0\.(?=\w+$)", ".conv."), (r"\.1\.(?=\w+$)", ".bn."))
_MOBILENET_V2_TORCHVISION: Rules = (
    (r"^classifier\.1\.", "head.fc."),
    (r"^features\.0\.", "stem."),
    (r"^features\.18\.", "head.conv."),
    *_counted(r"^features\.{}\.conv\.", "stage{}.branch.", _flat((1, 2, 3, 4, 3, 3, 1), first=1)),
    # A list of [conv, bn, relu6] for the expansion and for the depthwise one, then the projection's two layers bare.
    (r"^(stage1\.0\.branch)\.0\.", r"\1.depthwise."),
    (r"^(stage1\.0\.branch)\.1\.", r"\1.project.0."),
    (r"^(stage1\.0\.branch)\.2\.", r"\1.project.1."),
    (r"^(stage\d\.\d\.branch)\.0\.", r"\1.expand."),
    (r"^(stage\d\.\d\.branch)\.1\.", r"\1.depthwise."),
    (r"^(stage\d\.\d\.branch)\.2\.", r"\1.project.0."),
    (r"^(stage\d\.\d\.branch)\.3\.", r"\1.project.1."),
    *_CONV_AND_BN,
)
# In a block: [expansion,] depthwise [, SE], projection, each but the SE a list of [conv, bn, activation].
_INVERTED_TORCHVISION: Rules = (
    (r"\.block\.\d\.(fc[12])\.", r".branch.depthwise.se.\1."),
    (r"^({first}\.0)\.block\.0\.", r"\1.branch.depthwise."),
    (r"^({first}\.0)\.block\.[12]\.", r"\1.branch.project."),
    (r"\.block\.0\.", ".branch.expand."),
    (r"\.block\.1\.", ".branch.depthwise."),
    (r"\.block\.[23]\.", ".branch.project."),
    *_CONV_AND_BN,
)


def _inverted_torchvision(first: str) -> Rules:
    """Return the rules of a block whose stage `first` does not expand its channels."""
    return tuple((pattern.replace("{first}", first), replacement) for pattern, replacement in _INVERTED_TORCHVISION)


# Blocks in the stages of MobileNetV3.
_LARGE = (1, 2, 3, 4, 2, 3)
_SMALL = (1, 2, 3, 2, 3)


def _mobilenet_v3_torchvision(blocks: tuple[int, ...]) -> Rules:
    last = sum(blocks) + 1
    return (
        (r"^classifier\.0\.", "head.hidden."),
        (r"^classifier\.3\.", "head.fc."),
        (r"^features\.0\.", "stem."),
        (rf"^features\.{last}\.", "head.conv."),
        *_counted(r"^features\.{}\.", "stage{}.", _flat(blocks, first=1)),
        *_inverted_torchvision("stage1"),
    )


_EFFICIENTNET_TORCHVISION: Rules = (
    (r"^classifier\.1\.", "head.fc."),
    (r"^features\.0\.", "stem."),
    (r"^features\.8\.", "head.conv."),
    *_counted(r"^features\.{}\.", "stage{}.", ((n, n + 1) for n in range(1, 8))),
    *_inverted_torchvision("stage2"),
)


def _inverted_timm(*, first_stage: int, stages: int) -> Rules:
    """Return the rules of timm's MobileNets, MnasNets, EfficientNets; blocks without expansion have other numbers."""
    return (
        (r"^conv_stem\.", "stem.conv."),
        (r"^bn1\.", "stem.bn."),
        *_counted(r"^blocks\.{}\.(\d+)\.", r"stage{}.\1.branch.", ((n, n + first_stage) for n in range(stages))),
        (rf"^(stage{first_stage}\.0\.branch)\.conv_pw\.", r"\1.project.conv."),
        (rf"^(stage{first_stage}\.0\.branch)\.bn1\.", r"\1.depthwise.bn."),
        (rf"^(stage{first_stage}\.0\.branch)\.bn2\.", r"\1.project.bn."),
        (r"\.branch\.conv_pw\.", ".branch.expand.conv."),
        (r"\.branch\.bn1\.", ".branch.expand.bn."),
        (r"\.branch\.conv_dw\.", ".branch.depthwise.conv."),
        (r"\.branch\.bn2\.", ".branch.depthwise.bn."),
        (r"\.branch\.se\.conv_reduce\.", ".branch.depthwise.se.fc1."),
        (r"\.branch\.se\.conv_expand\.", ".branch.depthwise.se.fc2."),
        (r"\.branch\.conv_pwl\.", ".branch.project.conv."),
        (r"\.branch\.bn3\.", ".branch.project.bn."),
        (r"^bn2\.", "head.conv.bn."),
        (r"^classifier\.", "head.fc."),
    )


def _mobilenet_v3_timm(blocks: tuple[int, ...]) -> Rules:
    stages = len(blocks)
    return (
        (rf"^blocks\.{stages}\.0\.conv\.", "head.conv.conv."),
        (rf"^blocks\.{stages}\.0\.bn1\.", "head.conv.bn."),
        (r"^conv_head\.", "head.hidden."),
        *_inverted_timm(first_stage=1, stages=stages),
    )


_CONV_HEAD: Rule = (r"^conv_head\.", "head.conv.conv.")
_MOBILENET_V2_TIMM: Rules = (_CONV_HEAD, *_inverted_timm(first_stage=1, stages=7))
_EFFICIENTNET_TIMM: Rules = (_CONV_HEAD, *_inverted_timm(first_stage=2, stages=7))
_SHUFFLENET_V2: Rules = (
    (r"^conv1\.", "stem."),
    (r"^conv5\.", "head."),
    (r"^fc\.", "head.fc."),
    *_counted(
        r"\.branch1\.{}\.",
        ".shortcut.{}.",
        ((0, "conv1"), (1, "bn1"), (2, "conv2"), (3, "bn2")),
    ),
    *_counted(
        r"\.branch2\.{}\.",
        ".branch.{}.",
        ((0, "conv1"), (1, "bn1"), (3, "conv2"), (4, "bn2"), (5, "conv3"), (6, "bn3")),
    ),
    (r"^(stem|head)\.0\.", r"\1.conv."),
    (r"^(stem|head)\.1\.", r"\1.bn."),
)
_REGNET_TORCHVISION: Rules = (
    (r"^trunk_output\.block(\d)\.block\d-(\d+)\.", r"stage\1.\2."),
    (r"\.f\.se\.", ".branch.se."),
    *_counted(r"\.f\.{}\.", ".branch.{}.", ((r"a\.0", "conv1"), (r"b\.0", "conv2"), (r"c\.0", "conv3"))),
    *_counted(r"\.f\.{}\.", ".branch.{}.", ((r"a\.1", "bn1"), (r"b\.1", "bn2"), (r"c\.1", "bn3"))),
    (r"\.proj\.", ".shortcut."),
    *_CONV_AND_BN,
    (r"^fc\.", "head.fc."),
)
_REGNET_TIMM: Rules = (
    *_counted(r"^s(\d)\.b{}\.", r"stage\1.{}.", ((n, n - 1) for n in range(1, 31))),
    (r"^(stage\d\.\d+)\.conv(\d)\.(conv|bn)\.", r"\1.branch.\3\2."),
    (r"^(stage\d\.\d+)\.se\.", r"\1.branch.se."),
    (r"^(stage\d\.\d+)\.downsample\.", r"\1.shortcut."),
)
_GHOSTNET: Rules = (
    (r"^conv_stem\.", "stem.conv."),
    (r"^bn1\.", "stem.bn."),
    (r"^blocks\.9\.0\.conv\.", "head.conv1."),
    (r"^blocks\.9\.0\.bn1\.", "head.bn1."),
    (r"^conv_head\.", "head.conv2."),
    (r"^classifier\.", "head.fc."),
    # timm begins a new group of blocks wherever the kernel or the width changes; here a stage has one resolution.
    *_counted(r"^blocks\.{}\.0\.", "stage{}.", ((0, "1.0"), (1, "2.0"), (2, "2.1"), (3, "3.0"), (4, "3.1"))),
    *_counted(r"^blocks\.{}\.", "stage{}.", ((r"5\.0", "4.0"), *((rf"6\.{n}", f"4.{n + 1}") for n in range(5)))),
    *_counted(r"^blocks\.{}\.", "stage{}.", ((r"7\.0", "5.0"), *((rf"8\.{n}", f"5.{n + 1}") for n in range(4)))),
    # The first block of a stage strides, and its SE comes after the depthwise convolution that does so.
    (r"^(stage\d\.0)\.se\.", r"\1.branch.depthwise.se."),
    (r"^(stage\d\.\d)\.se\.", r"\1.branch.expand.se."),
    (r"\.se\.conv_reduce\.", ".se.fc1."),
    (r"\.se\.conv_expand\.", ".se.fc2."),
    (r"\.ghost1\.", ".branch.expand."),
    (r"\.ghost2\.", ".branch.project."),
    (r"\.primary_conv\.", ".primary."),
    (r"\.cheap_operation\.", ".cheap.ghosts."),
    (r"\.(conv|bn)_dw\.", r".branch.depthwise.\1."),
    *_counted(
        r"\.shortcut\.{}\.",
        ".shortcut.{}.",
        ((0, "depthwise.conv"), (1, "depthwise.bn"), (2, "pointwise.conv"), (3, "pointwise.bn")),
    ),
    (r"(primary|ghosts)\.0\.", r"\1.conv."),
    (r"(primary|ghosts)\.1\.", r"\1.bn."),
)
_PATH3X3 = ".branches.path3x3."
_PATH_DOUBLE = ".branches.path_double3x3."
_INCEPTION_RESNET_V2: Rules = (
    *_counted("^conv2d_{}", "stem.conv{}", (("1a", 1), ("2a", 2), ("2b", 3), ("3b", 4), ("4a", 5))),
    (r"^conv2d_7b\.", "head.conv."),
    (r"^(classif|last_linear)\.", "head.fc."),
    *_counted(r"^mixed_{}\.", "stage{}.mixed.", (("5b", 1), ("6a", 2), ("7a", 3))),
    (r"^block8\.", "stage3.block10.branch."),
    *_counted(r"^repeat\.{}\.", "stage1.block{}.branch.", ((n, n + 1) for n in range(10))),
    *_counted(r"^repeat_1\.{}\.", "stage2.block{}.branch.", ((n, n + 1) for n in range(20))),
    *_counted(r"^repeat_2\.{}\.", "stage3.block{}.branch.", ((n, n + 1) for n in range(9))),
    (r"\.branch\.conv2d\.", ".branch.conv."),
    # A path that is one convolution has no number in it.
    (r"^stage2\.mixed\.branch0\.", "stage2.mixed" + _PATH3X3),
    (r"\.branch0\.(conv|bn)\.", r".branches.path1x1.\1."),
    *_counted(r"^stage1\.mixed\.branch1\.{}\.", "stage1.mixed.branches.path5x5.conv{}.", ((0, 1), (1, 2))),
    *_counted(r"^stage2\.mixed\.branch1\.{}\.", "stage2.mixed" + _PATH_DOUBLE + "conv{}.", ((0, 1), (1, 2), (2, 3))),
    *_counted(r"^stage3\.mixed\.branch0\.{}\.", "stage3.mixed.branches.path3x3_1.conv{}.", ((0, 1), (1, 2))),
    *_counted(r"^stage3\.mixed\.branch1\.{}\.", "stage3.mixed.branches.path3x3_2.conv{}.", ((0, 1), (1, 2))),
    *_counted(r"\.branch2\.{}\.", _PATH_DOUBLE + "conv{}.", ((0, 1), (1, 2), (2, 3))),
    (r"\.branch3\.1\.", ".branches.path_pool.projection."),
    *_counted(r"^(stage2\.block\d+\.branch)\.branch1\.{}\.", r"\1.branches.path7x7.conv{}.", ((0, 1), (1, 2), (2, 3))),
    *_counted(r"\.branch1\.{}\.", _PATH3X3 + "conv{}.", ((0, 1), (1, 2), (2, 3))),
)
_BN_INCEPTION: Rules = (
    (r"^last_linear\.", "head.fc."),
    # Their BN is called as its convolution, with _bn behind it.
    (r"^(\w+)_bn\.", r"\1.bn."),
    (r"^(\w+)\.(?=\w+$)", r"\1.conv."),
    (r"^conv1_7x7_s2\.", "stem.conv1."),
    (r"^conv2_3x3_reduce\.", "stem.conv2_reduce."),
    (r"^conv2_3x3\.", "stem.conv2."),
    (r"^inception_(\d)([a-e])_", r"stage\1.inception\1\2."),
    (r"\.1x1\.", ".branches.path1x1."),
    (r"\.3x3_reduce\.", _PATH3X3 + "reduce."),
    (r"\.3x3\.", _PATH3X3 + "conv."),
    (r"\.double_3x3_reduce\.", _PATH_DOUBLE + "reduce."),
    (r"\.double_3x3_([12])\.", _PATH_DOUBLE + r"conv\1."),
    (r"\.pool_proj\.", ".branches.path_pool.projection."),
)
_DENSENET: Rules = (
    (r"^features\.(conv|norm)0\.", r"stem.\1."),
    (r"^features\.denseblock(\d)\.denselayer(\d+)\.", r"stages.stage\1.block.layer\2.branch."),
    (r"^features\.transition(\d)\.", r"stages.stage\1.transition."),
    (r"^features\.norm5\.", "head.bn."),
    (r"\.norm(\d?)\.", r".bn\1."),
    (r"^classifier\.", "head.fc."),
)
_PATH7X7 = ".branches.path7x7."
_PATH_DOUBLE7X7 = ".branches.path_double7x7."
# The end of a path that splits: a 1x3 and a 3x1.
_SPLIT = (("a", "split.branches.conv1x3"), ("b", "split.branches.conv3x1"))
_INCEPTION_V3: Rules = (
    *_counted(r"^Conv2d_{}_\dx\d\.", "stem.conv{}.", (("1a", 1), ("2a", 2), ("2b", 3), ("3b", 4), ("4a", 5))),
    *_counted(r"^Mixed_{}([a-e])\.", r"stage{}\1.", ((5, "1.mixed5"), (6, "2.mixed6"), (7, "3.mixed7"))),
    (r"\.branch_pool\.", ".branches.path_pool.projection."),
    (r"\.branch(\dx\d)\.", r".branches.path\1."),
    (r"\.branch7x7x3_", ".branch7x7_"),
    *_counted(r"\.branch3x3_2{}\.", _PATH3X3 + "{}.", _SPLIT),
    *_counted(r"\.branch3x3dbl_3{}\.", _PATH_DOUBLE + "{}.", _SPLIT),
    (r"\.branch(\dx\d)_(\d)\.", r".branches.path\1.conv\2."),
    (r"\.branch(\dx\d)dbl_(\d)\.", r".branches.path_double\1.conv\2."),
    (r"^fc\.", "head.fc."),
)
_INCEPTION_V4: Rules = (
    *_counted(r"^features\.{}\.", "stem.conv{}.", ((0, 1), (1, 2), (2, 3))),
    *_counted(r"^features\.{}\.conv\.", "stem.mixed{}" + _PATH3X3, ((3, "3a"), (5, "5a"))),
    *_counted(r"^features\.4\.branch0\.{}\.", "stem.mixed4a" + _PATH3X3 + "conv{}.", ((0, 1), (1, 2))),
    *_counted(r"^features\.4\.branch1\.{}\.", "stem.mixed4a" + _PATH7X7 + "conv{}.", ((n, n + 1) for n in range(4))),
    *_counted(r"^features\.{}\.", "stage1.inception{}.", ((n, n - 5) for n in range(6, 10))),
    *_counted(r"^features\.{}\.", "stage{}.reduction.", ((10, 2), (18, 3))),
    *_counted(r"^features\.{}\.", "stage2.inception{}.", ((n, n - 10) for n in range(11, 18))),
    *_counted(r"^features\.{}\.", "stage3.inception{}.", ((n, n - 18) for n in range(19, 22))),
    (r"\.inception(\d)\.branch0\.", r".inception\1.branches.path1x1."),
    (r"\.branch3\.1\.", ".branches.path_pool.projection."),
    (r"^stage2\.reduction\.branch0\.", "stage2.reduction" + _PATH3X3),
    *_counted(r"^stage3\.reduction\.branch0\.{}\.", "stage3.reduction" + _PATH3X3 + "conv{}.", ((0, 1), (1, 2))),
    *_counted(
        r"^stage2\.reduction\.branch1\.{}\.",
        "stage2.reduction" + _PATH_DOUBLE + "conv{}.",
        ((0, 1), (1, 2), (2, 3)),
    ),
    *_counted(r"^(stage[23]\.\w+)\.branch1\.{}\.", r"\1" + _PATH7X7 + "conv{}.", ((n, n + 1) for n in range(4))),
    *_counted(r"^(stage2\.\w+)\.branch2\.{}\.", r"\1" + _PATH_DOUBLE7X7 + "conv{}.", ((n, n + 1) for n in range(5))),
    *_counted(r"^(stage1\.\w+)\.branch1\.{}\.", r"\1" + _PATH3X3 + "conv{}.", ((0, 1), (1, 2))),
    *_counted(r"^(stage1\.\w+)\.branch2\.{}\.", r"\1" + _PATH_DOUBLE + "conv{}.", ((0, 1), (1, 2), (2, 3))),
    (r"\.branch1_0\.", _PATH3X3 + "conv1."),
    *_counted(r"\.branch1_1{}\.", _PATH3X3 + "{}.", _SPLIT),
    *_counted(r"\.branch2_{}\.", _PATH_DOUBLE + "conv{}.", ((0, 1), (1, 2), (2, 3))),
    *_counted(r"\.branch2_3{}\.", _PATH_DOUBLE + "{}.", _SPLIT),
    (r"^last_linear\.", "head.fc."),
)


# --------------------------------------------------------------------------------------------------------------- ports
def _ports(
    source: str, rules: Rules, *, folds_bias: bool = False, unequal: str = "", **models: str
) -> tuple[Port, ...]:
    """Return pairs `selab_name="source_name"` that share their rules."""
    return tuple(
        Port(source=source, model=model, arch=arch, rules=rules, folds_bias=folds_bias, unequal=unequal)
        for arch, model in models.items()
    )


def _below(theirs: str, ours: str, rules: Rules) -> Rules:
    """Return rules, all for beginnings of keys, for a network that is part of another one."""
    there = re.escape(theirs)
    return (
        (f"^{there}", ours),
        *((pattern.replace("^", f"^{re.escape(ours)}", 1), rf"{ours}{new}") for pattern, new in rules),
    )


_BODY = "backbone.body."
# The published weights of both detectors have frozen BatchNorms without an epsilon, where these add 0.00001.
DETECTORS: tuple[Port, ...] = (
    *_ports(
        "torchvision",
        _below(_BODY, _BODY, _RESNET),
        faster_rcnn_resnet50_v1_5_fpn="fasterrcnn_resnet50_fpn",
        retinanet_resnet50_v1_5_fpn="retinanet_resnet50_fpn",
    ),
    *_ports(
        "torchvision",
        _below("backbone.", _BODY, _RESNET),
        deeplabv3_resnet50_v1_5="deeplabv3_resnet50",
        deeplabv3_resnet101_v1_5="deeplabv3_resnet101",
    ),
)
"""Pairs of networks that torchvision builds on both sides."""
PORTS: tuple[Port, ...] = (
    *_ports(
        "torchvision",
        _RESNET,
        resnet18="resnet18",
        resnet34="resnet34",
        resnet50_v1_5="resnet50",
        resnet101_v1_5="resnet101",
        resnet152_v1_5="resnet152",
        resnext50_32x4d_torch="resnext50_32x4d",
        resnext101_64x4d="resnext101_64x4d",
    ),
    *_ports("torchvision", _VGG_TORCHVISION, vgg16="vgg16_bn"),
    *_ports("torchvision", _DENSENET, densenet121="densenet121"),
    *_ports("torchvision", _MOBILENET_V2_TORCHVISION, mobilenet_v2="mobilenet_v2"),
    *_ports("torchvision", _mobilenet_v3_torchvision(_LARGE), mobilenet_v3_large="mobilenet_v3_large"),
    *_ports("torchvision", _mobilenet_v3_torchvision(_SMALL), mobilenet_v3_small="mobilenet_v3_small"),
    *_ports("torchvision", _EFFICIENTNET_TORCHVISION, efficientnet_b0="efficientnet_b0"),
    *_ports(
        "torchvision",
        _SHUFFLENET_V2,
        shufflenet_v2_x0_5="shufflenet_v2_x0_5",
        shufflenet_v2_x1_0="shufflenet_v2_x1_0",
        shufflenet_v2_x1_5="shufflenet_v2_x1_5",
        shufflenet_v2_x2_0="shufflenet_v2_x2_0",
    ),
    *_ports(
        "torchvision",
        _REGNET_TORCHVISION,
        regnet_x_400mf="regnet_x_400mf",
        regnet_x_800mf="regnet_x_800mf",
        regnet_y_400mf="regnet_y_400mf",
        regnet_y_800mf="regnet_y_800mf",
    ),
    *_ports(
        "timm",
        _RESNET,
        resnet18="resnet18",
        resnet34="resnet34",
        resnet50_v1_5="resnet50",
        resnet101_v1_5="resnet101",
        resnet152_v1_5="resnet152",
        se_resnet50_v1_5="seresnet50",
        se_resnet101_v1_5="seresnet101",
        se_resnet152_v1_5="seresnet152",
        resnext50_32x4d_torch="resnext50_32x4d",
        resnext101_32x4d_torch="resnext101_32x4d",
        resnext101_64x4d="resnext101_64x4d",
        se_resnext50_32x4d_torch="seresnext50_32x4d",
        se_resnext101_32x4d_torch="seresnext101_32x4d",
        se_resnext101_64x4d="seresnext101_64x4d",
    ),
    *_ports(
        "timm",
        _CAFFE_SE_RESNET,
        se_resnet50="legacy_seresnet50",
        se_resnet101="legacy_seresnet101",
        se_resnet152="legacy_seresnet152",
        se_resnext50_32x4d="legacy_seresnext50_32x4d",
        se_resnext101_32x4d="legacy_seresnext101_32x4d",
    ),
    *_ports("timm", _SENET154, senet154="legacy_senet154"),
    *_ports("timm", _VGG_TIMM, vgg16="vgg16_bn"),
    *_ports(
        "timm",
        _MOBILENET_V2_TIMM,
        mobilenet_v2="mobilenetv2_100",
        mobilenet_v2_0_5="mobilenetv2_050",
        mobilenet_v2_0_75="mobilenetv2_075",
        mobilenet_v2_1_4="mobilenetv2_140",
        mnasnet_a1="semnasnet_100",
    ),
    *_ports("timm", _mobilenet_v3_timm(_LARGE), mobilenetv3_large_100="mobilenetv3_large_100"),
    *_ports("timm", _mobilenet_v3_timm(_SMALL), mobilenetv3_small_100="mobilenetv3_small_100"),
    *_ports("timm", _EFFICIENTNET_TIMM, efficientnet_b0="efficientnet_b0"),
    *_ports(
        "timm",
        _REGNET_TIMM,
        regnetx_004="regnetx_004",
        regnet_x_400mf="regnetx_004_tv",
        regnet_x_800mf="regnetx_008",
        regnet_y_400mf="regnety_004",
        regnety_008="regnety_008",
        regnet_y_800mf="regnety_008_tv",
    ),
    *_ports("timm", _GHOSTNET, ghostnet_100="ghostnet_100"),
    *_ports("timm", _INCEPTION_RESNET_V2, inception_resnet_v2="inception_resnet_v2"),
    *_ports("timm", _DENSENET, densenet121="densenet121"),
    *_ports("timm", _INCEPTION_V3, inception_v3="inception_v3"),
    *_ports("timm", _INCEPTION_V4, inception_v4="inception_v4"),
    *_ports("cadene", _CAFFE_RESNET, resnet101="cafferesnet101"),
    *_ports(
        "cadene",
        _CAFFE_SE_RESNET,
        se_resnet50="se_resnet50",
        se_resnet101="se_resnet101",
        se_resnet152="se_resnet152",
        se_resnext50_32x4d="se_resnext50_32x4d",
        se_resnext101_32x4d="se_resnext101_32x4d",
    ),
    *_ports("cadene", _SENET154, senet154="senet154"),
    *_ports(
        "cadene",
        _CADENE_RESNEXT,
        resnext101_32x4d_torch="resnext101_32x4d",
        resnext101_64x4d="resnext101_64x4d",
    ),
    *_ports("cadene", _INCEPTION_RESNET_V2, inception_resnet_v2="inceptionresnetv2"),
    *_ports("cadene", _BN_INCEPTION, folds_bias=True, bn_inception="bninception"),
)
_TORCH_STRIDE = "strides in the 3x3 and pads the stem's pooling; this one strides in the 1x1 and does not pad, as Caffe"
_TORCH_POOL = "pads the stem's pooling; this one does not, as Caffe"
_CAFFE_POOL = "does not pad the stem's pooling, as Caffe; this one does"
_LARGE_EPS = "has a BN epsilon of 0.001, this one of 0.00001"
_SMALL_EPS = "has a BN epsilon of 0.00001, this one of 0.001"
UNEQUAL: tuple[Port, ...] = (
    *_ports(
        "torchvision", _RESNET, unequal=_TORCH_STRIDE, resnet50="resnet50", resnet101="resnet101", resnet152="resnet152"
    ),
    *_ports("torchvision", _RESNET, unequal=_TORCH_POOL, resnext50_32x4d="resnext50_32x4d"),
    *_ports(
        "torchvision",
        _mobilenet_v3_torchvision(_LARGE),
        unequal=_LARGE_EPS,
        mobilenetv3_large_100="mobilenet_v3_large",
    ),
    *_ports(
        "torchvision",
        _mobilenet_v3_torchvision(_SMALL),
        unequal=_LARGE_EPS,
        mobilenetv3_small_100="mobilenet_v3_small",
    ),
    *_ports("timm", _RESNET, unequal=_TORCH_STRIDE, resnet50="resnet50", resnet101="resnet101", resnet152="resnet152"),
    *_ports(
        "timm",
        _RESNET,
        unequal=_TORCH_POOL,
        resnext50_32x4d="resnext50_32x4d",
        resnext101_32x4d="resnext101_32x4d",
    ),
    *_ports(
        "timm",
        _CAFFE_SE_RESNET,
        unequal=_CAFFE_POOL,
        se_resnet18="legacy_seresnet18",
        se_resnet34="legacy_seresnet34",
    ),
    *_ports("timm", _mobilenet_v3_timm(_LARGE), unequal=_SMALL_EPS, mobilenet_v3_large="mobilenetv3_large_100"),
    *_ports("timm", _mobilenet_v3_timm(_SMALL), unequal=_SMALL_EPS, mobilenet_v3_small="mobilenetv3_small_100"),
)
