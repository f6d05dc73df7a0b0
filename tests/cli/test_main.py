import csv
import json
import os
import re
import shlex
import signal
import subprocess
import sys

import msgspec
import pytest
import safetensors.torch
import torch
from PIL import Image

from selab.errors import SelabError
from selab.records import types
from selab.records.types import Record
from selab.training.record import save_accuracy_record

RECORD_KEYS = [
    "schema",
    "arch",
    "baseline",
    "workload",
    "machine",
    "cost.params",
    "cost.macs.conv_linear",
    "cost.macs.paper",
    "cost.macs.all",
    "cost.se.squeeze.macs",
    "cost.se.squeeze.bytes",
    "cost.se.excitation.macs",
    "cost.se.excitation.bytes",
    "cost.se.scale.macs",
    "cost.se.scale.bytes",
    "cost.counters.fvcore",
    "cost.counters.thop",
    "cost.counters.torch",
    "latency.forward.baseline_s",
    "latency.forward.variant_s",
    "latency.forward.ratio",
    "latency.forward.ratio_low",
    "latency.forward.ratio_high",
    "latency.forward.verdict",
    "latency.forward.flags",
    "latency.backward.ratio",
    "latency.forward_backward.ratio",
    "latency.forward.runs",
    "memory.peak_forward_bytes",
]


def program(*words, **options):
    """The program as a user's shell runs it."""
    command = [sys.executable, "-m", "selab", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **options)


def one_line(error):
    """A user's mistake: one line, no traceback."""
    assert "Traceback" not in error
    progress = [
        line
        for line in error.splitlines()
        if line.endswith(("…", "the same command resumes")) or line.startswith("running code from ")
    ]
    lines = [line for line in error.splitlines() if line and line not in progress]
    assert len(lines) == 1, error
    assert lines[0].startswith("error: ")
    return lines[0]


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


class TestLooking:
    def test_archs(self, selab):
        status, out, _ = selab("archs")
        assert status == 0
        assert "se_mobilenet" in out
        assert max(map(len, out.splitlines())) <= 80

    def test_archs_as_json(self, selab):
        found = json.loads(selab("archs", "--json", "-")[1])
        assert {"name": "se_mobilenet", "baseline": "mobilenet"}.items() <= next(
            one for one in found if one["name"] == "se_mobilenet"
        ).items()

    def test_show(self, selab):
        _, out, _ = selab("show", "se_resnet50")
        assert "stage2.0" in out
        assert "3.87 GFLOPs" in out
        assert "Table 2" in out
        assert max(map(len, out.splitlines())) <= 80

    def test_show_how_blocks_run(self, selab):
        status, out, _ = selab("show", "se_resnet18", "--runtime")
        assert status == 0
        assert "SE blocks of se_resnet18 as they run: cpu, batch 1, fp32, contiguous" in out
        assert len([line for line in out.splitlines() if "join, in place" in line]) == 8
        status, out, _ = selab("show", "resnet18", "--runtime")
        assert (status, out.strip()) == (
            0,
            "resnet18: has no SE block; there is nothing that selab.fuse would run otherwise",
        )
        _, out, _ = selab("show", "resnet18+block=eca", "--runtime")
        assert "its blocks are of another kind" in " ".join(out.split())
        _, out, _ = selab("show", "se_resnet18", "--runtime", "--dtype", "bf16")
        assert "in place" not in out
        _, out, _ = selab("show", "se_resnet50_max", "--runtime", "--json", "-")
        assert {one["reason"] for one in json.loads(out)} == {"squeeze 'max' has the reference alone"}

    def test_show_as_json(self, selab):
        found = json.loads(selab("show", "se_resnet50", "--json", "-")[1])
        assert len(found["insertions"]) == 16
        assert found["se"]["bias"] is True

    def test_schema_describes_a_record(self, selab):
        schema = json.loads(selab("schema")[1])
        assert "cost" in schema["$defs"]["Record"]["properties"]


class TestCount:
    def test_one(self, selab):
        status, out, _ = selab("count", "--arch", "se_mobilenet")
        assert status == 0
        for text in ("4.712 M", "571.9 M", "squeeze", "BatchNorm, 2 per element", "not explained"):
            assert text in out
        assert max(map(len, out.splitlines())) <= 80

    def test_several(self, selab):
        _, out, _ = selab("count", "--arch", "small_cnn", "--arch", "se_small_cnn")
        assert "small_cnn" in out
        assert "1.252 M" in out

    @pytest.mark.parametrize("by", ["operator", "module"])
    def test_shares_sum_to_the_whole(self, selab, by):
        found = json.loads(selab("count", "--arch", "se_small_cnn", "--by", by, "--json", "-")[1])["cost"]
        shares = found[f"by_{by}"].values()
        assert sum(share["macs"] for share in shares) == found["macs"]["all"]
        assert sum(share["bytes"] for share in shares) == found["bytes"]

    def test_records(self, selab, tmp_path):
        out = tmp_path / "cost"
        assert selab("count", "--arch", "small_cnn", "--out", out)[0] == 0
        found = msgspec.json.decode((out / "small_cnn.json").read_bytes(), type=Record)
        assert found.kind == "count"
        status, _, error = selab("count", "--arch", "small_cnn", "--out", out)
        assert status == 1
        assert "exists; give --replace" in one_line(error)

    def test_no_network_named(self, selab):
        status, _, error = selab("count")
        assert status == 2
        assert "--all" in error


