"""The kernels' benchmark calls them as they are."""

import os

import pytest
import torch

pytest.importorskip("triton", reason="needs triton")
if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1", allow_module_level=True)

import bench_kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("memory_format", bench_kernels.FORMATS.values(), ids=bench_kernels.FORMATS)
def test_every_timed_call_runs(memory_format):
    y = torch.randn(2, 32, 5, 5, device=DEVICE).contiguous(memory_format=memory_format)
    names = []
    for name, maps, call in bench_kernels.calls(y, torch.randn_like(y)):
        call()
        names.append(name)
        assert maps >= 1
    assert names == ["copy", "squeeze", "join", "gate's gradient", "branch's gradient", "forward", "backward"]
