"""The C++ kernels; everything else about the package is in pyproject.toml."""

import copy
import hashlib
import platform
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

# The CPU kernels, once per processor level; which one runs is chosen when it is loaded. Optional: without a
# compiler the install succeeds, and the kernels in ATen are used. Predictive commoning spills the sums that
# the loops keep in registers.
LEVELS: dict[str, list[str]] = {"_portable": []}
if platform.machine() in ("x86_64", "AMD64"):
    LEVELS |= {"_v3": ["-march=x86-64-v3"], "_v4": ["-march=x86-64-v4"]}
# The sources' digest is built in: Python does not call what was built of others (kernels/native/library.py).
SOURCES = sorted(path for end in ("cpp", "h") for path in Path("kernels/native").glob(f"*.{end}"))
DIGEST = hashlib.sha256(b"".join(path.read_bytes() for path in SOURCES)).hexdigest()
FLAGS = [
    f"-DDARTS_SOURCES={DIGEST}",
    "-std=c++17",
    "-O3",
    "-ffp-contract=fast",
    "-fno-predictive-commoning",
    "-fopenmp",
]


class BuildLevels(build_ext):
    """Plain libraries, which know nothing of Python: no module's name, no module's symbols. They are compiled
    side by side."""

    build_temp: str
    parallel: bool | int | None

    def finalize_options(self) -> None:
        super().finalize_options()
        self.parallel = self.parallel or True  # as many as there are processors

    def build_extension(self, ext: Extension) -> None:
        # On Linux, GCC's OpenMP is that of PyTorch, with which library.py loads the libraries; they are not
        # linked to a second one.
        if sys.platform != "linux" or "clang" in " ".join(self.compiler.compiler_so):
            ext.extra_link_args = ["-fopenmp"]
        # Each library compiles the same sources, so each has a folder of its own for its objects.
        own = copy.copy(self)
        own.build_temp = str(Path(self.build_temp) / ext.name)
        build_ext.build_extension(own, ext)

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []


class AnyPython(bdist_wheel):
    """One wheel serves every version of Python, because the libraries are plain ones."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[
        Extension(
            f"darts_fast.kernels.native.{name}",
            [str(path) for path in SOURCES if path.suffix == ".cpp"],
            depends=[str(path) for path in SOURCES],
            extra_compile_args=[*FLAGS, *flags],
            language="c++",
            optional=True,
        )
        for name, flags in LEVELS.items()
    ],
    cmdclass={"build_ext": BuildLevels, "bdist_wheel": AnyPython},
)
