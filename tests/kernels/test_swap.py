"""Classes that are swapped in place: what stays, what a copy is, and when a class is not the swapped one."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from selab.kernels.deferred_bn import DeferredNorm
from selab.kernels.residual import ACTIVATIONS, FusedActivation
from selab.kernels.swap import is_exact, library_of, restore, swap


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_a_swapped_module_is_still_of_its_class(kind):
    module = kind()
    swap(module, FusedActivation)
    assert isinstance(module, (kind, FusedActivation))
    assert isinstance(module, FusedActivation)
    assert type(module).__name__ == kind.__name__
    assert (library_of(module), module.library) == (kind, kind)
    other = kind()
    swap(other, FusedActivation)
    assert type(other) is type(module)
    restore(module)
    assert type(module) is kind


def test_swapping_twice_changes_nothing():
    module = nn.ReLU()
    swap(module, FusedActivation)
    kind = type(module)
    swap(module, FusedActivation)
    assert type(module) is kind


def test_parameters_hooks_and_keys_stay():
    norm, called = nn.BatchNorm2d(3).eval(), []
    norm.register_forward_hook(lambda *_: called.append(1))
    before = {key: value.clone() for key, value in norm.state_dict().items()}
    weight = norm.weight
    swap(norm, DeferredNorm)
    assert norm.weight is weight
    assert {key: value.tolist() for key, value in norm.state_dict().items()} == {
        key: value.tolist() for key, value in before.items()
    }
    norm(torch.randn(1, 3, 2, 2))
    assert called == [1]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_copy_is_swapped_too(copied):
    norm = nn.BatchNorm2d(3)
    swap(norm, DeferredNorm)
    norm.running_mean.fill_(2)
    twin = copied(norm)
    assert type(twin) is type(norm)
    assert twin.running_mean is not norm.running_mean
    assert twin.running_mean.tolist() == [2, 2, 2]


def test_a_class_made_of_the_swapped_one_is_left_alone():
    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    norm = nn.BatchNorm2d(3)
    swap(norm, DeferredNorm)
    assert is_exact(norm)
    parametrize.register_parametrization(norm, "weight", Doubled())
    assert not is_exact(norm)
    kind = type(norm)
    assert library_of(norm) is kind
    restore(norm)
    assert type(norm) is kind


def test_a_module_that_was_never_swapped():
    module = nn.ReLU()
    assert not is_exact(module)
    assert library_of(module) is nn.ReLU
    restore(module)
    assert type(module) is nn.ReLU