@pytest.mark.usefixtures("quick_plans")
class TestProfile:
    def test_the_record_holds_what_was_promised(self, selab, toy, tmp_path):
        status, out, error = selab(
            "profile", "--arch", f"{toy}:se_toy", "--out", tmp_path / "r", "--json", tmp_path / "j"
        )
        assert status == 0, error
        (path,) = (tmp_path / "r").rglob("*.json")
        found = json.loads(path.read_text())
        for key in RECORD_KEYS:
            value = found
            for part in key.split("."):
                assert part in value, key
                value = value[part]
        assert found == json.loads((tmp_path / "j").read_text())
        assert found["complete"] is True
        assert (found["latency_all_cores"] != {}) == (len(os.sched_getaffinity(0)) > 1)
        for text in ("se_toy against toy", "parameters", "forward", "saved for backward", "record: "):
            assert text in out
        assert max(map(len, out.splitlines()[:20])) <= 80

    def test_json_alone_on_standard_output(self, selab, toy, tmp_path):
        options = ["--phase", "forward", "--threads", 1, "--out", tmp_path / "r", "--json", "-"]
        found = json.loads(selab("profile", "--arch", f"{toy}:se_toy", *options)[1])
        assert list(found["latency"]) == ["forward"]
        assert found["latency_all_cores"] == {}

    def test_no_color_and_pipes(self, selab, toy, tmp_path, monkeypatch):
        monkeypatch.setenv("NO_COLOR", "1")
        options = ["--phase", "forward", "--threads", 1, "--out", tmp_path / "r"]
        _, out, error = selab("profile", "--arch", f"{toy}:se_toy", *options)
        assert "\x1b" not in out + error

    def test_a_picture_of_the_output(self, selab, toy, tmp_path):
        options = ["--phase", "forward", "--threads", 1, "--out", tmp_path / "r", "--svg", tmp_path / "out.svg"]
        assert selab("profile", "--arch", f"{toy}:se_toy", *options)[0] == 0
        assert "se_toy" in (tmp_path / "out.svg").read_text()

    def test_an_existing_record_is_kept_unless_asked(self, selab, toy, tmp_path):
        words = ["profile", "--arch", f"{toy}:se_toy", "--phase", "forward", "--threads", 1, "--out", tmp_path / "r"]
        assert selab(*words)[0] == 0
        (path,) = (tmp_path / "r").rglob("*.json")
        before = path.read_bytes()
        status, _, error = selab(*words)
        assert status == 1
        assert "exists; give --replace" in one_line(error)
        assert path.read_bytes() == before
        assert selab(*words, "--replace")[0] == 0
        assert path.read_bytes() != before

    def test_out_of_memory_is_a_row(self, selab, toy, tmp_path):
        options = ["--batch", 10**9, "--threads", 1, "--out", tmp_path / "r"]
        status, out, _ = selab("profile", "--arch", f"{toy}:se_toy", *options)
        assert status == 0
        assert "no result: out of memory" in out
        assert "parameters" in out
        (path,) = (tmp_path / "r").rglob("*.json")
        found = json.loads(path.read_text())
        assert "out of memory" in found["latency"]["forward"]["error"]
        assert found["cost"]["params"] > 0

    @pytest.mark.parametrize(
        ("variant", "message"),
        [("nan", "toy.toml:nan: its output holds NaN"), ("broken", "toy.toml: variants.broken: ")],
    )
    def test_networks_that_cannot_be_measured(self, selab, toy, tmp_path, variant, message):
        status, _, error = selab("profile", "--arch", f"{toy}:{variant}", "--out", tmp_path / "r")
        assert status == 1
        assert message in one_line(error)
        assert not list((tmp_path / "r").rglob("*.json"))

    def test_a_phase_that_fails_in_training_is_a_row(self, selab, toy, tmp_path):
        toy.write_text(toy.read_text().replace("[3, 16, 16]", "[3, 5, 5]"))
        module = toy.with_name("toy_networks.py")
        module.write_text(module.read_text().replace("nn.Linear(16 * 12 * 12", "nn.BatchNorm1d(16), nn.Linear(16"))
        status, out, error = selab("profile", "--arch", f"{toy}:se_toy", "--threads", 1, "--out", tmp_path / "r")
        assert status == 0, error
        assert "backward, 1 thr: no result: backward in train mode fails: Expected more than 1 value" in " ".join(
            out.split()
        )
        assert "memory of se_toy: a pass for the memory fails" in " ".join(out.split())

    def test_outputs_are_tried_before_anything_is_measured(self, selab, toy, tmp_path):
        words = ["profile", "--arch", f"{toy}:se_toy", "--out", tmp_path / "r"]
        folder = tmp_path / "folder.svg"
        folder.mkdir()
        for option in ("--svg", "--json"):
            status, _, error = selab(*words, option, folder)
            assert status == 1
            assert "is a folder; name a file in it" in one_line(error)
        assert not (tmp_path / "r").exists()

    def test_another_baseline_has_its_own_record(self, selab, toy, tmp_path):
        words = ["profile", "--threads", 1, "--phase", "forward", "--out", tmp_path / "r", "--arch", f"{toy}:se_toy"]
        assert selab(*words)[0] == 0
        assert selab(*words, "--baseline", f"{toy}:se_toy")[0] == 0
        names = sorted(path.name.split(".")[0] for path in (tmp_path / "r").rglob("*.json"))
        assert names == ["se_toy", "se_toy-vs-se_toy"]

    def test_the_command_repeats_the_record(self, selab, toy, tmp_path):
        words = ["--batch", 2, "--threads", 1, "--phase", "forward", "--channels-last", "--seed", 3]
        found = json.loads(
            selab("profile", "--arch", f"{toy}:se_toy", *words, "--out", tmp_path / "r", "--json", "-")[1]
        )
        assert found["command"].startswith(f"selab profile --arch {toy}:se_toy ")
        asked = set(found["command"].split()[4:])
        assert asked == set(map(str, words))

    def test_interrupted_in_process(self, selab, toy, tmp_path):
        status, _, error = selab("profile", "--arch", f"{toy}:slow", "--threads", 1, "--out", tmp_path / "r")
        assert status == 1
        assert "interrupted; what was measured until then is in" in one_line(error)
        (path,) = (tmp_path / "r").rglob("*.json")
        assert path.name.endswith(".partial.json")
        found = msgspec.json.decode(path.read_bytes(), type=Record)
        assert not found.complete
        assert found.cost.params > 0


