"""The commands that render records: table, plot."""

import csv
import json

import pytest

from selab.experiments import profiling
from selab.records import types


class TestTables:
    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("paper-2", ("GFLOPs printed", "| se_resnet50 | 28.09 | 3.87 | 3.866 | = |")),
            ("paper-3", ("MFLOPs printed", "| se_mobilenet | 4.7 | 4.712 | = | 572 | 571.9 | = |")),
        ],
    )
    def test_rendered_from_facts(self, selab, name, expected):
        status, out, _ = selab("table", name, "--format", "markdown")
        assert status == 0
        assert all(one in out for one in expected)
        assert out.startswith("### ")

    def test_mobile_networks(self, selab, monkeypatch, committed_costs):
        # The two above count.
        monkeypatch.setattr(profiling, "counted", lambda names: {name: committed_costs[name] for name in names})
        status, out, _ = selab("table", "mobile", "--format", "markdown")
        assert status == 0
        assert "MACs (paper's FLOPs)" in out
        assert out.startswith("### ")

    def test_a_tampered_record_is_refused(self, selab, toy, quick_plans, tmp_path, one_line):
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


class TestLooksOfTables:
    def test_formats(self, selab):
        texts = {look: selab("table", "reduction", "--format", look) for look in ("csv", "latex", "markdown", "json")}
        assert all(status == 0 for status, _, _ in texts.values())
        rows = list(csv.reader(texts["csv"][1].splitlines()))
        assert rows[0][:3] == ["table", "name", "params (M) printed"]
        assert len(set(rows[0])) == len(rows[0])
        assert [row[1] for row in rows[1:]][-1] == "resnet50"
        assert "\\toprule" in texts["latex"][1]
        assert "se\\_resnet50\\_r2 & 45.7 & 45.73 & = &" in texts["latex"][1]
        assert json.loads(texts["json"][1])[0]["rows"][0][0] == "se_resnet50_r2"

    def test_all_needs_a_folder(self, selab, one_line):
        status, _, error = selab("table", "all")
        assert status == 2
        assert "a folder of files; name it" in one_line(error)


class TestFolders:
    @pytest.fixture(autouse=True)
    def no_counting(self, monkeypatch, committed_costs):
        """Every one of these commands would count all networks, which takes ten seconds."""
        monkeypatch.setattr(profiling, "counted", lambda names: {name: committed_costs[name] for name in names})

    @pytest.fixture
    def folder(self, selab, toy, quick_plans, tmp_path):
        words = ["--threads", 1, "--phase", "forward", "--out", tmp_path / "r"]
        assert selab("profile", "--arch", f"{toy}:se_toy", *words)[0] == 0
        (folder,) = (tmp_path / "r").iterdir()
        return folder

    def test_the_only_machine_below_a_folder_is_taken(self, selab, folder, tmp_path):
        for words in (["table", "latency"], ["plot", "added", "--json", "-"]):
            above, own = (selab(*words, "--profiles", one) for one in (folder.parent, folder))
            assert above[:2] == own[:2]

    def test_every_folder_that_is_named_is_shown(self, selab, folder, tmp_path):
        other = tmp_path / "other"
        other.mkdir()
        for path in folder.glob("*.json"):
            record = json.loads(path.read_text())
            record["machine"]["name"] = "other"
            (other / path.name).write_text(json.dumps(record))
        words = ["--profiles", folder, "--profiles", other]
        found = json.loads(selab("table", "latency", *words, "--format", "json")[1])
        text = json.dumps(found)
        assert text.count("se_toy") == 2
        assert folder.name in text
        assert "other" in text

    def test_an_interrupted_record_is_shown_and_marked(self, selab, folder):
        (path,) = folder.glob("*.json")
        record = json.loads(path.read_text())
        path.unlink()
        record["complete"] = False
        partial = path.with_suffix(".partial.json")
        partial.write_text(json.dumps(record))
        status, out, error = selab("table", "latency", "--profiles", folder)
        assert status == 0, error
        assert "se_toy (partial)" in out


