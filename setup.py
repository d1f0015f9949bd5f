"""The builds of the CPU kernels, which pyproject.toml lists: each gets a folder of its own for its objects.

setuptools names objects by their sources alone, so that four builds of the same sources, made at the same time, could
link each other's.
"""

from copy import copy
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


class BuildApart(build_ext):
    """build_ext, with a folder of objects for each extension."""

    def build_extension(self, ext: Extension) -> None:
        apart = copy(self)
        apart.build_temp = str(Path(self.build_temp) / ext.name)
        build_ext.build_extension(apart, ext)


setup(cmdclass={"build_ext": BuildApart})
