"""Nothing from the current folder is imported unannounced, and a TOML runs only what can return a network."""

import os
import subprocess
import sys

import pytest

# Modules that Python, torch, Ray and this package import, some of them late.
NAMES = ("random", "torch", "selab", "msgspec", "numpy", "typing", "json", "multiprocessing", "thop", "sitecustomize")
BAIT = """
import pathlib
pathlib.Path({there!r}).touch()
"""


@pytest.fixture
def trapped(tmp_path):
    """A folder of files that are called as modules; each leaves a trace if it is run."""
    folder = tmp_path / "trapped"
    folder.mkdir()
    for name in NAMES:
        (folder / f"{name}.py").write_text(BAIT.format(there=str(tmp_path / f"{name}.ran")))
    return folder


def traces(folder):
    return sorted(path.name for path in folder.parent.glob("*.ran"))


def command(folder, *words, start=("-P", "-m", "selab"), **environment):
    clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    return subprocess.run(
        [sys.executable, *start, *map(str, words)],
        cwd=folder,
        env={**clean, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )


NET = """
from torch import nn
class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
"""


@pytest.mark.slow
def test_workers_import_nothing_from_the_current_folder(trapped):
    words = ("profile", "--arch", "se_small_cnn", "--budget", 1, "--processes", 3, "--phase", "forward")
    done = command(trapped, *words, "--out", trapped.parent / "out")
    assert done.returncode == 0, done.stderr
    assert traces(trapped) == []


def test_a_worker_imports_nothing_from_the_current_folder(trapped):
    """A fresh process, as `profile` starts it: it says that it cannot read its order."""
    code = (
        "import subprocess, sys; from selab.experiments import children; "
        "start = children._START.format(module='selab.experiments.workers'); "
        "print(subprocess.run([sys.executable, '-P', '-c', start], input=b'{}', capture_output=True).stderr)"
    )
    done = command(trapped, code, start=("-P", "-c"))
    assert done.returncode == 0
    assert "required field" in done.stdout, "it has reached the reading of its order"
    assert traces(trapped) == []


def test_children_of_any_kind_import_nothing_from_the_current_folder(trapped):
    """Processes that Python's own pools start have the current folder first on their path, unless told otherwise."""
    (trapped.parent / "net.py").write_text(
        "import subprocess, sys\nsubprocess.run([sys.executable, '-c', 'import random, json'], check=True)\n" + NET
    )
    done = command(trapped, "count", "--arch", "../net.py:Net", "--input", "3x8x8")
    assert done.returncode == 0, done.stderr
    assert "running code from ../net.py" in done.stderr
    assert traces(trapped) == []


def test_python_m_leaves_the_current_folder(trapped):
    """What Python itself imports before the package's first line is beyond it: those names are taken away."""
    for name in ("selab", "typing", "sitecustomize", "json"):
        (trapped / f"{name}.py").unlink()
    done = command(trapped, "count", "--arch", "se_small_cnn", start=("-m", "selab"))
    assert done.returncode == 0, done.stderr
    assert traces(trapped) == []


def test_a_librarys_network_imports_nothing_from_the_current_folder(trapped):
    done = command(trapped, "count", "--arch", "selab.archs.small_cnn:SmallCNN", "--input", "3x32x32")
    assert traces(trapped) == [], done.stderr


def test_a_module_of_the_current_folder_is_announced(tmp_path):
    (tmp_path / "nets.py").write_text(NET)
    done = command(tmp_path, "count", "--arch", "nets:Net", "--input", "3x8x8")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("running code from nets") == 1


FAMILY = """
family = "f"
source = "this test"
builder = "{builder}"
input_chw = [3, 8, 8]
num_classes = 2
[variants.a]
title = "a"
arguments = {{ {arguments} }}
[variants.b]
title = "b"
baseline = "a"
se = {{ block = "external", sites = ["1"], target = "block.py:Block" }}
"""
BLOCK = """
from torch import nn
class Block(nn.Identity):
    def __init__(self, channels):
        super().__init__()
"""


@pytest.fixture
def family(tmp_path):
    def write(builder, arguments=""):
        (tmp_path / "f.toml").write_text(FAMILY.format(builder=builder, arguments=arguments))
        return f"{tmp_path / 'f.toml'}:a"

    return write


class TestBuilders:
    def test_the_file_beside_a_family_is_announced_as_loudly_as_on_the_command_line(self, family, tmp_path, selab):
        (tmp_path / "nets.py").write_text(NET + "\ndef build(num_classes):\n    return Net()\n")
        arch = family("nets:build")
        status, _, error = selab("count", "--arch", arch)
        assert status == 0
        assert error.count("running code from ") == 1
        assert f"running code from {tmp_path / 'nets.py'}" in " ".join(error.split()).replace("- ", "-")

    def test_a_blocks_file_is_announced(self, family, tmp_path, selab):
        (tmp_path / "nets.py").write_text(NET + "\ndef build(num_classes):\n    return Net()\n")
        (tmp_path / "block.py").write_text(BLOCK)
        arch = family("nets:build")
        # The file's class is no block: it is announced before that is found out.
        error = selab("count", "--arch", f"{arch[:-1]}b")[2]
        assert error.count("running code from ") == 2
        assert error.index("block.py") < error.index("expected a subclass")
        assert "block.py" in error

    @pytest.mark.parametrize(
        ("builder", "arguments", "words"),
        [
            ("os:system", 'command = "touch {there}"', "is of Python's standard library"),
            ("subprocess:run", 'args = "{there}"', "is of Python's standard library"),
            ("antigravity:fly", "", "is of Python's standard library"),
            ("torch:load", 'f = "{there}"', "is a function that returns no network"),
            ("torch.hub:load", 'repo_or_dir = "{there}", model = "x"', "is a function that returns no network"),
            ("torch:zeros", "", "is a function that returns no network"),
            ("torch:Tensor", "", "is a class of something else"),
            ("torch:float32", "", "is not callable, but a value of type dtype"),
            ("msgspec:Struct", "", "is a class of something else"),
            ("selab.training.download:digest", 'path = "{there}"', "is a function that returns str"),
        ],
    )
    def test_what_returns_no_network_is_not_called(self, family, tmp_path, selab, builder, arguments, words):
        there = tmp_path / "there"
        status, _, error = selab("count", "--arch", family(builder, arguments.format(there=there)))
        assert status == 1
        assert words in error
        assert "torch.nn.Module" in error
        assert not there.exists()

    def test_a_function_of_a_file_that_says_what_it_returns(self, family, tmp_path, selab):
        (tmp_path / "nets.py").write_text(
            NET + "\ndef good(num_classes) -> nn.Module:\n    return Net()\n"
            "\ndef bad(num_classes) -> int:\n    open('ran', 'w')\n    return 3\n"
            "\ndef odd(num_classes):\n    return 3\n"
        )
        assert selab("count", "--arch", family("nets:good"))[0] == 0
        status, _, error = selab("count", "--arch", family("nets:bad"))
        assert status == 1
        assert "is a function that returns int" in error
        status, _, error = selab("count", "--arch", family("nets:odd"))
        assert status == 1
        assert "does not return a torch.nn.Module" in error

    def test_the_internal_names_without_their_arguments(self, family, selab):
        for name in ("from_file", "from_module", "timm_model", "torchvision_model"):
            status, _, error = selab("count", "--arch", family(f"selab.foreign:{name}"))
            assert status == 1
            assert "Traceback" not in error

    def test_an_installed_builder_imports_nothing_from_the_familys_folder(self, family, trapped):
        path = trapped / "f.toml"
        path.write_text(FAMILY.format(builder="selab.archs.small_cnn:SmallCNN", arguments=""))
        done = command(trapped.parent, "count", "--arch", f"{path}:a")
        assert traces(trapped) == [], done.stderr


def test_whatever_runs_code_tells_of_it_once(tmp_path):
    """Tables count the costs beside accuracies anew, for example, from the network that a record names."""
    from selab.attention import user_code

    told = []
    (tmp_path / "net.py").write_text(NET)
    user_code.tell_of_code(told.append)
    try:
        with user_code.imported(f"{tmp_path / 'net.py'}:Net"):
            assert told == [f"{tmp_path / 'net.py'}"]
        with user_code.imported(f"{tmp_path / 'net.py'}:Net"):
            assert len(told) == 1
        user_code.code_is_known("json")
        with user_code.imported("json:loads"):
            assert len(told) == 1
    finally:
        user_code.tell_of_code(None)
