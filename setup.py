"""The one thing that pyproject.toml cannot say: native code that is built where there is a compiler, and may be absent.

It knows nothing of torch. OpenMP's functions are left open at linking, so that the loader takes those that torch has
already loaded: two OpenMP libraries in one process would keep two teams of threads spinning against each other.
"""

import sys

from setuptools import Extension, setup

GCC = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-std=gnu11"]
setup(
    ext_modules=[
        Extension(
            "selab.kernels._native",
            ["selab/kernels/native.c"],
            # Where the build fails, the same steps run as torch operations.
            optional=True,
            py_limited_api=True,
            extra_compile_args=[*GCC, "-fopenmp"] if sys.platform == "linux" else GCC,
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
