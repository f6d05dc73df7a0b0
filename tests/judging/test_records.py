"""Records of trained gates are refused as a whole, with the file and the field."""

import json

import msgspec
import pytest

from selab.errors import RecordError
from selab.judging.choose import Choice
from selab.judging.folding import Folding, folding_json, read_folding
from selab.judging.loss import Loss
from selab.judging.ranking import BlockWorth, Ranking, ranking_json, read_ranking

CHOICE = Choice(path="se", spread=0.1, alone=0.0, together=0.0, folded=True, where="scale of bn")
FOLDING = Folding(
    arch="net", data="images", chosen_on=5, reported_on=4, limit=0.1, unit="points", choices=(CHOICE,), error=0.01
)
LOSS = Loss(images=100, before=60, after=59, worse=2, better=1, points=1.0, low=-3.0, high=5.0)
BLOCK = BlockWorth(
    path="se",
    channels=8,
    spread=0.1,
    loss_mean=LOSS,
    loss_one=LOSS,
    error_mean=0.1,
    error_one=0.2,
    params=10,
    macs=20,
    bytes=30,
)
RANKING = Ranking(arch="net", data="images", images=100, blocks=(BLOCK,))


def test_they_come_back_as_they_were_written(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(folding_json(FOLDING))
    assert read_folding(path) == FOLDING
    assert read_folding(path).folded == ("se",)
    path.write_bytes(ranking_json(RANKING))
    assert read_ranking(path) == RANKING


@pytest.mark.parametrize(
    ("read", "record", "changes", "said"),
    [
        (read_folding, FOLDING, {"choices": []}, "choices: is empty; fold again with `selab fold`"),
        (read_folding, FOLDING, {"chosen_on": 0}, "chosen_on, reported_on: expected 1 image or more"),
        (read_folding, FOLDING, {"error": -1.0}, "error: is -1.0"),
        (read_folding, FOLDING, {"arch": 3}, "arch"),
        (read_ranking, RANKING, {"blocks": []}, "blocks: is empty; judge again with `selab blocks`"),
        (read_ranking, RANKING, {"schema": "selab.gates/1"}, "is a record of another kind"),
    ],
)
def test_what_is_impossible(tmp_path, read, record, changes, said):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({**msgspec.to_builtins(record), **changes}))
    with pytest.raises(RecordError) as caught:
        read(path)
    assert str(path) in str(caught.value)
    assert said in str(caught.value)


def test_what_is_to_be_taken_out_first():
    def block(path, worth, moved):
        loss = msgspec.structs.replace(LOSS, points=worth)
        return msgspec.structs.replace(BLOCK, path=path, loss_mean=loss, bytes=moved)

    blocks = (block("a", 0.1, 50), block("b", 0.5, 40), block("c", 0.0, 10), block("d", 0.5, 60))
    assert msgspec.structs.replace(RANKING, blocks=blocks).front == {"a", "c", "d"}