class TestBrokenFiles:
    """One file that cannot be read is named in a line and left out; the rest is shown, and the status is 1."""

    @pytest.fixture(autouse=True)
    def no_counting(self, monkeypatch, committed_costs):
        """Every one of these commands would count all networks, which takes ten seconds."""
        monkeypatch.setattr(profiling, "counted", lambda names: {name: committed_costs[name] for name in names})

    @pytest.fixture
    def folder(self, selab, toy, quick_plans, tmp_path):
        words = ["--threads", 1, "--phase", "forward", "--out", tmp_path / "r"]
        assert selab("profile", "--arch", f"{toy}:se_toy", *words)[0] == 0
        (folder,) = (tmp_path / "r").iterdir()
        return folder

    @staticmethod
    def contents(folder):
        (whole,) = (path.read_bytes() for path in folder.glob("*.json"))
        changed = json.loads(whole)
        changed["cost"]["params"] = -5
        return {
            "empty": b"",
            "half": whole[: len(whole) // 2],
            "binary": bytes(range(256)),
            "list": b"[]",
            "changed": json.dumps(changed).encode(),
            "deep": b"[" * 100_000,
        }

    @pytest.mark.parametrize(
        "words", [["table", "latency"], ["table", "report"], ["table", "added"], ["plot", "added"]]
    )
    def test_the_rest_is_shown(self, selab, folder, words):
        show = [*words, "--json", "-", "--profiles", folder]
        status, shown, _ = selab(*show)
        assert status == 0
        contents = self.contents(folder)
        for name, content in contents.items():
            (folder / f"{name}.json").write_bytes(content)
        status, out, error = selab(*show)
        assert (status, out) == (1, shown)
        lines = [line for line in error.splitlines() if not line.startswith("counting ")]
        assert len(lines) == len(contents), error
        for name, line in zip(sorted(contents), lines, strict=True):
            assert line.startswith(f"warning: left out {folder / f'{name}.json'}: ")

    @pytest.mark.parametrize("family", ["tax", "accuracy", "acceptance"])
    def test_of_every_family(self, selab, folder, family):
        show = ["table", "report", "--json", "-", "--profiles", folder]
        shown = selab(*show)[1]
        path = folder / family / ("aa.json" if family == "acceptance" else "x.json")
        path.parent.mkdir()
        path.write_text("{")
        status, out, error = selab(*show)
        assert (status, out) == (1, shown)
        assert error.count("warning: ") == 1
        assert f"warning: left out {path}: " in error
        assert "error" not in error

    def test_files_are_written_with_the_rest(self, selab, folder, tmp_path):
        (folder / "x.json").write_text("{")
        out = tmp_path / "t.md"
        assert selab("table", "latency", "--profiles", folder, "--out", out)[0] == 1
        assert "se_toy" in out.read_text()

    def test_nothing_is_left(self, selab, folder, one_line):
        (path,) = folder.glob("*.json")
        path.write_text("{")
        status, out, error = selab("table", "latency", "--profiles", folder)
        assert (status, out) == (1, "")
        assert one_line(error).startswith(f"error: {path}: not a record: ")


class TestPlot:
    def test_a_picture_is_written_over_only_if_asked(self, selab, tmp_path):
        path = tmp_path / "accuracy.svg"
        path.write_text("mine")
        words = ["plot", "accuracy", "--arch", "se_mobilenet", "--out", path]
        status, _, error = selab(*words)
        assert status == 1
        assert f"{path}: exists; use --replace" in error
        assert path.read_text() == "mine"
        assert selab(*words, "--replace")[0] == 0
        assert path.read_text() != "mine"

    def test_a_table_s_file_too(self, selab, tmp_path):
        path = tmp_path / "t.md"
        words = ["table", "reduction", "--out", path]
        assert selab(*words)[0] == 0
        assert "exists; use --replace" in selab(*words)[2]
        assert selab(*words, "--replace")[0] == 0

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
            (["accuracy", "--out", "a.jpg"], ".jpg; a picture ends in .svg, .png or .pdf"),
        ],
    )
    def test_mistakes(self, selab, words, message, one_line):
        status, _, error = selab("plot", *words)
        assert status == 1
        assert message in one_line(error)


@pytest.mark.parametrize("command", ["table", "plot"])
def test_the_help_says_what_a_broken_record_does(selab, command):
    text = " ".join(selab(command, "--help")[1].split())
    assert "A record that cannot be read is named in a warning and left out" in text
    assert "exit status is 1" in text
