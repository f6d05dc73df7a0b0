"""The commands that measure, and what an interruption leaves."""

import json
import os
import signal
import subprocess
import sys

import msgspec
import pytest

from selab.records.types import Record

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

    def test_an_existing_record_is_kept_unless_asked(self, selab, toy, tmp_path, one_line):
        words = ["profile", "--arch", f"{toy}:se_toy", "--phase", "forward", "--threads", 1, "--out", tmp_path / "r"]
        assert selab(*words)[0] == 0
        (path,) = (tmp_path / "r").rglob("*.json")
        before = path.read_bytes()
        status, _, error = selab(*words)
        assert status == 1
        assert "exists; use --replace" in one_line(error)
        assert path.read_bytes() == before
        assert selab(*words, "--replace")[0] == 0
        assert path.read_bytes() != before

    def test_a_record_of_one_phase_does_not_stand_in_the_way_of_a_whole_one(self, selab, toy, tmp_path):
        words = ["profile", "--arch", f"{toy}:se_toy", "--threads", 1, "--out", tmp_path / "r"]
        assert selab(*words, "--phase", "forward")[0] == 0
        assert selab(*words)[0] == 0
        names = sorted(path.name for path in (tmp_path / "r").rglob("*.json"))
        assert names == ["se_toy.cpu-b1-16-fp32-t1.forward.json", "se_toy.cpu-b1-16-fp32-t1.json"]

    def test_of_a_phase_that_is_not_measured_there_is_no_memory(self, selab, toy, tmp_path):
        words = ["--phase", "forward", "--threads", 1, "--out", tmp_path / "r", "--json", "-"]
        memory = json.loads(selab("profile", "--arch", f"{toy}:se_toy", *words)[1])["memory"]
        assert memory["peak_forward_bytes"] > 0
        assert memory["peak_forward_backward_bytes"] is None
        assert memory["saved_for_backward_bytes"] is None

    def test_progress_names_the_control_run(self, selab, toy, tmp_path):
        words = ["--phase", "forward", "--threads", 1, "--out", tmp_path / "r"]
        _, _, error = selab("profile", "--arch", f"{toy}:se_toy", *words)
        assert "forward, control run, 1 thread …" in error

    @pytest.mark.parametrize(("look", "start"), [("markdown", "### "), ("csv", "table,")])
    def test_formats(self, selab, toy, tmp_path, look, start):
        words = ["--phase", "forward", "--threads", 1, "--out", tmp_path / "r", "--format", look]
        status, out, _ = selab("profile", "--arch", f"{toy}:se_toy", *words)
        assert status == 0
        assert out.startswith(start)
        assert "record: " not in out

    def test_a_picture_is_not_written_over(self, selab, toy, tmp_path):
        picture = tmp_path / "out.svg"
        picture.write_text("mine")
        words = ["--phase", "forward", "--threads", 1, "--out", tmp_path / "r", "--svg", picture]
        status, _, error = selab("profile", "--arch", f"{toy}:se_toy", *words)
        assert status == 1
        assert "exists; use --replace" in error
        assert picture.read_text() == "mine"

    def test_out_of_memory_is_a_row(self, selab, toy, tmp_path):
        options = ["--batch", 10**9, "--threads", 1, "--out", tmp_path / "r"]
        status, out, _ = selab("profile", "--arch", f"{toy}:se_toy", *options)
        assert status == 0
        assert "failed: out of memory" in out
        assert "parameters" in out
        (path,) = (tmp_path / "r").rglob("*.json")
        found = json.loads(path.read_text())
        assert "out of memory" in found["latency"]["forward"]["error"]
        assert found["cost"]["params"] > 0

    @pytest.mark.parametrize(
        ("variant", "message"),
        [("nan", "toy.toml:nan: its output holds NaN"), ("broken", "toy.toml: variants.broken: ")],
    )
    def test_networks_that_cannot_be_measured(self, selab, toy, tmp_path, variant, message, one_line):
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
        assert "backward, 1 thr: failed: backward in train mode fails: Expected more than 1 value" in " ".join(
            out.split()
        )
        assert "memory of se_toy: a pass for the memory fails" in " ".join(out.split())

    def test_outputs_are_tried_before_anything_is_measured(self, selab, toy, tmp_path, one_line):
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

    def test_an_interrupted_profile_shows_what_there_is(self, selab, toy, tmp_path):
        _, out, error = selab("profile", "--arch", f"{toy}:slow", "--threads", 1, "--out", tmp_path / "r")
        (path,) = (tmp_path / "r").rglob("*.partial.json")
        assert out.startswith("slow against toy")
        assert "parameters" in out
        assert str(path) in error.splitlines()[-1]
        # A table shows it too, until a whole record takes its place.
        _, _, error = selab("table", "latency", "--profiles", path.parent)
        assert "contains no" not in error

    def test_interrupted_in_process(self, selab, toy, tmp_path, one_line):
        status, _, error = selab("profile", "--arch", f"{toy}:slow", "--threads", 1, "--out", tmp_path / "r")
        assert status == 130
        assert "interrupted; no time was measured yet; the counted costs are in" in one_line(error)
        (path,) = (tmp_path / "r").rglob("*.json")
        assert path.name.endswith(".partial.json")
        found = msgspec.json.decode(path.read_bytes(), type=Record)
        assert not found.complete
        assert found.cost.params > 0


