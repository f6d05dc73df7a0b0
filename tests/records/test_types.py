import msgspec
import pytest

from selab.errors import RecordError
from selab.experiments.profiling import count_record
from selab.records import types
from selab.records.store import read_record, save
from selab.report.pages import spliced


@pytest.fixture(scope="module")
def counted():
    return count_record("se_small_cnn", batch=2)


def test_json_and_back(counted):
    raw = types.to_json(counted)
    assert types.from_json(raw, where="x") == counted
    assert raw.endswith(b"\n")


def test_lists_of_numbers_stay_on_a_line():
    work = types.Workload(
        batch=1, input_chw=(3, 224, 224), device="cpu", dtype="fp32", memory_format="contiguous", mode="auto", threads=1
    )
    assert work.slug == "cpu-b1-224-fp32-t1"
    changed = msgspec.structs.replace(
        work, memory_format="channels_last", mode="train", compiled=True, input_chw=(1, 8, 9)
    )
    assert changed.slug == "cpu-b1-c1-8x9-fp32-nhwc-train-compiled-t1"
    cheap = msgspec.structs.replace(work, fused=True, held_heap=True)
    assert cheap.slug == "cpu-b1-224-fp32-fused-held-t1"


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "x.json: not a record"),
        *(
            (raw, r"x.json: schema is None, which no record of selab has; name a file with 'selab.profile/1'")
            for raw in (
                b"[]",
                b"{}",
                b"null",
                b"3",
                b'"selab.profile/1"',
                b'{"model": 1}',
                b'[{"schema": "selab.profile/1"}]',
            )
        ),
        (b'{"schema": 3}', "x.json: schema is 3, which no record of selab has"),
        (b'{"schema": ["selab.profile/1"]}', r"x.json: schema is \['selab.profile/1'\], which no record of selab has"),
        (b'{"schema": "other/1"}', "x.json: schema is 'other/1', which no record of selab has"),
        (
            b'{"schema": "selab.tax/1"}',
            "x.json: is a record of another kind, 'selab.tax/1'; expected 'selab.profile/1'",
        ),
        (b'{"schema": "selab.profile/99"}', "schema is 'selab.profile/99', this version reads"),
        (b'{"schema": "selab.profile/1"}', "x.json: Object missing required field"),
    ],
)
def test_what_is_no_record(raw, message):
    with pytest.raises(RecordError, match=message):
        types.from_json(raw, where="x.json")


def test_an_unknown_field_is_refused(counted):
    raw = types.to_json(counted).replace(b'"batch": 2', b'"batch": 2, "bath": 3')
    with pytest.raises(RecordError, match="unknown field `bath`"):
        types.from_json(raw, where="x.json")


def test_saved_whole_or_not_at_all(counted, tmp_path, monkeypatch):
    path = tmp_path / "a" / "b.json"
    save(counted, path)
    assert read_record(path) == counted
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(RecordError, match="cannot be written: No space left on device; the file is as it was"):
        save(counted, path)
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == ["b.json"]


def test_splicing():
    page = "a\n<!-- table x -->\nold\n<!-- /table -->\nb\n"
    assert spliced(page, "x", "new\n", where="p") == "a\n<!-- table x -->\nnew\n<!-- /table -->\nb\n"
    with pytest.raises(RecordError, match="p: has no lines"):
        spliced(page, "y", "new", where="p")


def test_a_workload_of_several_inputs_names_all_of_them(workload):
    one, other = (workload(inputs=("rgb=3x8x8", second)) for second in ("depth=1x8x8", "depth=1x16x16"))
    assert one.slug == "cpu-b2-rgb_3x8x8-depth_1x8x8-fp32-t1"
    assert one.slug != other.slug
    assert one.words(device=False)[:2] == ["batch 2", "rgb=3×8×8 and depth=1×8×8"]
    # A record of one input is what it was.
    assert b"inputs" not in msgspec.json.encode(workload())
    assert msgspec.json.decode(msgspec.json.encode(other), type=type(other)) == other
