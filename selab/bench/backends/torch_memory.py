"""PyTorch's peak memory of a pass, and the bytes that autograd keeps between forward and backward."""

import gc
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

from selab.bench.runner import Call, Prepared, output_tensors, phase_call, prepare, translated_errors
from selab.errors import SelabError
from selab.meta.state import restored
from selab.records.types import Memory, Phase, Workload

CPU_METHOD = "peak of torch's CPU allocations, from torch.profiler's memory events"
CUDA_METHOD = "peak of torch's CUDA caching allocator (torch.cuda.max_memory_allocated)"


def memory(model: nn.Module, workload: Workload, *, seed: int, phases: Sequence[Phase]) -> Memory:
    """Measure a model's memory on a private copy of it, as `selab.bench.memory.memory` describes."""
    method = CUDA_METHOD if workload.device == "cuda" else CPU_METHOD
    found: dict[str, int] = {}
    error = ""
    devices = range(torch.cuda.device_count()) if workload.device == "cuda" else []
    with restored(model), torch.random.fork_rng(devices=devices):
        try:
            prepared = prepare(model, workload, seed=seed)
            with translated_errors("a pass for the memory"):
                if "forward" in phases:
                    found["peak_forward_bytes"] = _peak(prepared, "forward")
                if set(phases) - {"forward"}:
                    found["saved_for_backward_bytes"] = saved_for_backward(prepared)
                    found["peak_forward_backward_bytes"] = _peak(prepared, "forward_backward")
        except SelabError as problem:
            error = str(problem)
    return Memory(method=method, error=error, **found)


def saved_for_backward(prepared: Prepared) -> int:
    """Return the bytes of the distinct storages that a training-mode forward pass keeps for backward.

    Parameters and buffers are excluded, because they stay in memory anyway; a view counts its whole storage, once.
    """
    prepared.network.train()
    own = {tensor.untyped_storage()._cdata for tensor in [*prepared.network.parameters(), *prepared.network.buffers()]}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor), prepared.autocast():
        # Kept alive until the count is read: the address of a freed storage could be reused.
        outputs = output_tensors(prepared.run(prepared.input))
        total = sum(kept.values())
    del outputs
    return total


def _peak(prepared: Prepared, phase: Phase) -> int:
    call = phase_call(prepared, phase)
    call()  # excludes one-off allocations: workspaces, compilation
    gc.collect()
    return _peak_cuda(call) if prepared.workload.device == "cuda" else _peak_cpu(call)


def _peak_cuda(call: Call) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before


def _peak_cpu(call: Call) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
        del result
    # The public event list does not carry single allocations (torch 2.13), so the raw one is read.
    events = profiler.profiler.kineto_results.events()
    steps = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    level = peak = 0
    for _, step in steps:
        level += step
        peak = max(peak, level)
    return peak
