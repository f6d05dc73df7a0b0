"""Build the native code where there is a C compiler; without it selab runs on torch operations.

The code needs no torch headers. OpenMP symbols stay unresolved at link time, so that the loader binds them to the
library that torch has already loaded: two OpenMP libraries in one process would keep two thread pools spinning.
"""

import sys
from pathlib import Path

from setuptools import Extension, setup

GCC = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-std=gnu11"]
setup(
    ext_modules=[
        Extension(
            "selab.kernels._native",
            ["selab/kernels/native.c"],
            depends=sorted(map(str, Path("selab/kernels").glob("*.h"))),
            # Where the build fails, the same steps run as torch operations.
            optional=True,
            py_limited_api=True,
            extra_compile_args=[*GCC, "-fopenmp"] if sys.platform == "linux" else GCC,
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
