import sys

import msgspec
import pytest
from tiny_training import (
    FAMILY,
    NETWORKS,
    OPTIONS,
    RECIPE,
    images,
)

from selab.models.spec import read_family
from selab.training.train import Options, train


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    folder = tmp_path_factory.mktemp("family")
    (folder / "tiny_networks.py").write_text(NETWORKS)
    (folder / "tiny.toml").write_text(FAMILY)
    yield read_family(folder / "tiny.toml")
    sys.modules.pop("tiny_networks", None)


@pytest.fixture
def run(family, tmp_path):
    """Trains a network of the family: (name, changes of recipe and options) → its Training."""

    def run(name="plain", *, folder="run", data=None, seed=0, report=lambda _: None, options=OPTIONS, **changes):
        known = {key: changes.pop(key) for key in ("clock", "patience_s", "say", "weights") if key in changes}
        chosen = {key: changes.pop(key) for key in list(changes) if key in Options.__struct_fields__}
        return train(
            family[name],
            data or images(),
            msgspec.structs.replace(RECIPE, **changes),
            seed=seed,
            folder=tmp_path / folder,
            options=msgspec.structs.replace(options, **chosen),
            report=report,
            **known,
        )

    return run
