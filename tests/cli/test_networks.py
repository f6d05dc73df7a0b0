"""The commands about networks: archs, show, sites, count."""

import json
import re
import shlex

import msgspec
import pytest

from selab.records.types import Record


class TestLooking:
    def test_archs(self, selab):
        status, out, _ = selab("archs")
        assert status == 0
        assert "se_mobilenet" in out
        assert max(map(len, out.splitlines())) <= 80

    def test_archs_by_a_part_of_their_name_or_a_pattern(self, selab):
        names = [one["name"] for one in json.loads(selab("archs", "resnet20", "--json", "-")[1])]
        assert {"resnet20_cifar", "se_resnet20_cifar"} < set(names)
        assert all("resnet20" in name for name in names)
        names = [one["name"] for one in json.loads(selab("archs", "se_small*", "--json", "-")[1])]
        assert names
        assert all(name.startswith("se_small") for name in names)
        status, _, error = selab("archs", "resnt")
        assert status == 1
        assert "archs resnt: no such architecture" in error

    def test_archs_does_not_break_names(self, selab):
        names = [one["name"] for one in json.loads(selab("archs", "--json", "-")[1])]
        shown = [line.split()[0] for line in selab("archs")[1].splitlines() if line.strip()]
        assert set(names) <= set(shown)

    @pytest.mark.parametrize("command", [["archs"], ["show", "se_small_cnn"], ["count", "--arch", "small_cnn"]])
    def test_a_json_that_cannot_be_written_is_refused_first(self, selab, tmp_path, command):
        status, out, error = selab(*command, "--json", tmp_path)
        assert (status, out) == (1, "")
        assert "is a folder; name a file in it" in error

    def test_archs_as_json(self, selab):
        found = json.loads(selab("archs", "--json", "-")[1])
        assert {"name": "se_mobilenet", "baseline": "mobilenet"}.items() <= next(
            one for one in found if one["name"] == "se_mobilenet"
        ).items()

    def test_show(self, selab):
        _, out, _ = selab("show", "se_resnet50")
        assert "stage2.0" in out
        assert "3.87 GFLOPs" in out
        assert "28.09 M parameters, 3.866 GFLOPs" in " ".join(out.split())
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
        assert {one["reason"] for one in json.loads(out)} == {"unsupported squeeze: max"}

    def test_show_as_json(self, selab):
        found = json.loads(selab("show", "se_resnet50", "--json", "-")[1])
        assert len(found["insertions"]) == 16
        assert found["se"]["bias"] is True

    def test_schema_describes_a_record(self, selab):
        schema = json.loads(selab("schema")[1])
        assert "cost" in schema["$defs"]["Record"]["properties"]


