"""Builds the CPU kernels, once for each instruction set; everything else about the package is in pyproject.toml.

kernels/native.py picks a build at run time and loads it with ctypes, so no header of Python is needed. All are
optional: where there is no C++ compiler, or it doesn't know the instructions, the torch reference runs instead.
"""

from pathlib import Path

from setuptools import Extension, setup

SOURCES = Path("kernels/cpu")
FLAGS = ["-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden", "-pthread", "-Wno-psabi"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"]
VNNI = [*AVX512, "-mavx512vnni"]

setup(
    ext_modules=[
        Extension(
            f"tightrope.kernels.cpu_{instruction_set}",
            [str(SOURCES / "kernels.cpp")],
            depends=[str(path) for path in sorted(SOURCES.glob("*.h"))],
            extra_compile_args=[*FLAGS, *flags],
            extra_link_args=["-pthread"],
            language="c++",
            optional=True,
        )
        for instruction_set, flags in (("portable", []), ("avx2", AVX2), ("avx512", AVX512), ("avx512vnni", VNNI))
    ]
)