class TestInterruption:
    """What is said to be kept is what the file has."""

    @pytest.mark.parametrize(
        ("place", "words", "phases"),
        [
            ("build_pair", "nothing was measured yet, and nothing was written", None),
            ("raw_runs", "no time was measured yet; the counted costs are in {}", []),
            ("memory", "what was measured until then (forward) is in {}", ["forward"]),
        ],
    )
    def test_what_was_kept(self, selab, toy, quick_plans, tmp_path, monkeypatch, one_line, place, words, phases):
        def interrupt(*_args, **_options):
            raise KeyboardInterrupt

        monkeypatch.setattr(f"selab.experiments.profiling.{place}", interrupt)
        options = ["--threads", 1, "--phase", "forward", "--out", tmp_path / "r"]
        status, _, error = selab("profile", "--arch", f"{toy}:se_toy", *options)
        assert status == 130
        written = list((tmp_path / "r").rglob("*.json"))
        assert one_line(error) == f"error: interrupted; {words.format(*written)}"
        if phases is None:
            assert written == []
        else:
            (path,) = written
            assert path.name.endswith(".partial.json")
            record = json.loads(path.read_text())
            assert record["cost"]["params"] > record["baseline_cost"]["params"]
            assert list(record["latency"]) == phases

    def test_sigterm_keeps_what_was_measured_and_has_its_own_status(self, toy, tmp_path):
        words = ["profile", "--arch", f"{toy}:se_toy", "--out", tmp_path / "r"]
        command = [sys.executable, "-m", "selab", *map(str, words)]
        running = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for line in running.stderr:
            if "forward about" in line:
                break
        running.send_signal(signal.SIGTERM)
        running.communicate(timeout=60)
        assert running.returncode == 143
        (path,) = (tmp_path / "r").rglob("*.json")
        assert path.name == "se_toy.cpu-b1-16-fp32-held-t1.partial.json"

    def test_control_c_in_a_shell(self, toy, tmp_path, one_line):
        words = ["profile", "--arch", f"{toy}:se_toy", "--out", tmp_path / "r"]
        running = subprocess.Popen(
            [sys.executable, "-m", "selab", *map(str, words)],
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for line in running.stderr:
            if "forward about" in line:
                break
        running.send_signal(signal.SIGINT)
        shown, error = running.communicate(timeout=60)
        assert running.returncode == 130
        assert "interrupted; what was measured until then (forward" in one_line(error)
        assert "forward, 1 thr" in shown
        (path,) = (tmp_path / "r").rglob("*.json")
        assert path.name.endswith(".partial.json")
        assert not list((tmp_path / "r").rglob(".*"))
