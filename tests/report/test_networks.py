"""Tables about one network."""

from selab.models.catalog import find
from selab.report import networks


def test_a_printed_accuracy_is_not_taken_for_an_error():
    rows = {row[0]: row[1] for row in networks.published_table(find("se_small_cnn")).rows}
    assert rows == {"top1_error_pct": "23.72 (printed: accuracy 76.28 %)", "loss": "0.6834"}
    errors = [row[1] for row in networks.published_table(find("resnet50")).rows if row[0] == "top1_error_pct"]
    assert errors
    assert not any("accuracy" in one for one in errors)
