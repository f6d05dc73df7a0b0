"""Compiles each Triton kernel, in the forms in which networks use it, for a compute capability that need not be here.

`python compile_kernels.py 90` prints, for each, its name and its bytes of shared memory.
"""

import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from selab.kernels import triton as kernels_triton

WHOLE = ("i32", True)  # a multiple of 16
ODD = ("i32", False)
ONE = 1  # Triton takes a one for a constant
REAL = ("fp32", False)


def compiled(kernel, capability, warps=4, stages=3, **arguments):
    signature, constants, attributes = {}, {}, {}
    for position, name in enumerate(kernel.arg_names):
        given = arguments[name]
        if isinstance(given, tuple):
            signature[name] = given[0]
            if given[1]:
                attributes[(position,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "constexpr"
            constants[(position,)] = given
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": warps, "num_stages": stages}
    done = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    print(kernel.__name__, done.metadata.shared)


def pointers(dtype, *names):
    return dict.fromkeys(names, (f"*{dtype}", True))


def number(value):
    return ONE if value == 1 else WHOLE if value % 16 == 0 else ODD


def map_kernels(capability, dtype, channels, area, *, last):
    tiles = kernels_triton.tiling(256, channels, area, last=last, processors=132)
    sizes = {"channels": number(channels), "area": number(area), "last": last}
    sizes |= {"positions": tiles.positions, "width": tiles.width}
    sums = {
        **sizes,
        **pointers("fp32", "sums"),
        "splits": number(tiles.splits),
        "span": number(tiles.span),
        "relu_in": True,
    }
    compiled(kernels_triton._sum, capability, **sums, **pointers(dtype, "y"), dout=None, out=None, dz=None)
    compiled(kernels_triton._sum, capability, **sums, **pointers(dtype, "y", "dout", "out", "dz"))
    rows = pointers("fp32", "factors", "dmean")
    joined = {**sizes, **pointers(dtype, "y", "shortcut", "out"), "relu_in": False, "relu_out": True}
    compiled(kernels_triton._join, capability, factors=rows["factors"], **joined)
    compiled(kernels_triton._branch_gradient, capability, **sizes, **rows, **pointers(dtype, "dz", "y", "dy"), out=None)


def excitations(capability, images, channels, units, area, splits):
    tf32 = capability >= 80
    plan = kernels_triton.excitation(images, channels, units, processors=132, tf32=tf32)
    shared = {"images": number(images), "channels": number(channels), "units": number(units), "area": number(area)}
    shared |= {"span": number(plan.span), "splits": splits}
    shared |= {"scale": REAL, "offset": REAL, "activation": "silu", "gate": "hardsigmoid", "precision": plan.precision}
    shared |= {"rows": plan.rows, "width": plan.width, "padded": plan.padded}
    shared |= pointers("fp32", "sums", "w1", "b1", "w2", "b2", "hidden", "logits", "factors")
    shared |= pointers("fp32", "squeezed", "dhidden", "dlogits", "dmean")
    for kernel in (kernels_triton._excite, kernels_triton._excite_backward):
        wanted = {name: shared[name] for name in kernel.arg_names}
        compiled(kernel, capability, plan.warps, plan.stages, **wanted)


if __name__ == "__main__":
    asked = int(sys.argv[1])
    for dtype, channels, area, last in (
        ("bf16", 256, 3136, True),
        ("bf16", 2048, 49, False),
        ("fp32", 256, 3136, False),
        ("fp16", 17, 35, True),
        ("bf16", 1, 1, True),
    ):
        map_kernels(asked, dtype, channels, area, last=last)
    for sizes in ((256, 256, 16, 3136, 1), (256, 2048, 128, 49, 1), (5, 1024, 256, 196, 8), (1, 2048, 512, 49, 2)):
        excitations(asked, *sizes)
    excitations(asked, 1, 1, 1, 1, 1)
