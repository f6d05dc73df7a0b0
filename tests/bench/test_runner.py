import pytest
import torch
from torch import nn

from selab.bench import heap
from selab.bench.runner import (
    check_output,
    device_faults,
    fp32_mode,
    mode_of,
    phase_call,
    prepare,
    training_step,
    translated_errors,
)
from selab.errors import DeviceError, ModelError, OutOfMemoryError
from selab.models.build import build
from selab.models.catalog import find


@pytest.mark.parametrize(
    ("phase", "mode", "expected"),
    [
        ("forward", "auto", "eval"),
        ("backward", "auto", "train"),
        ("forward_backward", "auto", "train"),
        ("forward", "train", "train"),
        ("forward_backward", "eval", "eval"),
    ],
)
def test_modes(phase, mode, expected, workload):
    assert mode_of(phase, workload(mode=mode)) == expected


def test_gradients_are_those_of_autograd(net, workload):
    prepared = prepare(net(), workload())
    both = phase_call(prepared, "forward_backward")()
    alone = phase_call(prepared, "backward")
    once, again = alone(), alone()
    assert [grad.shape for grad in both] == [p.shape for p in prepared.network.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    assert all(p.grad is None for p in prepared.network.parameters())


def test_a_training_step_is_the_same_two_passes(net, workload):
    prepared = prepare(net(), workload())
    step = training_step(prepared)
    once, again = step.backward(step.forward()), step.backward(step.forward())
    assert [grad.shape for grad in once] == [p.shape for p in prepared.network.parameters()]
    assert all(torch.allclose(a, b) for a, b in zip(once, again, strict=True))
    outputs = step.forward()
    step.backward(outputs)
    with pytest.raises(RuntimeError, match="second time"):
        step.backward(outputs)  # the graph was freed, as in training


def test_a_kernel_that_failed_is_told_whatever_is_done_after_it():
    with (
        pytest.raises(DeviceError, match="cuda: an illegal access; the device cannot be used any more"),
        device_faults("cuda"),
    ):
        raise torch.AcceleratorError("an illegal access")


def test_the_model_is_left_alone(net, workload):
    model = net().train()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    prepared = prepare(model, workload(memory_format="channels_last"))
    for phase in ("forward", "backward", "forward_backward"):
        phase_call(prepared, phase)()
    assert model.training
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert model[0].weight.is_contiguous()
    assert prepared.network[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert prepared.input.is_contiguous(memory_format=torch.channels_last)


def test_forward_in_eval_records_no_graph_and_in_train_does(net, workload):
    prepared = prepare(net(), workload())
    assert not phase_call(prepared, "forward")().requires_grad
    assert phase_call(prepare(net(), workload(mode="train")), "forward")().requires_grad


def test_autocast(net, workload):
    prepared = prepare(net(), workload(dtype="bf16"))
    assert phase_call(prepared, "forward")().dtype == torch.bfloat16


class Broken(nn.Module):
    def __init__(self, what):
        super().__init__()
        self.what = what
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x):
        if self.what == "raise":
            raise RuntimeError("no such\nthing")
        if self.what == "memory":
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
        return {"nan": x * float("nan"), "none": None, "ints": x.long()}[self.what]


@pytest.mark.parametrize(
    ("what", "error", "message"),
    [
        ("raise", ModelError, r"toy: forward with an input of shape \(2, 3, 8, 8\) fails: no such$"),
        ("nan", ModelError, "toy: its output holds NaN or infinity"),
        ("none", ModelError, "returns no floating-point tensor"),
        ("ints", ModelError, "returns no floating-point tensor"),
        ("memory", OutOfMemoryError, "out of memory: .*; use a smaller --batch"),
    ],
)
def test_networks_that_cannot_be_measured(what, error, message, workload):
    with pytest.raises(error, match=message):
        check_output(prepare(Broken(what), workload()), "toy")


def test_nothing_to_differentiate(net, workload):
    model = net().requires_grad_(False)
    with pytest.raises(ModelError, match="no parameter needs a gradient"):
        phase_call(prepare(model, workload()), "backward")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), DeviceError("mine"), AssertionError("mine")])
def test_other_errors_pass_untranslated(error):
    with pytest.raises(type(error)), translated_errors("this"):
        raise error


def test_a_failed_kernel_is_of_the_device():
    with (
        pytest.raises(DeviceError, match=r"^this: an illegal access; .*CUDA_LAUNCH_BLOCKING=1"),
        translated_errors("this"),
    ):
        raise torch.AcceleratorError("an illegal access")


@pytest.mark.parametrize("dtype", ["fp32", "tf32", "bf16"])
def test_torch_computes_fp32_as_asked_within_a_measurement_and_as_before_after_it(dtype):
    def modes():
        return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32

    before = modes()
    assert before == (False, True)  # torch's default mixes the two
    with fp32_mode("cuda", dtype):
        assert modes() == (dtype == "tf32",) * 2
    assert modes() == before
    with pytest.raises(KeyError), fp32_mode("cuda", "tf32"):
        raise KeyError
    assert modes() == before


def test_a_cpu_has_no_tf32(net, workload):
    with pytest.raises(
        DeviceError, match="--dtype tf32: is a mode of CUDA devices; with --device cpu use fp32 or bf16"
    ):
        prepare(net(), workload(dtype="tf32"))


def test_what_fails_is_named():
    with pytest.raises(ModelError, match=r"^this fails: more than 1 value$"), translated_errors("this"):
        raise ValueError("more than 1 value")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_cuda(net, workload):
    with pytest.raises(DeviceError, match=r"--device cuda: .*; use --device cpu"):
        prepare(net(), workload(device="cuda"))


def test_a_fused_workload_runs_fused_copies(workload):
    model = build(find("se_small_cnn")).model
    plain = prepare(model, workload(input_chw=(3, 32, 32)))
    fused = prepare(model, workload(input_chw=(3, 32, 32), fused=True))
    impls = [
        {module.impl for module in each.modules() if hasattr(module, "impl")}
        for each in (plain.network, fused.network, model)
    ]
    assert impls == [{"reference"}, {"auto"}, {"reference"}]


def test_a_held_heap_is_asked_of_the_c_library(monkeypatch, workload, net):
    asked = []

    class Library:
        def mallopt(self, parameter, value):
            asked.append((parameter, value))
            return 1

    monkeypatch.setattr(heap.ctypes, "CDLL", lambda _: Library())
    prepare(net(), workload(held_heap=True))
    assert asked == [(-3, 2**31 - 1), (-1, 2**31 - 1)]
    monkeypatch.setattr(heap.ctypes, "CDLL", lambda _: object())
    with pytest.raises(DeviceError, match="--hold-heap: this system's C library has no mallopt; omit the option"):
        prepare(net(), workload(held_heap=True))