class TestCount:
    def test_one(self, selab):
        status, out, _ = selab("count", "--arch", "se_mobilenet", "--explain")
        assert status == 0
        for text in ("4.712 M", "571.9 M", "squeeze", "BatchNorm, 2 per element", "not explained"):
            assert text in out
        assert max(map(len, out.splitlines())) <= 80

    def test_other_counters_only_where_they_are_to_be_explained(self, selab):
        _, out, _ = selab("count", "--arch", "small_cnn")
        assert "Other counters" not in out
        assert "fvcore" not in out
        _, out, _ = selab("count", "--arch", "small_cnn", "--explain")
        assert "fvcore" in out

    def test_without_a_baseline_there_are_no_empty_columns(self, selab):
        found = json.loads(selab("count", "--arch", "small_cnn", "--format", "json")[1])
        for table in found:
            for index, _ in enumerate(table["columns"]):
                assert any(row[index] not in ("", "–") for row in table["rows"]), table["columns"]

    @pytest.mark.parametrize(
        ("look", "start"), [("markdown", "### "), ("csv", "table,"), ("latex", "%"), ("json", "[")]
    )
    def test_formats(self, selab, look, start):
        status, out, _ = selab("count", "--arch", "se_small_cnn", "--format", look)
        assert status == 0
        assert out.startswith(start)

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

    def test_records(self, selab, tmp_path, one_line):
        out = tmp_path / "cost"
        assert selab("count", "--arch", "small_cnn", "--out", out)[0] == 0
        found = msgspec.json.decode((out / "small_cnn.json").read_bytes(), type=Record)
        assert found.kind == "count"
        status, _, error = selab("count", "--arch", "small_cnn", "--out", out)
        assert status == 1
        assert "exists; use --replace" in one_line(error)

    def test_no_network_named(self, selab):
        status, _, error = selab("count")
        assert status == 2
        assert "--all" in error


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
            (["--se", "stages=7"], "stages: 7: sites are in stages 2, 3, 4, 5"),
            (["--insert", "stage2..conv1"], "pattern 'stage2..conv1': character 8: a name is missing here"),
            (["--insert", "stage2.***"], "character 8: [*][*] must be alone between dots"),
            (["--insert", "stag2.0"], "matches no module of ResNet; site groups: residual; did you mean stage2.0"),
        ],
    )
    def test_mistakes(self, selab, options, message, one_line):
        status, _, error = selab("count", "--arch", "resnet18", *options)
        assert status == 1
        assert re.search(message, one_line(error)), error

    def test_an_input_that_is_none(self, selab, one_line):
        status, _, error = selab("count", "--arch", "resnet18", "--input", "3x224")
        assert status == 2
        assert "is not CxHxW" in one_line(error)


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

    def test_many_sites_are_announced_in_one_short_line(self, selab):
        _, _, error = selab("count", "--arch", "resnet50", "--insert", "auto", "--json", "-")
        (line,) = [one for one in error.splitlines() if one.startswith("auto: ")]
        assert line.startswith("auto: 16 sites found: ")
        assert line.endswith(", …; `selab sites` shows them in the network")
        assert len(line) < 160

    @pytest.mark.parametrize(
        ("se", "notes"),
        [
            ("reduction=64", ["note: 3 of 16 blocks squeeze to fewer than 8 channels, the narrowest to 4"]),
            ("reduction=16,divisor=8", []),
            ("reduction=1", ["note: the blocks more than double the network: "]),
        ],
    )
    @pytest.mark.parametrize("command", [["count", "--json", "-"], ["sites", "--depth", 1]])
    def test_unusual_insertions_are_remarked_upon(self, selab, se, notes, command):
        status, _, error = selab(*command, "--arch", "resnet50", "--insert", "residual", "--se", se)
        assert status == 0, error
        found = [line for line in error.splitlines() if line.startswith("note: ")]
        assert len(found) == len(notes)
        assert all(line.startswith(note) for line, note in zip(found, notes, strict=True))

    def test_a_network_of_the_catalog_gets_no_remark(self, selab):
        _, _, error = selab("count", "--arch", "mobilenet_v3_small")
        assert "note: " not in error

    def test_the_depth_of_a_tree(self, selab):
        _, out, _ = selab("sites", "--arch", "resnet18", "--depth", 1)
        assert "stage2" in out
        assert "BasicBlock" not in out
        assert "BasicBlock" in selab("sites", "--arch", "resnet18", "--depth", 2)[1]

    def test_a_list_of_modules_is_a_container(self, selab, tmp_path):
        path = tmp_path / "listed.py"
        path.write_text(
            "from torch import nn\n"
            "class Net(nn.Module):\n"
            "    def __init__(self):\n"
            "        super().__init__()\n"
            "        self.steps = nn.ModuleList([nn.Conv2d(3, 4, 1), nn.ReLU()])\n"
            "        self.unused = nn.Linear(4, 4)\n"
            "    def forward(self, x):\n"
            "        for step in self.steps:\n"
            "            x = step(x)\n"
            "        return x\n"
        )
        _, out, _ = selab("sites", "--arch", f"{path}:Net", "--input", "3x8x8")
        assert "ModuleList  (container)" in out
        assert re.search(r"unused .*does not run", out)

    def test_the_tree_of_a_network_of_ours(self, selab):
        status, out, _ = selab("sites", "--arch", "resnet18", "--json", "-")
        sites = {one["path"]: one for one in json.loads(out)}
        assert status == 0
        assert sites["stage2.0"]["groups"] == ["residual"]

    def test_without_a_site_nothing_is_guessed(self, selab, network, one_line):
        status, _, error = selab("count", "--arch", network, "--se", "reduction=4")
        assert status == 1
        assert "sites: missing; name a site group or a pattern, or give --insert" in one_line(error)

    def test_a_module_that_raises_shows_its_own_error(self, selab, tmp_path, one_line):
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
            (["count", "--all", "--arch", "resnet50"], "cannot be combined with --arch"),
        ],
    )
    def test_are_refused(self, selab, words, message, one_line):
        status, _, error = selab(*words)
        assert status == 2
        assert message in one_line(error)

    def test_a_callable_s_name_is_no_emoji(self, selab, tmp_path, one_line):
        path = tmp_path / "bad.py"
        path.write_text("raise RuntimeError('no licence key')\n")
        status, _, error = selab("count", "--arch", f"{path}:x")
        assert status == 1
        assert f"{path}:x" in one_line(error)

    def test_an_error_of_changes_does_not_point_into_the_catalog_s_file(self, selab, one_line):
        status, _, error = selab("count", "--arch", "resnet18", "--se", "reduction=1000")
        assert status == 1
        assert one_line(error).startswith("error: resnet18+reduction=1000: no site is left: stage2.0")


