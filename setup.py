"""Build script: the package map that pyproject.toml cannot express, and the optional C++ extension.

The folder `kernels/` is imported as `turnfast.kernels`. The extension `turnfast._C` is built if the
build finds torch and a C++ compiler. Without it everything works, but slower on a CPU.
"""

from __future__ import annotations

import os
import runpy
import shutil
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent


def packages() -> dict[str, str]:
    """Return import name -> folder for every folder with an __init__.py."""
    folders = {}
    for name, folder in (("turnfast", "turnfast"), ("turnfast.kernels", "kernels")):
        for init in sorted((ROOT / folder).rglob("__init__.py")):
            inner = init.parent.relative_to(ROOT / folder).parts
            folders[".".join((name, *inner))] = str(Path(folder, *inner))
    return folders


def extension() -> dict:
    """Return the keyword arguments of `setup` that build turnfast._C, or none."""
    sources = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.cpp"))
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if not sources or not compiler or os.environ.get("TURNFAST_NO_EXTENSION"):
        return {}
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        return {}

    class OptionalBuild(BuildExtension):
        """A build that continues the installation if the compiler fails."""

        def run(self):
            try:
                super().run()
            except Exception as error:  # any error of the compiler or linker
                print(f"turnfast: C++ extension not built, continuing without it: {error}")

    # kernels/extension.py compares this hash with the sources.
    digest = runpy.run_path(str(ROOT / "kernels" / "sources.py"))["digest"](ROOT / "csrc")
    flags = [
        f"-DTURNFAST_SOURCES={digest}",
        "-O3",
        "-std=c++20",
        "-fopenmp",
        "-ffp-contract=fast",
        "-fno-math-errno",
    ]
    return {
        "ext_modules": [
            CppExtension(
                "turnfast._C",
                sources,
                extra_compile_args={"cxx": flags},
                extra_link_args=["-fopenmp"],
                py_limited_api=False,
            )
        ],
        "cmdclass": {
            "build_ext": OptionalBuild.with_options(use_ninja=bool(shutil.which("ninja")))
        },
    }


table = packages()
setup(packages=list(table), package_dir=table, **extension())
