"""What share of the device's copy bandwidth each GPU kernel reaches on large maps.

`python tests/benchmarks/bench_kernels.py` goes over the maps of ResNet-50's stages at batch 256, prints a row for each
kernel and map, and writes them all, with the raw times, into the machine's folder. Bytes are those of the maps that a
kernel must read and write once; the copy is torch's, of the same map, timed in turn with the kernels. `forward` and
`backward` are all the kernels of a pass.
"""

import argparse
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from selab.bench.machine import machine
from selab.kernels import ops
from selab.kernels.cpu import BlockParams
from selab.records.acceptance import KernelBandwidth, KernelTime
from selab.records.files import write_atomically

STAGES = ((256, 56), (512, 28), (1024, 14), (2048, 7))
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CALLS = 10
FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


def calls(y: Tensor, shortcut: Tensor) -> Iterator[tuple[str, int, Callable[[], object]]]:
    """The name of a kernel, the maps that it reads and writes, a call."""
    from selab.kernels import triton

    channels = y.shape[1]
    shapes = (channels // 16, channels), (channels // 16,), (channels, channels // 16), (channels,)
    w1, b1, w2, b2 = (torch.randn(shape, device=y.device) for shape in shapes)
    params = BlockParams(w1, b1, w2, b2, relu_out=True)
    out, *kept = triton.forward(y, shortcut, params)
    dout, dz = torch.randn_like(y), torch.empty_like(y)
    tiled = triton._Map(y)
    factors, dmean = torch.rand_like(kept[0]), torch.rand_like(kept[0])
    both = [True, True]
    yield "copy", 2, lambda: dz.copy_(y)
    yield "squeeze", 1, lambda: tiled.sums(y, relu_in=False)
    yield "join", 3, lambda: tiled.join(y, shortcut, factors, out, relu_in=False, relu_out=True)
    yield "gate's gradient", 4, lambda: tiled.sums(y, relu_in=False, dout=dout, out=out, dz=dz)
    yield "branch's gradient", 2, lambda: tiled.branch_gradient(dout, None, None, factors, dmean, dz)
    yield "forward", 4, lambda: triton.forward(y, shortcut, params)
    yield "backward", 6, lambda: triton.backward(dout, out, y, params, kept, both)


def seconds(call: Callable[[], object]) -> float:
    """Of one call, on the device; several in a row, lest it wait for the next one's launch."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(CALLS):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / CALLS


def measured(y: Tensor, repeats: int) -> dict[str, tuple[int, list[float]]]:
    """For each kernel its bytes and the seconds of its calls; all kernels take turns."""
    named = {name: (maps * y.nbytes, call) for name, maps, call in calls(y, torch.randn_like(y))}
    for _ in range(10):
        for _, call in named.values():
            call()
    times: dict[str, list[float]] = {name: [] for name in named}
    for _ in range(repeats):
        for name, (_, call) in named.items():
            times[name].append(seconds(call))
    return {name: (named[name][0], times[name]) for name in named}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("profiles"), help="folder of the records")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="default: bf16 and fp32")
    parser.add_argument("--memory-format", choices=FORMATS, action="append", help="default: both")
    options = parser.parse_args()
    reason = ops.gpu_reason()
    if reason:
        parser.exit(1, f"{reason}\n")

    rows: list[KernelTime] = []
    for dtype in options.dtype or ["bf16", "fp32"]:
        for memory_format in options.memory_format or FORMATS:
            for channels, side in STAGES:
                shape = (options.batch, channels, side, side)
                y = torch.randn(shape, device="cuda", dtype=DTYPES[dtype])
                y = y.contiguous(memory_format=FORMATS[memory_format])
                found = measured(y, options.repeats)
                rates = {name: size / statistics.median(times) for name, (size, times) in found.items()}
                for name, (size, times) in found.items():
                    share = rates[name] / rates["copy"]
                    print(
                        f"{dtype} {memory_format:13} {shape!s:20} {name:17} {rates[name] / 1e9:6.0f} GB/s {share:7.1%}"
                    )
                    row = KernelTime(
                        kernel=name,
                        dtype=dtype,
                        memory_format=memory_format,
                        shape=shape,
                        bytes=size,
                        times_s=tuple(times),
                        share_of_copy=share,
                    )
                    rows.append(row)
    record = KernelBandwidth(machine=machine("cuda"), rows=tuple(rows))
    out = options.out / record.machine.name / "acceptance" / "kernels.json"
    write_atomically(out, msgspec.json.encode(record) + b"\n")
    print(out)


if __name__ == "__main__":
    main()