STEERED = """
from torch import nn

class Steered(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 16, 3, bias=False), nn.Linear(16, 10, bias=False)
        self.branch = nn.Conv2d(16, 16, 1, bias=False)
    def forward(self, x):
        y = self.stem(x)
        y = y + self.branch(y) if y.mean() < 1e9 else y
        return self.head(y.mean((2, 3)))
"""


class TestOnRealTensors:
    """A network in which the values of tensors decide what is computed."""

    @pytest.fixture
    def steered(self, tmp_path):
        path = tmp_path / "steered.py"
        path.write_text(STEERED)
        return ["--arch", f"{path}:Steered", "--input", "3x10x10"]

    @pytest.mark.parametrize(
        "command", [["sites"], ["count"], ["sites", "--insert", "auto"], ["count", "--insert", "stem"]]
    )
    def test_the_message_names_the_option(self, selab, steered, command, one_line):
        status, out, error = selab(*command, *steered)
        assert (status, out) == (1, "")
        assert one_line(error).endswith(
            'values of a tensor (aten::_local_scalar_dense); run it on real tensors: on="cpu", --on cpu'
        )

    def test_sites(self, selab, steered):
        status, out, error = selab("sites", *steered, "--on", "cpu", "--insert", "auto")
        assert status == 0, error
        assert "auto: branch: before the addition in the network" in out
        assert "← SE 16→1, 49 params" in out
        listed = json.loads(selab("sites", *steered, "--on", "cpu", "--json", "-")[1])
        assert {one["path"]: one["output_shape"] for one in listed}["branch"] == [1, 16, 8, 8]

    def test_count_with_the_other_counters(self, selab, steered):
        status, out, error = selab("count", *steered, "--on", "cpu", "--insert", "auto", "--explain", "--json", "-")
        assert status == 0, error
        record = msgspec.json.decode(out, type=Record)
        assert record.command.endswith("--on cpu --input 3x10x10")
        # 8 × 8 positions of 27 and 16 weights for each of 16 channels; the head; SE of 16 → 1 → 16.
        assert record.cost.macs.conv_linear == 64 * 16 * (27 + 16) + 160 + 32
        assert record.cost.params - 33 - 16 == 16 * 27 + 16 * 16 + 160
        assert [counter.remainder for counter in record.cost.counters.values()] == [0] * 4

    def test_profile(self, selab, steered, tmp_path):
        network = ["profile", *steered, "--insert", "branch", "--baseline", steered[1]]
        short = ["--phase", "forward", "--budget", "0.1", "--threads", "1", "--out", tmp_path / "out"]
        status, _, error = selab(*network, *short)
        assert status == 1
        assert "--on cpu" in error
        status, out, error = selab(*network, *short, "--on", "cpu", "--json", "-")
        assert status == 0, error
        record = msgspec.json.decode(out, type=Record)
        assert [one.path for one in record.insertions] == ["branch"]
        assert " --on cpu " in record.command
        assert record.cost.se.blocks == 1

    def test_show(self, selab, steered):
        assert "--on cpu" in selab("show", steered[1], *steered[2:])[2]
        assert selab("show", steered[1], *steered[2:], "--on", "cpu")[0] == 0

    def test_another_place_is_refused(self, selab, steered, one_line):
        status, _, error = selab("sites", *steered, "--on", "meta")
        assert status == 2
        assert "--on" in error
