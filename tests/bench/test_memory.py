import torch
from torch import nn

from selab.bench.backends.torch_memory import saved_for_backward
from selab.bench.memory import memory
from selab.bench.runner import prepare


def test_saved_for_backward_is_what_the_formulas_keep(workload):
    """Conv keeps its input; BatchNorm its input and two statistics; ReLU its output; the weights do not count."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU())
    image, features = 2 * 3 * 8 * 8 * 4, 2 * 4 * 6 * 6 * 4
    assert saved_for_backward(prepare(model, workload())) == image + features + 2 * 4 * 4 + features


def test_a_view_counts_its_storage_once(workload):
    class Views(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def forward(self, x):
            y = x * self.weight
            return (y[:, :1] * y[:, 1:2]) * y[:, 2:]

    product = 2 * 8 * 8 * 4
    assert saved_for_backward(prepare(Views(), workload())) == 2 * 3 * 8 * 8 * 4 * 2 + product


def test_peaks(workload):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    found = memory(model, workload())
    features = 2 * 4 * 6 * 6 * 4
    assert found.error == ""
    assert "torch.profiler" in found.method
    # The convolution's output and ReLU's, alive together; the kernel library may add scratch memory of its own.
    assert found.peak_forward_bytes >= 2 * features
    assert found.peak_forward_backward_bytes > found.peak_forward_bytes
    assert model.training


def test_a_phase_that_is_not_asked_for_is_not_measured(workload):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    forward, backward = (memory(model, workload(), phases=phases) for phases in (["forward"], ["backward"]))
    assert forward.peak_forward_bytes > 0
    assert (forward.saved_for_backward_bytes, forward.peak_forward_backward_bytes) == (None, None)
    assert backward.peak_forward_bytes is None
    assert backward.saved_for_backward_bytes > 0


def test_out_of_memory_is_told(workload):
    found = memory(nn.Conv2d(3, 4, 3), workload(batch=10**10))
    assert found.error.startswith("out of memory: ")
    assert found.peak_forward_bytes is None
