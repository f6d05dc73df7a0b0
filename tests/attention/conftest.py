import pytest
import torch
from plain_networks import Foreign


@pytest.fixture
def foreign():
    torch.manual_seed(1)
    return Foreign().eval()


@pytest.fixture
def image():
    torch.manual_seed(2)
    return torch.randn(2, 3, 32, 32)
