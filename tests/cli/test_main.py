"""The program: how it starts, and what it answers to mistakes."""

import subprocess
import sys

import pytest
import torch


class TestNewcomer:
    def test_help_imports_no_torch(self):
        code = """
import sys
from selab.cli.main import main
sys.argv = ["selab", "--help"]
try:
    main()
except SystemExit as left:
    assert not left.code
heavy = {"torch", "numpy", "fvcore", "thop", "tensorboard"} & set(sys.modules)
assert not heavy, heavy
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "profile" in done.stdout

    @pytest.mark.parametrize("words", [["archs"], ["show", "se_mobilnet"], ["profile", "--arch", "se_mobilnet"]])
    def test_a_typo_is_answered_before_torch(self, words):
        code = f"""
import sys
from selab.cli.main import main
sys.argv = {["selab", *words]!r}
try:
    main()
except SystemExit:
    pass
assert "torch" not in sys.modules
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    def test_no_command_shows_the_commands(self, selab):
        status, out, _ = selab()
        assert status == 2
        assert "profile" in out

    def test_version(self, selab):
        assert selab("--version")[1].startswith("selab ")


class TestMistakes:
    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["profile", "--arch", "se_mobilnet"], "no such architecture; did you mean se_mobilenet"),
            (["profile", "--arch", "mobilenet"], "is a baseline itself; profile its variant: --arch se_mobilenet"),
            (["profile", "--arch", "se_mobilenet", "--baseline", "small_cnn"], "only networks of equal input"),
            (["count", "--arch", "none.toml"], "none.toml: cannot be read: No such file"),
            (["table", "papper-2"], "no such table; did you mean paper-2"),
            (["table", "latency"], "no records"),
            (["table", "latency", "--profiles", "/no/such"], "not a folder"),
            (["show", "resnet_50"], "show resnet_50: no such architecture; did you mean resnet50"),
            (["profile", "--arch", "se_mobilenet", "--baseline", "small_cn"], "--baseline small_cn: no such"),
            (["count", "--arch", "se_small_cnn", "--resolution", "64"], "give the shape that the network expects"),
        ],
    )
    def test_one_clear_line(self, selab, words, message, one_line):
        status, out, error = selab(*words)
        assert status == 1
        assert out == ""
        assert message in one_line(error)

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
    def test_no_cuda(self, selab, one_line):
        status, _, error = selab("profile", "--arch", "se_mobilenet", "--device", "cuda")
        assert status == 1
        assert "--device cuda: " in one_line(error)

    @pytest.mark.parametrize(
        "words",
        [
            ["profile", "--arch", "se_mobilenet", "--batch", 0],
            ["profile", "--arch", "se_mobilenet", "--dtype", "int4"],
            ["profile"],
            ["profil"],
        ],
    )
    def test_wrong_usage_is_2(self, selab, words):
        status, _, error = selab(*words)
        assert status == 2
        assert "Traceback" not in error

    @pytest.mark.parametrize(
        ("old", "new", "message"),
        [
            ("reduction = 4", "redaction = 4", "variants.se_toy.se.redaction: unknown key"),
            ("num_classes = 4", "num_classes = ", "not TOML"),
            ("reduction = 4", "reduction = 9", "0: reduction 9 is larger than the 8 channels"),
            ('sites = ["0", "3"]', 'sites = ["7"]', "7: its output is a tensor of shape (1, 4)"),
        ],
    )
    def test_a_malformed_toml_names_file_and_key(self, selab, toy, old, new, message, one_line):
        toy.write_text(toy.read_text().replace(old, new))
        status, _, error = selab("count", "--arch", f"{toy}:se_toy")
        assert status == 1
        line = one_line(error)
        assert "toy.toml: " in line
        assert message in line

    def test_a_folder_that_cannot_be_written(self, selab, tmp_path, one_line):
        (tmp_path / "file").write_text("in the way")
        status, _, error = selab("profile", "--arch", "se_small_cnn", "--out", tmp_path / "file" / "r")
        assert status == 1
        assert "cannot be written: Not a directory; choose a writable folder" in one_line(error)

    def test_a_reader_that_leaves(self):
        done = subprocess.run(
            f"{sys.executable} -m selab archs --json - | head -1",
            shell=True,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.stderr == ""
