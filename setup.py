"""The builds of the CPU kernels, which pyproject.toml lists: each gets a folder of its own for its objects.

setuptools names objects by their sources alone, so that four builds of the same sources, made at the same time, could
link each other's. An editable install that finds kernels newer than all they are made of takes them as they are.
"""

import shutil
from copy import copy
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

KERNELS = Path("kernels")


class BuildApart(build_ext):
    """build_ext, with a folder of objects for each extension."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        built = KERNELS / target.name
        made_of = [Path("setup.py"), Path("pyproject.toml"), *(KERNELS / "cpu").glob("*.cpp"), *KERNELS.glob("cpu/*.h")]
        if self.editable_mode and built.exists() and built.stat().st_mtime > max(p.stat().st_mtime for p in made_of):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(built, target)
            return
        apart = copy(self)
        apart.build_temp = str(Path(self.build_temp) / ext.name)
        build_ext.build_extension(apart, ext)


setup(cmdclass={"build_ext": BuildApart})