class TestInterruption:
    def test_control_c_in_a_shell(self, toy, tmp_path):
        words = ["profile", "--arch", f"{toy}:se_toy", "--out", tmp_path / "r"]
        running = subprocess.Popen(
            [sys.executable, "-m", "selab", *map(str, words)],
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for line in running.stderr:
            if line.startswith("forward"):
                break
        running.send_signal(signal.SIGINT)
        _, error = running.communicate(timeout=60)
        assert running.returncode == 1
        assert "interrupted; what was measured until then is in" in one_line(error)
        (path,) = (tmp_path / "r").rglob("*.json")
        assert path.name.endswith(".partial.json")
        assert not list((tmp_path / "r").rglob(".*"))


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
    def test_one_clear_line(self, selab, words, message):
        status, out, error = selab(*words)
        assert status == 1
        assert out == ""
        assert message in one_line(error)

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
    def test_no_cuda(self, selab):
        status, _, error = selab("profile", "--arch", "se_mobilenet", "--device", "cuda")
        assert status == 1
        assert "--device cuda: " in one_line(error)

    @pytest.mark.parametrize(
        "words",
        [
            ["profile", "--arch", "se_mobilenet", "--batch", 0],
            ["profile", "--arch", "se_mobilenet", "--dtype", "int8"],
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
    def test_a_malformed_toml_names_file_and_key(self, selab, toy, old, new, message):
        toy.write_text(toy.read_text().replace(old, new))
        status, _, error = selab("count", "--arch", f"{toy}:se_toy")
        assert status == 1
        line = one_line(error)
        assert "toy.toml: " in line
        assert message in line

    def test_a_folder_that_cannot_be_written(self, selab, tmp_path):
        (tmp_path / "file").write_text("in the way")
        status, _, error = selab("profile", "--arch", "se_small_cnn", "--out", tmp_path / "file" / "r")
        assert status == 1
        assert "cannot be written: Not a directory; name a folder that can" in one_line(error)

    def test_a_reader_that_leaves(self):
        done = subprocess.run(
            f"{sys.executable} -m selab archs --json - | head -1",
            shell=True,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.stderr == ""


class TestTables:
    @pytest.mark.parametrize(
        ("name", "expected"), [("paper-2", "3.87 GFLOPs"), ("paper-3", "572 MFLOPs"), ("mobile", "")]
    )
    def test_rendered_from_facts(self, selab, name, expected):
        status, out, _ = selab("table", name, "--format", "markdown")
        assert status == 0
        assert expected in out
        assert out.startswith("### ")

    def test_a_tampered_record_is_refused(self, selab, toy, quick_plans, tmp_path):
        words = ["profile", "--arch", f"{toy}:se_toy", "--phase", "forward", "--threads", 1, "--out", tmp_path / "r"]
        assert selab(*words)[0] == 0
        (path,) = (tmp_path / "r").rglob("*.json")
        found = json.loads(path.read_text())
        assert selab("table", "latency", "--profiles", path.parent)[0] == 0
        found["latency"]["forward"]["baseline_s"] *= 0.9
        path.write_text(json.dumps(found))
        status, _, error = selab("table", "latency", "--profiles", path.parent)
        assert status == 1
        assert "baseline_s is stored as" in one_line(error)
        found["schema"] = "selab.profile/0"
        path.write_text(json.dumps(found))
        assert types.SCHEMA in one_line(selab("table", "latency", "--profiles", path.parent)[2])


NETWORK = """
import torch
from torch import nn

print("this module was imported")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.separable = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.Conv2d(16, 32, 1), nn.ReLU())
        self.fc = nn.Linear(32, 10)

    def forward(self, x):
        print("forward")
        return self.fc(self.separable(self.stem(x)).mean((2, 3)))
"""


@pytest.fixture
def network(tmp_path):
    path = tmp_path / "network.py"
    path.write_text(NETWORK)
    return f"{path}:Net"


class TestChanges:
    def test_blocks_of_one_line_are_counted_against_the_network_without(self, selab):
        status, out, _ = selab("count", "--arch", "resnet18", "--se", "reduction=8,stages=2-3", "--json", "-")
        record = json.loads(out)
        assert status == 0
        assert (record["arch"], record["baseline"]) == ("resnet18+reduction=8,stages=2-3", "resnet18")
        extra = sum(2 * (2 * c * c // 8) + 2 * (c + c // 8) for c in (64, 128))
        assert record["cost"]["params"] - record["baseline_cost"]["params"] == extra
        assert [one["path"] for one in record["insertions"]] == ["stage2.0", "stage2.1", "stage3.0", "stage3.1"]

    def test_the_command_in_the_record_asks_for_the_same(self, selab):
        _, out, _ = selab("count", "--arch", "se_resnet18", "--se", "block=eca", "--json", "-")
        first = json.loads(out)
        _, again, _ = selab(*shlex.split(first["command"])[1:], "--json", "-")
        assert json.loads(again)["cost"] == first["cost"]
        assert first["insertions"][0]["block"] == "eca"

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--se", "reduction=8,"], "--se reduction=8,: character 13: expected KEY=VALUE"),
            (["--se", "redaction=8"], "redaction: unknown key; did you mean reduction"),
            (["--se", "block=sea"], "block 'sea': no such block; did you mean se"),
            (["--se", "stages=7"], "stages: 7: sites lie in stages 2, 3, 4, 5"),
            (["--insert", "stage2..conv1"], "pattern 'stage2..conv1': character 8: a name is missing here"),
            (["--insert", "stage2.***"], "character 8: [*][*] stands alone between dots"),
            (["--insert", "stag2.0"], "matches no module of ResNet; site groups: residual; did you mean stage2.0"),
        ],
    )
    def test_mistakes(self, selab, options, message):
        status, _, error = selab("count", "--arch", "resnet18", *options)
        assert status == 1
        assert re.search(message, one_line(error)), error

    def test_an_input_that_is_none(self, selab):
        status, _, error = selab("count", "--arch", "resnet18", "--input", "3x224")
        assert status == 2
        assert "is not CxHxW" in " ".join(error.split())


class TestAnybodysNetwork:
    def test_a_file_s_network_is_counted_and_its_prints_are_not_ours(self, selab, network):
        status, out, error = selab("count", "--arch", network, "--insert", "auto", "--input", "3x16x16", "--json", "-")
        record = json.loads(out)
        assert status == 0
        assert f"running code from {network.rpartition(':')[0]}" in error
        assert "auto: 1 site found: separable.2; `selab sites` shows them" in error
        assert "this module was imported" in error
        assert record["arch"] == f"{network}+sites=auto"
        # 32 channels, reduction 16, with biases.
        assert record["cost"]["params"] - record["baseline_cost"]["params"] == 2 * 32 * 2 + 32 + 2

    def test_the_tree_shows_what_would_be_done_and_why(self, selab, network):
        status, out, _ = selab("sites", "--arch", network, "--insert", "auto", "--input", "3x16x16")
        assert status == 0
        assert "← SE 32→2, 162 params" in out
        assert "auto: separable.2: after the depthwise-separable block separable" in out

    def test_the_tree_of_a_network_of_ours(self, selab):
        status, out, _ = selab("sites", "--arch", "resnet18", "--json", "-")
        sites = {one["path"]: one for one in json.loads(out)}
        assert status == 0
        assert sites["stage2.0"]["groups"] == ["residual"]

    def test_without_a_site_nothing_is_guessed(self, selab, network):
        status, _, error = selab("count", "--arch", network, "--se", "reduction=4")
        assert status == 1
        assert "sites: missing; name a site group or a pattern, or give --insert" in one_line(error)

    def test_a_module_that_raises_shows_its_own_error(self, selab, tmp_path):
        path = tmp_path / "broken.py"
        path.write_text("weights = {}\nscale = weights['stem']\n")
        status, _, error = selab("count", "--arch", f"{path}:Net")
        assert status == 1
        line = one_line(error)
        assert "KeyError: 'stem'" in line
        assert "broken.py, line 2" in line or "broken.py:2" in line, line


class TestOptionsThatDoNothing:
    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["profile", "--arch", "se_small_cnn", "--cold"], "flushes a GPU's cache"),
            (["profile", "--arch", "se_small_cnn", "--svg", "x.txt"], "ends in .svg"),
            (["count", "--all", "--arch", "resnet50"], "counts the catalog"),
        ],
    )
    def test_are_refused(self, selab, words, message):
        status, _, error = selab(*words)
        assert status == 2
        assert message in " ".join(error.replace("│", " ").split())

    def test_a_callable_s_name_is_no_emoji(self, selab, tmp_path):
        path = tmp_path / "bad.py"
        path.write_text("raise RuntimeError('no licence key')\n")
        status, _, error = selab("count", "--arch", f"{path}:x")
        assert status == 1
        assert f"{path}:x" in one_line(error)

    def test_an_error_of_changes_does_not_point_into_the_catalog_s_file(self, selab):
        status, _, error = selab("count", "--arch", "resnet18", "--se", "reduction=1000")
        assert status == 1
        assert one_line(error).startswith("error: resnet18+reduction=1000: stage2.0")


class TestLooksOfTables:
    def test_formats(self, selab):
        texts = {look: selab("table", "reduction", "--format", look) for look in ("csv", "latex", "markdown", "json")}
        assert all(status == 0 for status, _, _ in texts.values())
        rows = list(csv.reader(texts["csv"][1].splitlines()))
        assert rows[0][:3] == ["table", "name", "params printed"]
        assert len(set(rows[0])) == len(rows[0])
        assert [row[1] for row in rows[1:]][-1] == "resnet50"
        assert "\\toprule" in texts["latex"][1]
        assert "se\\_resnet50\\_r2 & 45.7M & 45.73 M & = &" in texts["latex"][1]
        assert json.loads(texts["json"][1])[0]["rows"][0][0] == "se_resnet50_r2"

    def test_all_needs_a_folder(self, selab):
        status, _, error = selab("table", "all")
        assert status == 2
        assert "a folder of files; name it" in " ".join(error.replace("│", " ").split())


class TestPlot:
    def test_a_picture_is_written(self, selab, tmp_path):
        path = tmp_path / "accuracy.svg"
        status, out, _ = selab("plot", "accuracy", "--arch", "se_mobilenet", "--out", str(path))
        assert (status, out) == (0, f"picture: {path}\n")
        assert "se_mobilenet" in path.read_text()

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["cost"], "no records"),
            (["accuracy", "--x", "mac"], "--x mac: no such quantity; did you mean macs"),
            (["costs"], "plot costs: no such picture; did you mean cost"),
            (["accuracy", "--out", "a.pdf"], ".pdf; a picture ends in .svg or .png"),
        ],
    )
    def test_mistakes(self, selab, words, message):
        status, _, error = selab("plot", *words)
        assert status == 1
        assert message in one_line(error)


