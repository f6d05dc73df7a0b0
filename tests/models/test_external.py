import subprocess
import sys

import pytest
import torch
from torch import nn

from selab.errors import SpecError, UnknownNameError
from selab.models import external
from selab.models.build import build

NETWORKS = """
import torch
from torch import nn

print("this goes to standard error")


def small():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())


def classes(num_classes, width=4):
    return nn.Linear(width, num_classes)


def needs(width, *, depth, num_classes=3):
    return nn.Linear(width, depth)


def nothing():
    return None


def fails():
    torch.zeros(2) + torch.zeros(3)


def reads():
    return nn.Linear(2, int(torch.ones(2).sum().item()))


class Net(nn.Module):
    def __init__(self, num_classes=10):
        super().__init__()
        self.fc = nn.Linear(4, num_classes)

    @classmethod
    def wide(cls):
        return cls(num_classes=40)


ready = nn.Linear(2, 2)
number = 3


def same():
    return ready
"""


@pytest.fixture
def file(tmp_path, monkeypatch):
    path = tmp_path / "networks.py"
    path.write_text(NETWORKS)
    monkeypatch.chdir(tmp_path)
    yield path
    for name in [name for name, module in sys.modules.items() if getattr(module, "__file__", None) == str(path)]:
        del sys.modules[name]


def network(word, **options):
    return build(external.find(word), **options).model


class TestFile:
    def test_a_word_becomes_a_variant(self, file):
        variant = external.find("networks.py:small")
        assert variant.name == "networks.py:small"
        assert variant.arguments == {"path": "networks.py", "attribute": "small"}
        assert variant.input_chw == (3, 224, 224)
        assert variant.se is variant.baseline is None
        assert external.runs_code_of(variant) == "networks.py"

    def test_functions_classes_and_networks(self, file, capsys):
        assert network("networks.py:small")[0].out_channels == 4
        assert network("networks.py:Net").fc.out_features == 1000
        assert network("networks.py:Net.wide").fc.out_features == 40
        assert network("networks.py:classes").out_features == 1000
        assert isinstance(network("networks.py:ready"), nn.Linear)
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.count("this goes to standard error") == 1

    def test_a_file_is_one_module_however_it_is_named(self, file):
        assert type(network("networks.py:Net")) is type(network(f"{file}:Net"))

    def test_a_network_that_is_there_is_copied(self, file):
        first, second = network("networks.py:ready"), network("networks.py:ready")
        assert first is not second
        assert torch.equal(first.weight, second.weight)
        assert network("networks.py:ready", device="meta").weight.is_meta
        assert not network("networks.py:ready").weight.is_meta

    def test_a_constructor_that_reads_values_can_be_counted(self, file):
        model = network("networks.py:reads", device="meta")
        assert model.weight.is_meta
        assert model.out_features == 2

    def test_importing_does_not_change_what_a_seed_draws(self, file):
        first = network("networks.py:small", seed=3)
        assert torch.equal(first[0].weight, network("networks.py:small", seed=3)[0].weight)

    def test_neighbours_can_be_imported(self, file):
        (file.parent / "beside_networks.py").write_text("WIDTH = 7\n")
        (file.parent / "own.py").write_text(
            "from torch import nn\ndef net():\n    from beside_networks import WIDTH\n    return nn.Linear(1, WIDTH)\n"
        )
        assert network("own.py:net").out_features == 7
        assert str(file.parent) not in sys.path
        del sys.modules["beside_networks"]


class TestModule:
    def test_in_the_current_folder(self, file):
        try:
            assert network("networks:small")[0].out_channels == 4
            assert external.runs_code_of(external.find("networks:small")) == "networks"
        finally:
            sys.modules.pop("networks", None)

    def test_an_installed_one(self):
        model = network("torch.nn.modules.activation:ReLU")
        assert isinstance(model, nn.ReLU)

    @pytest.mark.parametrize(
        ("word", "message"),
        [
            ("no_such_package.nets:net", "there is no module 'no_such_package' in this folder or among"),
            ("torch.no_such_module:net", "there is no module 'torch.no_such_module' in "),
            ("torch.nn:Linearr", "torch.nn:Linearr: there is no such name in it; did you mean Bilinear, Linear"),
            ("torch.nn:Conv2d", "needs in_channels, out_channels, kernel_size; write a function without arguments"),
        ],
    )
    def test_refusals(self, word, message):
        with pytest.raises(SpecError) as told:
            network(word)
        assert message in str(told.value)
        assert "\n" not in str(told.value)


