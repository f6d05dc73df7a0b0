"""The folders of a machine: which files are its records, and what is said where there are none."""

import msgspec
import pytest

from selab.errors import RecordError
from selab.experiments.profiling import count_record
from selab.experiments.tax_record import TAXES
from selab.records.store import PROFILES, partial_path, read_records, record_path, save
from selab.training.record import ACCURACIES


@pytest.fixture(scope="module")
def counted():
    return count_record("se_small_cnn", batch=2, counters=False)


@pytest.fixture
def written(counted, tmp_path):
    """Writes a profile to `tmp_path/<machine>/<name>` and returns its path."""

    def write(machine, name, **changes):
        path = tmp_path / machine / name
        save(msgspec.structs.replace(counted, **changes), path)
        return path

    return write


def test_where_each_family_lies(tmp_path):
    asked = {"machine": "m", "arch": "timm:x", "against": None}
    assert record_path(tmp_path, workload="w", **asked) == tmp_path / "m" / "timm-x.w.json"
    assert PROFILES.path(tmp_path, parts=["w"], **asked) == tmp_path / "m" / "timm-x.w.json"
    assert TAXES.path(tmp_path, parts=["w", "forward"], **asked) == tmp_path / "m" / "tax" / "timm-x.w.forward.json"
    other = ACCURACIES.path(tmp_path, machine="m", arch="a", against="b", parts=["cifar10", "short"])
    assert other == tmp_path / "m" / "accuracy" / "a-vs-b.cifar10.short.json"


def test_what_an_interruption_left_is_read_where_it_is_asked_for(written, tmp_path):
    written("m", "b.json", arch="whole")
    written("m", "a.partial.json", arch="part", complete=False)
    written("m", "c.failed.json", arch="failed")
    folder = tmp_path / "m"
    assert [one.arch for one in read_records(folder)] == ["whole"]
    assert [one.arch for one in read_records(folder, partial=True)] == ["part", "whole"]
    written("m", "a.json", arch="done", complete=False)  # the partial one of this name is older, and stays
    assert partial_path(folder / "a.json").exists()
    assert [one.arch for one in read_records(folder, partial=True)] == ["done", "whole"]


def test_a_folder_of_partial_records_only(written, tmp_path):
    written("m", "a.partial.json", arch="part", complete=False)
    assert [one.arch for one in read_records(tmp_path / "m", partial=True)] == ["part"]
    with pytest.raises(RecordError, match="m: contains no profiles; make some with `selab profile`"):
        read_records(tmp_path / "m")


def test_several_folders_are_all_read_each_once(written, tmp_path):
    for machine, arch in (("one", "a"), ("two", "b")):
        written(machine, "x.json", arch=arch)
    folders = [tmp_path / "two", tmp_path / "one", tmp_path / "one" / ".." / "two"]
    assert [one.arch for one in PROFILES.read_folders(folders)] == ["b", "a"]
    with pytest.raises(RecordError, match="three: not a folder"):
        PROFILES.read_folders([*folders, tmp_path / "three"])


@pytest.mark.parametrize(
    ("store", "title"),
    [(PROFILES, "profiles"), (ACCURACIES, "comparisons"), (TAXES, "records of `selab tax`")],
)
def test_the_folder_above_those_of_machines_names_them(store, title, tmp_path):
    (tmp_path / "empty").mkdir()
    assert store.read_folder(tmp_path, required=False) == []
    with pytest.raises(RecordError, match=f"contains no {title}; make some with `{store.command}`"):
        store.read_folder(tmp_path)
    for machine in ("there", "here"):
        path = store.path(tmp_path, machine=machine, arch="a", against=None, parts=["w"])
        path.parent.mkdir(parents=True)
        path.write_text("{}")
    for required in (True, False):
        with pytest.raises(RecordError, match=f"contains no {title}; its subfolders do: here, there"):
            store.read_folder(tmp_path, required=required)


def test_the_folders_of_other_families_are_not_machines(tmp_path):
    path = TAXES.path(tmp_path, machine="here", arch="a", against=None, parts=["w", "forward"])
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    with pytest.raises(RecordError, match="make some with"):
        read_records(tmp_path / "here")


def test_broken_files_are_left_out_where_they_are_told_of(written, tmp_path):
    folder = tmp_path / "m"
    written(folder, "a.json", arch="a")
    written(folder, "c.json", arch="c")
    (folder / "b.json").write_text("{")
    told = []
    assert [one.arch for one in read_records(folder, on_broken=told.append)] == ["a", "c"]
    assert [str(each).startswith(f"{folder / 'b.json'}: ") for each in told] == [True]
    with pytest.raises(RecordError, match=r"b\.json: "):
        read_records(folder)
    for name in "ac":
        (folder / f"{name}.json").unlink()
    with pytest.raises(RecordError, match=r"b\.json: [^;]*; [^;]*$"):
        read_records(folder, on_broken=told.append)
    (folder / "d.json").write_text("{")
    with pytest.raises(RecordError, match=r"b\.json: .*; 1 more of .*m cannot be read either$"):
        read_records(folder, on_broken=told.append)
    assert len(told) == 1
    for name in "bd":
        (folder / f"{name}.json").unlink()
    with pytest.raises(RecordError, match="make some with"):
        read_records(folder, on_broken=told.append)
