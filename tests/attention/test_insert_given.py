"""Networks, examples and paths that insertion is given: other inputs, and what is refused in words."""

import pytest
import torch
from torch import nn

from selab.attention.insert import insert_se, remove_se
from selab.attention.inserted import check_inserted
from selab.attention.se import SqueezeExcitation
from selab.errors import InsertionError, ModelError

CHW = (1, 3, 32, 32)


def blocks(model):
    return [module for module in model.modules() if isinstance(module, SqueezeExcitation)]


class TestOtherInputs:
    @pytest.mark.parametrize("form", ["positional", "keywords", "nested"])
    def test_two_inputs(self, form):
        class Two(nn.Module):
            def __init__(self):
                super().__init__()
                self.rgb, self.depth = nn.Conv2d(3, 8, 3), nn.Conv2d(1, 8, 3)
                self.bn = nn.BatchNorm2d(8)

            def forward(self, rgb, depth):
                if isinstance(rgb, dict):
                    rgb = rgb["image"][0]
                return self.bn(self.rgb(rgb) + self.depth(depth))

        rgb, depth = torch.randn(2, 3, 6, 6), torch.randn(2, 1, 6, 6)
        inputs = {
            "positional": (rgb, depth),
            "keywords": {"rgb": rgb, "depth": depth},
            "nested": ({"image": [rgb]}, depth),
        }[form]
        model = Two().eval()
        expected = model(**inputs) if form == "keywords" else model(*inputs)
        (one,) = insert_se(model, "bn", inputs=inputs, reduction=2, init="identity")
        assert (one.channels, one.height) == (8, 4)
        assert torch.equal(model(**inputs) if form == "keywords" else model(*inputs), expected)
        assert check_inserted(model, inputs=inputs, inserted=["bn"]) == ("bn",)
        remove_se(model)
        assert len(insert_se(model, "bn", input_nchw=inputs, reduction=2)) == 1

    def test_networks_that_cannot_be_changed(self, foreign):
        scripted = torch.jit.script(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()))
        with pytest.raises(ModelError, match="a TorchScript network cannot be exchanged"):
            insert_se(scripted, "0", input_nchw=CHW)
        with pytest.raises(ModelError, match="a TorchScript network cannot be exchanged"):
            remove_se(scripted)
        lazy = nn.Sequential(nn.LazyConv2d(8, 3), nn.ReLU())
        with pytest.raises(ModelError, match=r"0: a lazy LazyConv2d that has no parameters yet; run the network once"):
            insert_se(lazy, "0", input_nchw=CHW)
        lazy(torch.zeros(1, 3, 8, 8))
        assert len(insert_se(lazy, "0", input_nchw=CHW, reduction=2)) == 1


class TestWhatIsGiven:
    @pytest.mark.parametrize(
        ("given", "message"),
        [
            (None, "expected a torch.nn.Module, got NoneType"),
            ("resnet18", "got str; selab.build"),
            (nn.Conv2d, "got the class Conv2d; give an instance"),
            (nn.functional.relu, "got function"),
            (3, "got int"),
        ],
    )
    def test_no_network(self, given, message):
        for name, call in (
            ("insert_se", lambda: insert_se(given, "0")),
            ("remove_se", lambda: remove_se(given)),
            ("check_inserted", lambda: check_inserted(given)),
        ):
            with pytest.raises(ModelError, match=f"^{name}: .*{message}"):
                call()

    def test_a_compiled_network(self):
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
        exported = torch.export.export(model, (torch.zeros(1, 3, 8, 8),))
        for call in (lambda one: insert_se(one, "0"), remove_se, check_inserted):
            with pytest.raises(ModelError, match="modules of a TorchScript network cannot be exchanged or checked"):
                call(torch.jit.script(model))
            with pytest.raises(ModelError, match="got ExportedProgram; give the network that was exported"):
                call(exported)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"input_nchw": None}, "input_nchw None: expected a shape"),
            ({"input_nchw": "abcd"}, "input_nchw 'abcd': expected a shape"),
            ({"input_nchw": (1.5, 3, 8, 8)}, r"input_nchw \(1\.5, 3, 8, 8\): expected a shape"),
            ({"inputs": 5}, "inputs 5: expected a shape"),
            ({"inputs": "x"}, "inputs 'x': expected a shape"),
        ],
    )
    def test_no_example(self, foreign, options, message):
        with pytest.raises(ModelError, match=f"insert_se: {message}"):
            insert_se(foreign, "stem", **options)
        with pytest.raises(ModelError, match=f"check_inserted: {message}"):
            check_inserted(foreign, **options)

    @pytest.mark.parametrize("given", [5, [5], [None, "stem"]])
    def test_no_paths(self, foreign, given):
        with pytest.raises(InsertionError, match=r"insert_se: sites: .*: expected the path of a module or a pattern"):
            insert_se(foreign, given, input_nchw=CHW)
        with pytest.raises(InsertionError, match=r"remove_se: paths: .*: expected the path of a module or a pattern"):
            remove_se(foreign, given)
        with pytest.raises(InsertionError, match="insert_se: sites: None"):
            insert_se(foreign, None, input_nchw=CHW)