class TestMistakes:
    @pytest.mark.parametrize("word", ["resnet50", "se_resnet50", "a b:c", "a/b:c", "12:net", "", ":"])
    def test_other_words_are_not_ours(self, word):
        assert external.find(word) is None

    @pytest.mark.parametrize(
        ("word", "message"),
        [
            ("missing.py:net", "--baseline missing.py:net: there is no file missing.py"),
            ("networks.py", "--baseline networks.py: name the function, class or network in it: networks.py:NAME"),
            ("networks.py:", "name the function, class or network in it: networks.py:NAME"),
        ],
    )
    def test_found_before_anything_runs(self, file, word, message):
        with pytest.raises(SpecError, match=message):
            external.find(word, option="--baseline")

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("smal", "networks.py:smal: there is no such name in it; did you mean small"),
            ("needs", "needs width, depth; write a function without arguments, or a family.toml"),
            ("nothing", "returns None, not an nn.Module"),
            ("number", "is a value of type int; name a function or class"),
        ],
    )
    def test_callables_that_cannot_be_used(self, file, name, message):
        with pytest.raises(SpecError, match=message):
            network(f"networks.py:{name}")

    def test_an_error_in_the_callable_names_their_line(self, file):
        line = 1 + NETWORKS[: NETWORKS.index("torch.zeros(2) +")].count("\n")
        with pytest.raises(SpecError, match=rf"RuntimeError: The size of tensor a.*\({file}, line {line}\)"):
            network("networks.py:fails")

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("import torch\n\nwidth = 1 / 0\n", r"ZeroDivisionError: division by zero \(.*broken.py, line 3\)"),
            ("def net(:\n", r"SyntaxError: invalid syntax \(.*broken.py, line 1\)"),
            ("import no_such_library\n", r"ModuleNotFoundError: No module named 'no_such_library' \(.*, line 1\)"),
            ("import sys\nsys.exit(2)\n", r"it ends the program \(SystemExit\).*\(.*broken.py, line 2\)"),
            ("raise ValueError\n", r"broken.py:net: ValueError \(.*broken.py, line 1\)"),
        ],
    )
    def test_an_error_on_import_names_their_line(self, file, text, message):
        (file.parent / "broken.py").write_text(text)
        for _ in range(2):  # what failed is not there half loaded the second time
            with pytest.raises(SpecError, match=message) as told:
                network("broken.py:net")
            assert "\n" not in str(told.value)

    def test_an_error_in_a_package_names_its_line(self, file):
        package = file.parent / "broken_package"
        package.mkdir()
        (package / "__init__.py").write_text("")
        (package / "nets.py").write_text("from torch import nn\ndef net():\n    return nn.Conv2d(3, -1, 3)\n")
        with pytest.raises(SpecError, match=r"RuntimeError: .*nets.py, line 3\)"):
            network("broken_package.nets:net")

    def test_the_same_network_twice(self, file):
        network("networks.py:same")
        with pytest.raises(SpecError, match="returns the same network again; make a new one in each call"):
            network("networks.py:same")

    @pytest.mark.parametrize("library", ["torchvision", "timm"])
    def test_a_library_that_is_not_there(self, monkeypatch, library):
        monkeypatch.setitem(sys.modules, library, None)
        with pytest.raises(SpecError, match=rf"--arch {library}:resnet50: .*pip install 'selab\[{library}\]'"):
            external.find(f"{library}:resnet50")

    def test_a_library_that_is_broken(self, tmp_path, monkeypatch):
        (tmp_path / "timm.py").write_text("raise RuntimeError('operator does not exist')\n")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "timm", raising=False)
        with pytest.raises(SpecError, match="importing timm fails: RuntimeError: operator does not exist"):
            external.find("timm:resnet50")


class Library:
    """Stands for torchvision or timm, so that what is asked of them can be tested without them."""

    __version__ = "1.2"

    def __init__(self):
        self.models = self
        self.asked = []

    def list_models(self, module=None):
        return ["resnet50", "inception_v3"]

    def list_pretrained(self, pattern):
        return ["resnet50.a1_in1k"]

    def get_pretrained_cfg(self, name):
        self.input_size, self.num_classes = (3, 160, 160), 21
        return self

    def get_model(self, name, **arguments):
        self.asked.append((name, arguments))
        return nn.Identity()

    create_model = get_model


class TestLibraries:
    @pytest.fixture
    def library(self, monkeypatch):
        library = Library()
        for name in ("torchvision", "timm"):
            monkeypatch.setitem(sys.modules, name, library)
        return library

    def test_torchvision_gives_random_weights(self, library):
        network("torchvision:resnet50")
        network("torchvision:inception_v3")
        plain = {"weights": None, "num_classes": 1000}
        assert library.asked[0] == ("resnet50", plain)
        assert library.asked[1] == ("inception_v3", {**plain, "aux_logits": False, "init_weights": True})
        assert external.find("torchvision:resnet50").input_chw == (3, 224, 224)
        assert external.find("torchvision:inception_v3").input_chw == (3, 299, 299)

    def test_timm_gives_random_weights_and_its_own_input(self, library):
        variant = external.find("timm:resnet50.a1_in1k")
        assert (variant.input_chw, variant.num_classes) == ((3, 160, 160), 21)
        assert external.runs_code_of(variant) is None
        build(variant)
        assert library.asked == [("resnet50.a1_in1k", {"pretrained": False, "num_classes": 21})]

    @pytest.mark.parametrize(
        ("word", "message"),
        [
            ("torchvision:resnet5", "torchvision has no such classification network; did you mean resnet50"),
            ("timm:resnet5", "timm has no such network; did you mean resnet50"),
            ("timm:resnet50.a1", "timm knows no weights 'a1' of resnet50; did you mean resnet50.a1_in1k"),
        ],
    )
    def test_unknown_names(self, library, word, message):
        with pytest.raises(UnknownNameError, match=message):
            external.find(word)


def block_class(name, module):
    return type(name, (nn.Module,), {"__module__": module})


def test_se_blocks_are_known_by_class_and_module():
    ours = block_class("SEModule", "timm.layers.squeeze_excite")()
    ours.inner = block_class("SqueezeExcite", "timm.models._efficientnet_blocks")()
    kin = type("Mine", (block_class("SqueezeExcitation", "torchvision.ops.misc"),), {})()
    stranger = block_class("SEModule", "somewhere.else")()
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 3, 1), ours), kin, stranger, nn.ReLU())
    assert external.se_blocks(model) == ("0.1", "1")


def test_code_beside_a_family_is_told(toy):
    from selab.models import catalog

    assert external.runs_code_of(catalog.find(f"{toy}:toy")) == "toy_networks"
    assert external.runs_code_of(catalog.find("resnet50")) is None


def test_no_library_is_imported_at_once():
    code = "import selab.models.external, sys; print([n for n in ('torch', 'torchvision', 'timm') if n in sys.modules])"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "[]"
