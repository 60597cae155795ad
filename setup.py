"""What pyproject.toml cannot express: nvcc builds the head's CUDA form, if it is asked for.

``VLLM_DIFFUSION_HEAD=cuda pip install .`` asks for it. Without nvcc the package installs without
that form, and vllm_diffusion/head/cuda.py says what is missing when it is to be used.
"""

import os
import shutil
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import PlatformError

ROW_PASS = Extension(
    "vllm_diffusion.head._row_pass_cuda",
    sources=["csrc/head/row_pass.cu"],
    depends=["csrc/head/row_pass.h"],
    # Code for every major architecture that this nvcc knows, and PTX for those to come.
    extra_compile_args=["-O3", "-std=c++17", "-arch=all-major", "-Xcompiler", "-fPIC"],
    extra_link_args=["--shared", "-cudart", "static", "-Xcompiler", "-fvisibility=hidden"],
    optional=True,
)


class BuildExtensions(build_ext):
    """Build every extension with its own compiler."""

    def finalize_options(self) -> None:
        """Add the CUDA form if the environment asks for it."""
        asked = os.environ.get("VLLM_DIFFUSION_HEAD", "").strip() == "cuda"
        if asked and ROW_PASS not in self.distribution.ext_modules:
            self.distribution.ext_modules.append(ROW_PASS)
        super().finalize_options()

    def build_extension(self, ext: Extension) -> None:
        """Compile and link the CUDA form in one step; leave the others to setuptools."""
        if ext is not ROW_PASS:
            super().build_extension(ext)
            return
        built = Path(self.get_ext_fullpath(ext.name))
        built.parent.mkdir(parents=True, exist_ok=True)
        options = [*ext.extra_compile_args, *ext.extra_link_args]
        self.spawn([nvcc(), *options, "-o", str(built), *ext.sources])


def nvcc() -> str:
    """CUDA's compiler: the one in CUDA_HOME, or the one on the PATH."""
    home = os.environ.get("CUDA_HOME")
    found = shutil.which("nvcc", path=f"{home}/bin" if home else None) or shutil.which("nvcc")
    if found is None:
        raise PlatformError(
            "VLLM_DIFFUSION_HEAD=cuda asks for the head's CUDA form, but neither CUDA_HOME nor the "
            "PATH leads to nvcc. Install the CUDA toolkit, or unset the variable."
        )
    return found


setup(cmdclass={"build_ext": BuildExtensions})
