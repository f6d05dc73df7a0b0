"""A network without the blocks that became constants in its weights, as `selab fold` describes it."""

import msgspec
from torch import nn

from selab.attention.gates import convert_gates
from selab.attention.insert import take_out
from selab.models import catalog
from selab.models.build import build

BUILDER = "selab.models.folded:network"


def network(*, num_classes: int, arch: str, folded: str, gate: str = "") -> nn.Module:
    """Return a network whose blocks at some paths pass their input on; its weights are in a file of their own.

    Args:
        num_classes: of the classifier.
        arch: as `--arch` takes it.
        folded: the paths of the blocks, separated by blanks; empty for the network as it was.
        gate: of the blocks that are left, as `selab.convert_gates` takes it; empty for their own.

    Raises:
        SelabError: the network cannot be found or built, or has no such block.
    """
    model = build(msgspec.structs.replace(catalog.find(arch), num_classes=num_classes)).model
    for path in folded.split():
        take_out(model, path)
    if gate:
        convert_gates(model, gate)
    return model