class TestWeights:
    def test_the_list_says_what_is_called_how(self, selab):
        status, out, _ = selab("weights", "list", "--json", "-")
        found = {(one["arch"], one["source"]): one["model"] for one in json.loads(out)}
        assert status == 0
        assert found["resnet50_v1_5", "torchvision"] == "resnet50"
        assert found["se_resnet50", "cadene"] == "se_resnet50"
        assert ("resnet50", "torchvision") not in found

    def test_another_network_of_the_same_shapes_is_refused(self, selab, tmp_path):
        source = tmp_path / "resnet50.safetensors"
        safetensors.torch.save_file({"fc.weight": torch.zeros(1)}, source)
        target = tmp_path / "ours.safetensors"
        status, _, error = selab("weights", "convert", source, target, "--from", "torchvision", "--arch", "resnet50")
        assert status == 1
        assert "strides" in one_line(error)
        assert not target.exists()

    def test_a_state_dict_of_something_else_loads_nothing(self, selab, tmp_path):
        source = tmp_path / "odd.safetensors"
        safetensors.torch.save_file({"fc.weight": torch.zeros(1)}, source)
        target = tmp_path / "ours.safetensors"
        status, _, error = selab("weights", "convert", source, target, "--from", "torchvision", "--arch", "resnet18")
        assert status == 1
        assert "missing" in one_line(error)
        assert not target.exists()


