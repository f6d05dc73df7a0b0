import io

from rich.console import Console
from torch import nn

from selab.attention.auto_sites import block_ends
from selab.attention.insert import insert_se
from selab.attention.sites import declared_groups
from selab.models import catalog
from selab.models.build import build
from selab.report.tree import site_tree, sites_as_builtins

NCHW = (1, 3, 224, 224)


def drawn(tree, width=100):
    out = io.StringIO()
    Console(file=out, width=width).print(tree)
    return out.getvalue()


def resnet50():
    return build(catalog.find("resnet50"), device="meta").model


def block():
    return nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())


def test_resnet50_fits_a_hundred_columns():
    model = resnet50()
    insertions = insert_se(model, "residual", dry_run=True)
    ends = block_ends(model, NCHW)
    text = drawn(site_tree(model, insertions, ends=ends, groups=declared_groups(model), input_nchw=NCHW))
    lines = text.splitlines()
    assert max(map(len, lines)) <= 100
    # 3 blocks in stage 2: the first one has a projection, the others are alike. 2 * 256 * 16 + 256 + 16 = 8464.
    folded = "1 … 2 (2 times the same)  Bottleneck  256×56×56  [residual]  ← SE 256→16, 8,464 params"
    assert sum(folded in line for line in lines) == 1
    # Blocks alike are drawn once: 4 stages of 2 drawings each.
    assert text.count("[auto]") == 4 * 2
    assert "conv2  Conv2d 64→64 3×3, bn2  BatchNorm2d, relu2  ReLU  64×56×56" in text
    assert "conv1  Conv2d 256→128 1×1 /2" in text
    assert not [line for line in lines if "── 2  Bottleneck" in line]


def test_neighbours_fold_only_if_nothing_tells_them_apart():
    model = nn.Sequential(block(), block(), block(), nn.Sequential(nn.Conv2d(8, 4, 1), nn.ReLU()))
    assert "0 … 2 (3 times the same)  Sequential" in drawn(site_tree(model))
    assert "3  Sequential" in drawn(site_tree(model))
    marked = drawn(site_tree(model, groups={"mine": ["1"]}))
    assert "1  Sequential  [mine]" in marked
    assert "times the same" not in marked


def test_a_site_elsewhere_than_at_the_output_says_its_map():
    model = nn.Sequential(nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.ReLU())
    insertions = insert_se(model, "0", placement="pre", reduction=3, input_nchw=(1, 3, 8, 8), dry_run=True)
    # 3 → 1 → 3 with biases: 2 * 3 * 1 + 3 + 1 parameters, on the input's 8×8.
    expected = "0  Conv2d 3→16 3×3 /2  16×4×4  ← SE pre, 3→1 on 8×8, 10 params"
    assert expected in drawn(site_tree(model, insertions, input_nchw=(1, 3, 8, 8)))


def test_layers_share_a_line_until_the_next_one_with_weights():
    twice = nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1, groups=3))
    lines = drawn(site_tree(twice, input_nchw=(1, 3, 4, 4))).splitlines()
    assert lines[1].endswith("0  ReLU, 1  BatchNorm2d, 2  ReLU  3×4×4")
    assert lines[2].endswith("3  Conv2d 3→3 1×1  3×4×4")
    assert lines[3].endswith("4  Conv2d 3→3 1×1 depthwise  3×4×4")


def test_modules_that_do_not_run_once_say_so():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.twice, self.never, self.pair = nn.Conv2d(3, 3, 1), nn.ReLU(), Pair()

        def forward(self, x):
            return self.pair(self.twice(self.twice(x)))[0]

    class Pair(nn.Module):
        def forward(self, x):
            return x, x

    text = drawn(site_tree(Odd(), input_nchw=(1, 3, 4, 4)))
    assert "twice  Conv2d 3→3 1×1  runs 2 times" in text
    assert "never  ReLU  does not run" in text
    assert "pair  Pair  tuple" in text


def test_as_builtins_lists_every_module():
    model = resnet50()
    insertions = insert_se(model, "residual", dry_run=True)
    listed = sites_as_builtins(
        model, insertions, ends=block_ends(model, NCHW), groups=declared_groups(model), input_nchw=NCHW
    )
    assert [one["path"] for one in listed] == [path for path, _ in model.named_modules() if path]
    by_path = {one["path"]: one for one in listed}
    site = by_path["stage2.1"]
    assert (site["type"], site["output_shape"], site["calls"]) == ("Bottleneck", (1, 256, 56, 56), 1)
    assert site["groups"] == ["residual"]
    assert site["insertion"]["squeeze_channels"] == 256 // 16
    assert by_path["stage2.1.branch"]["auto"] == "before the addition in stage2.1"
    assert by_path["stem"]["insertion"] is by_path["stem"]["auto"] is None
    assert sites_as_builtins(model)[0]["output_shape"] is None
