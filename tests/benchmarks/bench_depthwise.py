"""What is saved when a depthwise convolution takes the sums of the squeeze while it writes its map: a pilot.

`python tests/benchmarks/bench_depthwise.py --out FILE` compiles depthwise.c with the C compiler that is found, puts it
in the place of every depthwise convolution, BatchNorm and activation of networks whose blocks stand behind them, and
measures all arms interleaved in fresh processes, one image, one thread, all networks fused by `selab.fuse` first:

* `library`: depthwise convolutions of torch, without blocks and with them;
* `own`: the depthwise convolutions of depthwise.c, without blocks;
* `apart`, `within`: the same with blocks; the squeeze reads the whole map again, or each channel behind its last row;
* `weights`: as `within`, and the gates scale the weights of the next convolution, not the map.
"""

import argparse
import ctypes
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor, nn
from torch.nn import functional

from selab.attention.se import SqueezeExcitation
from selab.bench.interleaved import measure_networks
from selab.bench.machine import machine, threads_and_affinity
from selab.bench.sampler import Plan
from selab.fusion.fuse import fuse
from selab.models.build import build
from selab.models.catalog import baseline_of, find
from selab.records import verdict
from selab.records.files import write_atomically
from selab.records.types import Run, Workload

ARCHES = ("mobilenet_v3_large", "efficientnet_b0", "mnasnet_a1")
SOURCE = Path(__file__).with_name("depthwise.c")
INCLUDES = Path(__file__).parents[2] / "selab" / "kernels"
PAIRS = (
    ("library", "library with SE"),
    ("library", "own"),
    ("own", "apart"),
    ("own", "within"),
    ("apart", "within"),
    ("own", "weights"),
    ("library with SE", "library with SE again"),
)
WHAT = {"own": 0, "apart": 1, "within": 2, "weights": 3}
ACTIVATIONS = {"ReLU": 1, "Hardswish": 2, "SiLU": 3}


class Sizes(ctypes.Structure):
    """As in depthwise.c."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("channels", "height", "width", "out_height", "out_width", "hidden")),
        *((name, ctypes.c_int) for name in ("taps", "stride", "after", "activation", "gate")),
    )


@cache
def library() -> ctypes.CDLL:
    """Return the compiled depthwise.c."""
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / "depthwise.so"
        flags = ("-O3", "-fno-math-errno", "-fno-trapping-math", "-std=gnu11", "-fopenmp", "-shared", "-fPIC")
        subprocess.run(["cc", *flags, f"-I{INCLUDES}", str(SOURCE), "-o", str(built)], check=True)
        found = ctypes.CDLL(str(built))
    found.room_of.restype = ctypes.c_int64
    found.run.argtypes = [ctypes.c_void_p, ctypes.c_int, *[ctypes.c_void_p] * 10]
    found.run.restype = None
    return found


def part(module: nn.Module, kind: type[nn.Module] | tuple[type[nn.Module], ...]) -> nn.Module | None:
    return next((one for one in module.modules() if isinstance(one, kind)), None)


class OwnDepthwise(nn.Module):
    """act(bn(depthwise(x))) of depthwise.c, and the block behind it."""

    def __init__(self, before: nn.Module, what: int) -> None:
        super().__init__()
        conv, norm = part(before, nn.Conv2d), part(before, nn.BatchNorm2d)
        act, block = part(before, (nn.ReLU, nn.Hardswish, nn.SiLU)), part(before, SqueezeExcitation)
        assert isinstance(conv, nn.Conv2d)
        assert isinstance(norm, nn.BatchNorm2d)
        assert act is not None
        assert norm.running_var is not None
        assert norm.running_mean is not None
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        self.weight = nn.Parameter((conv.weight.flatten(1) * scale[:, None]).detach().contiguous())
        self.bias = nn.Parameter((norm.bias - norm.running_mean * scale).detach())
        self.block = block
        self.what = what if block is not None else 0
        self.after = next(code for name, code in ACTIVATIONS.items() if name in {k.__name__ for k in type(act).__mro__})
        self.taps, self.stride = conv.kernel_size[0], conv.stride[0]
        self.sizes: Any = None
        self.gates: Any = None

    def _sizes(self, x: Tensor) -> Sizes:
        channels, height, width = x.shape[1:]
        hidden, activation, gate = 0, 0, 0
        if isinstance(self.block, SqueezeExcitation):
            hidden, activation = self.block.squeeze_channels, int(self.block.kinds[1] == "silu")
            gate = int(self.block.kinds[2] == "hardsigmoid")
        out = ((height - 1) // self.stride + 1, (width - 1) // self.stride + 1)
        return Sizes(channels, height, width, *out, hidden, self.taps, self.stride, self.after, activation, gate)

    def forward(self, x: Tensor) -> Tensor:
        if self.gates is None:
            sizes = self._sizes(x)
            self.sizes, self.gates = sizes, torch.empty(sizes.channels)
            self.room = torch.empty(library().room_of(ctypes.byref(sizes)))
        sizes, block = self.sizes, self.block
        y = x.new_empty((1, sizes.channels, sizes.out_height, sizes.out_width))
        layers = (block.fc1, block.fc2) if isinstance(block, SqueezeExcitation) else ()
        # None stands for no address.
        given = [one for layer in layers for one in (layer.weight, layer.bias)] or [None] * 4
        tensors = (x.contiguous(), self.weight, self.bias, *given, y, self.gates, self.room)
        library().run(ctypes.byref(sizes), self.what, *(one if one is None else one.data_ptr() for one in tensors))
        return y


class GatedConvolution(nn.Module):
    """A 1x1 convolution whose weights are scaled by the gates of the depthwise convolution before it."""

    def __init__(self, conv: nn.Conv2d, before: OwnDepthwise) -> None:
        super().__init__()
        self.conv, self.before = conv, (before,)

    def forward(self, x: Tensor) -> Tensor:
        gates = self.before[0].gates
        return functional.conv2d(x, self.conv.weight * gates.view(1, -1, 1, 1), self.conv.bias)


def network(arch: str, arm: str) -> nn.Module:
    """Return the fused network of an arm."""
    variant = find(arch)
    if arm in ("library", "own"):
        found = baseline_of(variant)
        assert found is not None
        variant = found
    model = build(variant).model.eval()
    fuse(model)
    if arm not in WHAT:
        return model
    for module in list(model.modules()):
        branch = getattr(module, "branch", None)
        if branch is None or not hasattr(branch, "depthwise"):
            continue
        branch.depthwise = OwnDepthwise(branch.depthwise, WHAT[arm])
        if arm == "weights" and branch.depthwise.block is not None:
            for name, child in list(branch.project.named_children()):
                if isinstance(child, nn.Conv2d):
                    setattr(branch.project, name, GatedConvolution(child, branch.depthwise))
    return model


def check(arch: str) -> None:
    """Compare the arms of a network with the library's outputs."""
    x = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for arm, like in (("own", "library"), *((arm, "library with SE") for arm in ("apart", "within", "weights"))):
            torch.testing.assert_close(network(arch, arm)(x), network(arch, like)(x), rtol=1e-3, atol=1e-4)