TINY_TOML = """
family = "tiny"
source = "this test"
builder = "tiny_networks:build"
input_chw = [3, 32, 32]
num_classes = 10
[variants.tiny]
title = "Tiny"
[variants.se_tiny]
title = "Tiny with SE"
baseline = "tiny"
[variants.se_tiny.se]
sites = ["0"]
reduction = 4
bias = true
"""

TINY_MODULE = """
from torch import nn


def build(num_classes):
    conv = nn.Conv2d(3, 16, 5, stride=4)
    return nn.Sequential(conv, nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, num_classes))
"""


@pytest.fixture
def tiny(tmp_path):
    (tmp_path / "tiny_networks.py").write_text(TINY_MODULE)
    path = tmp_path / "tiny.toml"
    path.write_text(TINY_TOML)
    yield path
    sys.modules.pop("tiny_networks", None)


class TestAccuracy:
    def test_a_comparison_from_the_shell(self, selab, tiny, tmp_path):
        words = ["compare", f"{tiny}:tiny", f"{tiny}:se_tiny", "--data", "synthetic", "--seeds", 1, "--epochs", 1]
        status, out, error = selab(*words, "--batch", 2000, "--threads", 1, "--no-latency", "--out", tmp_path)
        assert status == 0, error
        assert "top-1: one seed shows no uncertainty; run at least 3" in " ".join(out.split())
        (path,) = tmp_path.glob("*/accuracy/*.json")
        record = json.loads(path.read_text())
        weights = next(tmp_path.glob("runs/se_tiny*/weights.safetensors"))
        status, _, error = selab(*words, "--out", tmp_path)
        assert status == 1
        assert f"{path}: exists" in one_line(error)

        words = ["eval", "--weights", weights, "--data", "synthetic"]
        status, out, _ = selab(*words, "--arch", f"{tiny}:se_tiny", "--json", "-")
        assert json.loads(out)["top1_correct"] == record["seeds"][0]["variant"]["test"]["top1_correct"]
        status, _, error = selab(*words, "--arch", f"{tiny}:tiny")
        assert status == 1
        assert one_line(error)

        status, out, _ = selab("plot", "curves", "--record", path, "--out", tmp_path / "curves.svg")
        assert (status, out) == (0, f"picture: {tmp_path / 'curves.svg'}\n")

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["compare", "small_cnn"], "is a baseline itself"),
            (["compare", "small_cn"], "no such architecture; did you mean small_cnn"),
            (["train", "--arch", "small_cnn", "--recipe", "cifar_shor"], "no such recipe; did you mean cifar_short"),
            (
                ["train", "--arch", "small_cnn", "--seed", 2**64],
                "seed: 18446744073709551616; allowed are 0 to 2^64 - 1",
            ),
            (["train", "--arch", "small_cnn", "--seed", -1], "seed: -1; allowed are 0 to 2^64 - 1"),
            (["eval", "--arch", "small_cnn", "--weights", "none.pth", "--data", "synthetic"], "none.pth"),
            (
                ["train", "--arch", "small_cnn", "--data", "imagenet", "--recipe", "cifar_short", "--data-dir", "none"],
                "--recipe cifar_short: is for images in memory; for image folders, such as imagenet, use one of",
            ),
            (
                ["compare", "se_small_cnn", "--recipe", "imagenet_senet", "--data-dir", "none"],
                "--recipe imagenet_senet: is for image folders; for images in memory, such as cifar10, use one of",
            ),
        ],
    )
    def test_mistakes(self, selab, words, message):
        status, _, error = selab(*words)
        assert status == 1
        assert message in one_line(error)

    def test_several_networks_with_one_baseline(self, selab, tiny, tmp_path):
        names = [f"{tiny}:{name}" for name in ("tiny", "se_tiny", "se_tiny+reduction=2")]
        common = ["--data", "synthetic", "--seeds", 1, "--epochs", 1, "--batch", 2000, "--threads", 1, "--no-latency"]
        common += ["--out", tmp_path]
        status, out, error = selab("compare", *names, *common, "--json", tmp_path / "both.json")
        assert status == 0, error
        paths = [line.removeprefix("record: ") for line in out.splitlines() if line.startswith("record: ")]
        records = [json.loads((tmp_path / path).read_text()) for path in paths]
        assert [record["arch"] for record in records] == ["se_tiny", "se_tiny+reduction=2"]
        assert json.loads((tmp_path / "both.json").read_text()) == records
        # The baseline is trained once.
        assert records[0]["seeds"][0]["baseline"] == records[1]["seeds"][0]["baseline"]
        assert len(list(tmp_path.glob("runs/tiny.*"))) == 1
        # What is finished is shown again.
        status, again, error = selab("compare", *names, *common)
        assert status == 0
        assert again == out
        assert f"{paths[0]}: already finished; more --seeds extend it" in " ".join(error.split())

    def test_a_network_for_other_images_is_found_out_before_training(self, selab, tmp_path):
        (tmp_path / "nets.py").write_text(
            "from torch import nn\n"
            "def plain():\n    return nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))\n"
            "def hundred():\n    return nn.Sequential(nn.Flatten(), nn.Linear(3072, 100))\n"
        )
        names = [f"{tmp_path / 'nets.py'}:{name}" for name in ("plain", "hundred")]
        status, _, error = selab("compare", *names, "--data", "synthetic", "--no-latency", "--out", tmp_path / "out")
        assert status == 1
        assert "tells 100 classes apart" in error
        assert not list(tmp_path.glob("out/runs/*"))

    def test_half_precision_of_the_gpu_is_refused_on_the_cpu(self, selab):
        status, _, error = selab("train", "--arch", "small_cnn", "--data", "synthetic", "--amp", "fp16")
        assert status == 1
        assert "--amp fp16: is for --device cuda; on a CPU take bf16" in one_line(error)

    @pytest.mark.parametrize(
        "words",
        [
            ["train", "--arch", "small_cnn"],
            ["compare", "se_small_cnn"],
            ["eval", "--arch", "small_cnn", "--weights", "none.pth"],
        ],
    )
    def test_the_file_of_the_result_is_tried_before_anything_is_done(self, selab, tmp_path, words):
        status, _, error = selab(*words, "--data-dir", tmp_path, "--no-download", "--json", tmp_path)
        assert status == 1
        assert f"{tmp_path}: is a folder; name a file in it" in one_line(error)

    def test_interrupted_while_the_networks_are_timed(self, selab, tmp_path, monkeypatch, compared_small_cnn):
        from selab.experiments.compare import Comparison

        def interrupt(*_):
            raise KeyboardInterrupt

        def trained(self, *_):
            save_accuracy_record(compared_small_cnn([80.0], [81.0]), self.path)

        monkeypatch.setattr(Comparison, "run", trained)
        monkeypatch.setattr(Comparison, "measure", interrupt)
        status, out, error = selab("compare", "se_small_cnn", "--data", "synthetic", "--seeds", 1, "--out", tmp_path)
        assert (status, out) == (1, "")
        (path,) = tmp_path.glob("*/accuracy/*.json")
        assert f"interrupted; the comparison is in {path}, times are missing" in one_line(error)
        assert f"`selab table accuracy --profiles {path.parents[1]}`" in one_line(error)

    def test_data_that_is_not_there(self, selab, tmp_path):
        words = ["train", "--arch", "small_cnn", "--data-dir", tmp_path, "--no-download", "--out", tmp_path]
        status, _, error = selab(*words)
        assert status == 1
        assert "cifar-10-binary.tar.gz" in one_line(error)

    @pytest.mark.parametrize(
        ("words", "name"),
        [
            (["train", "--arch", "small_cnn"], "cifar_short_plain"),
            (["train", "--arch", "vgg16_cifar"], "cifar_short"),
            (["compare", "small_cnn", "resnet20_cifar"], "cifar_short_plain"),
            (["compare", "resnet20_cifar", "small_cnn"], "cifar_short"),
        ],
    )
    def test_the_recipe_of_who_names_none(self, selab, tmp_path, monkeypatch, words, name):
        def tell(variant, data, recipe, **_):
            raise SelabError(recipe.name)

        for place in ("selab.training.train.train", "selab.experiments.compare.train"):
            monkeypatch.setattr(place, tell)
        _, _, error = selab(*words, "--data", "synthetic", "--out", tmp_path)
        assert one_line(error) == f"error: {name}"


