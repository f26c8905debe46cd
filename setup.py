"""Builds vattention._native with a C++ compiler alone: no torch, no CUDA toolkit (libcuda is found at run time)."""

import os
from glob import glob

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup

# Warnings are errors where CI is set, not on the machine of somebody with a newer compiler.
WARNINGS = ["-Wall", "-Wextra", "-Wconversion", *(["-Werror"] if os.environ.get("CI") else [])]

native = Pybind11Extension(
    "vattention._native",
    sorted(glob("csrc/vattention/*.cpp")),
    include_dirs=["csrc"],
    depends=sorted(glob("csrc/vattention/*.h")),
    cxx_std=17,
    extra_compile_args=["-O2", "-fvisibility=hidden", *WARNINGS],
    libraries=["dl", "pthread"],
)

ParallelCompile().install()  # a process for each core
setup(ext_modules=[native], cmdclass={"build_ext": build_ext})