def measured(arch: str, seed: int, budget_s: float) -> dict[str, Run]:
    """Measure every pair in this process."""
    plan = replace(Plan.for_cpu(), target_half_width=-1.0, warmup_least_s=0.5, budget_s=budget_s)
    names = list(dict.fromkeys(name for pair in PAIRS for name in pair))
    workload = Workload(
        batch=1,
        input_chw=(3, 224, 224),
        device="cpu",
        dtype="fp32",
        memory_format="contiguous",
        mode="eval",
        threads=1,
        held_heap=True,
    )
    with threads_and_affinity(1), torch.no_grad():
        found = measure_networks(
            {name: (lambda name=name: network(arch, name)) for name in names},
            PAIRS,
            workload,
            "forward",
            plan,
            lambda *_: None,
            seed=seed,
        )
    assert not found.failed, found.failed
    return {" → ".join(pair): run for pair, run in next(iter(found.runs.values())).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--budget", type=float, default=1.0, help="seconds of sampling of each pair in each process")
    parser.add_argument("--one", help="measure this network in this process, and print its runs")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.one:
        print(msgspec.json.encode(measured(options.one, options.seed, options.budget)).decode())
        return

    result = {}
    for arch in ARCHES:
        check(arch)
        runs: dict[str, list[Run]] = {}
        for seed in range(options.processes):
            words = [sys.executable, __file__, "--one", arch, "--seed", str(seed), "--budget", str(options.budget)]
            printed = subprocess.run(words, check=True, capture_output=True, text=True).stdout
            for pair, run in msgspec.json.decode(printed, type=dict[str, Run]).items():
                runs.setdefault(pair, []).append(run)
        control = runs.pop(" → ".join(PAIRS[-1]))
        result[arch] = {
            pair: verdict.summarise(
                phase="forward",
                method="wall",
                statistic="floor",
                threads=1,
                mode="eval",
                runs=of_pair,
                controls=control,
                target_half_width=0.01,
                unit="process",
            )
            for pair, of_pair in runs.items()
        }
        for pair, one in result[arch].items():
            print(f"{arch:20} {pair:28} {1000 * (one.baseline_s or 0):6.2f} ms  {one.verdict}", flush=True)
    if options.out is not None:
        record = {"kind": "pilot", "machine": machine(), "comparisons": result}
        write_atomically(options.out, json.dumps(msgspec.to_builtins(record)).encode() + b"\n")


if __name__ == "__main__":
    main()