OWN_RECIPE = """
[recipes.own]
title = "Own"
source = "this test"
where = "above"
lr = 0.01
momentum = 0.9
weight_decay = 0.0
batch = 4
epochs = 1
schedule = "constant"
image = { train_size = 32, test_resize = 32, test_crop = 32, pixel_jitter = 0, std = [1, 1, 1] }
[recipes.memory]
title = "For the other kind of data"
source = "this test"
where = "above"
lr = 0.01
momentum = 0.9
weight_decay = 0.0
batch = 4
epochs = 1
schedule = "constant"
flip = true
"""


class TestImageFolders:
    @pytest.fixture
    def words(self, tmp_path, tiny):
        """The options of a data set of two classes; one of its test images cannot be read, and one is grey."""
        for split in ("train", "val"):
            for number in range(6):
                path = tmp_path / "data" / split / "ab"[number % 2] / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (48, 40), (40 * number, 0, 90)).save(path)
        (tmp_path / "data/val/a/broken.png").write_bytes(b"no image")
        Image.new("L", (48, 40), 7).save(tmp_path / "data/val/a/grey.png")
        (tmp_path / "own.toml").write_text(OWN_RECIPE)
        return ["--data", "folder", "--data-dir", tmp_path / "data", "--workers", 0]

    @pytest.fixture
    def trained(self, selab, tmp_path, tiny, words):
        """Its weights, and what the training said."""
        more = ["--recipe", tmp_path / "own.toml:own", "--threads", 1, "--out", tmp_path / "out"]
        status, out, error = selab("train", "--arch", f"{tiny}:tiny", *words, *more)
        assert status == 0, error
        return next((tmp_path / "out").glob("**/weights.safetensors")), out

    def test_weights_bring_their_preparation(self, selab, tiny, words, trained):
        weights, out = trained
        assert "recipe: own\n" in out
        told = "images read: 1 left out (val/a/broken.png), 1 grey, 0 CMYK\n"
        assert out.endswith(told)
        training = json.loads((weights.parent / "training.json").read_text())
        assert training["problems"]["corrupt"] == {"count": 1, "first": ["val/a/broken.png"]}

        words = ["eval", "--arch", f"{tiny}:tiny", "--weights", weights, *words]
        status, out, _ = selab(*words, "--json", "-")
        assert status == 0
        found = json.loads(out)
        assert {key: found[key] for key in training["test"]} == training["test"]
        assert (found["prepared"]["std"], found["prepared_by"]) == ([1, 1, 1], "as trained")
        assert found["data_sha256"] == training["data_sha256"]
        low, high = found["top1_interval_pct"]
        assert 0 <= low < 100 * found["top1_correct"] / 7 < high <= 100
        assert found["top5_interval_pct"] is None
        assert found["problems"] == training["problems"]

        _, out, _ = selab(*words)
        prepared = "images: resize 32, crop 32, bilinear, mean 0.485 0.456 0.406, std 1 1 1"
        assert f"{prepared} (as trained)\n" in out
        assert out.endswith(told)

    def test_options_come_before_a_recipe_and_a_recipe_before_the_weights(self, selab, tiny, words, trained, tmp_path):
        words = ["eval", "--arch", f"{tiny}:tiny", "--weights", trained[0], *words]
        _, out, _ = selab(*words, "--resize", 40, "--crop", 36)
        assert (
            "images: resize 40, crop 36, bilinear, mean 0.485 0.456 0.406, std 1 1 1 (as trained, --resize, --crop)"
            in out
        )
        _, out, _ = selab(*words, "--recipe", "imagenet_senet_299", "--crop", 64)
        assert "images: resize 352, crop 64, " in out
        assert "(recipe imagenet_senet_299, --crop)" in out
        # A file that says nothing.
        state = safetensors.torch.load_file(trained[0])
        safetensors.torch.save_file(state, tmp_path / "bare.safetensors")
        words[words.index(trained[0])] = tmp_path / "bare.safetensors"
        _, out, _ = selab(*words)
        assert "images: resize 256, crop 224, bilinear, mean 0.485 0.456 0.406, std 0.229 0.224 0.225 (default)" in out

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (["--crop", 33], "--crop 33: does not fit into images resized to 32; give a larger --resize"),
            (["--recipe", "cifar_short"], "--recipe cifar_short: is for images in memory"),
            (["--recipe", "own.toml:memory"], "--recipe memory: is for images in memory"),
            (["--data", "synthetic", "--crop", 20], "are for image folders; synthetic needs none of them"),
            (["--data", "synthetic", "--classes-file", "x"], "--classes-file x: is for image folders"),
            (["--classes-file", "none.txt"], "none.txt: cannot be read"),
        ],
    )
    def test_preparations_that_cannot_be(self, selab, tiny, words, trained, tmp_path, monkeypatch, changes, message):
        monkeypatch.chdir(tmp_path)
        status, _, error = selab("eval", "--arch", f"{tiny}:tiny", "--weights", trained[0], *words, *changes)
        assert status == 1
        assert message in error.splitlines()[-1]

    def test_a_comparison_tells_what_was_left_out(self, selab, tiny, words, tmp_path):
        more = ["--recipe", tmp_path / "own.toml:own", "--seeds", 1, "--no-latency", "--out", tmp_path / "out"]
        status, out, error = selab("compare", f"{tiny}:se_tiny", *words, *more)
        assert status == 0, error
        assert "images read: 1 left out (val/a/broken.png), 1 grey, 0 CMYK" in out
