"""The libraries whose networks ours are compared with; `nox -s interop` installs them."""

import warnings

import pytest


@pytest.fixture
def foreign_model():
    """(source, model) → their network with random weights; skips where the library is not installed."""

    def make(source, model):
        library = {"cadene": "pretrainedmodels"}.get(source, source)
        with warnings.catch_warnings():
            # They warn about each other's age; that is not what is tested.
            warnings.simplefilter("ignore")
            found = pytest.importorskip(library, reason=f"{library} is not installed")
            if source == "timm":
                return found.create_model(model, pretrained=False)
            if source == "torchvision":
                return found.models.get_model(model, weights=None)
            return getattr(found, model)(num_classes=1000, pretrained=None)

    return make
