# SPDX-License-Identifier: Apache-2.0
"""Build of `lorax_kernels._C`; everything else about the package is in pyproject.toml.

The extension is optional by design: where it cannot be built the package installs without it,
keeps the reason in `lorax_kernels/_build_note.txt`, and `lorax-transfer info` prints it.

Switches (environment):
    LORAX_KERNELS_BUILD   "auto" (default), "0": no extension, "1": fail where it cannot be built
    TORCH_CUDA_ARCH_LIST  architectures of the CUDA build; default "8.0;9.0a"
    MAX_JOBS              parallel compile jobs
"""

import os
import shutil
import sys
from pathlib import Path

from setuptools import setup

BUILD = os.environ.get("LORAX_KERNELS_BUILD", "auto")
NOTE = "_build_note.txt"
CPP_SOURCES = ["csrc/module.cpp"]
CUDA_SOURCES = [
    "csrc/registration.cpp",
    "csrc/graphs.cu",
    "csrc/products.cu",
    "csrc/thin_matmul.cu",
    "csrc/gram.cu",
    "csrc/rotate.cu",
    "csrc/narrow.cu",
    "csrc/orthonormalize.cu",
    "csrc/shift.cu",
    "csrc/subspace_error.cu",
    "csrc/stack.cu",
    "csrc/symmetric_eigh.cu",
    "csrc/project.cu",
]


def library_headers():
    """Where cuBLAS's headers are beside torch, if the CUDA toolkit came without them."""
    site = Path(__import__("torch").__file__).resolve().parents[1]
    return [str(path) for path in sorted(site.glob("nvidia/*/include"))]


def plan():
    """Returns (extension modules, cmdclass, note): what to build here, or why nothing is."""
    if BUILD == "0":
        return [], {}, "not built: LORAX_KERNELS_BUILD=0"
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError as error:
        return (
            [],
            {},
            f"not built: torch is not importable in the build ({error}); install torch, \
then `pip install --no-build-isolation .`",
        )
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0a")
    # nvcc and a CUDA build of torch decide, never a visible GPU: build machines have none.
    with_cuda = bool(CUDA_SOURCES) and torch.version.cuda and cpp_extension.CUDA_HOME
    arguments = {
        "name": "lorax_kernels._C",
        "include_dirs": [str(Path(__file__).resolve().parent / "csrc"), *library_headers()],
        "define_macros": [("LORAX_WITH_CUDA", "1")] if with_cuda else [],
        # A compiler that links its own libstdc++ in must keep it to itself: mixed with the one
        # that torch loaded, formatting a number for a message fails or crashes.
        "extra_link_args": ["-Wl,--exclude-libs,ALL"] if sys.platform == "linux" else [],
    }
    if with_cuda:
        extension = cpp_extension.CUDAExtension(
            sources=CPP_SOURCES + CUDA_SOURCES,
            # cuBLAS and cuSOLVER are those that torch has loaded; nothing is linked twice.
            extra_compile_args={"cxx": ["-O2"], "nvcc": ["-O3", "-std=c++17"]},
            **arguments,
        )
        note = "built with CUDA"
    else:
        extension = cpp_extension.CppExtension(
            sources=CPP_SOURCES, extra_compile_args=["-O2"], **arguments
        )
        missing = "nvcc" if torch.version.cuda else "a CUDA build of torch"
        note = f"built without CUDA kernels: {missing} was not found"

    class BuildExtension(cpp_extension.BuildExtension):
        """Builds `_C`; unless asked to fail, a failed build leaves a note instead."""

        def run(self):
            reason = note
            try:
                if not shutil.which(os.environ.get("CXX", "c++").split()[0]):
                    raise RuntimeError("no C++ compiler was found")
                super().run()
            except Exception as error:
                if BUILD == "1":
                    raise
                reason = f"not built: {str(error).strip().splitlines()[0]}"
                print(f"lorax_kernels._C {reason}")
            root = Path("." if self.inplace else self.build_lib) / "lorax_kernels"
            root.mkdir(parents=True, exist_ok=True)
            (root / NOTE).write_text(reason + "\n")

        def copy_extensions_to_source(self):
            # After a failed build there is nothing to copy, and that must not fail the install.
            for ext in self.extensions:
                built = Path(self.build_lib) / self.get_ext_filename(
                    self.get_ext_fullname(ext.name)
                )
                if not built.exists():
                    return
            super().copy_extensions_to_source()

    return [extension], {"build_ext": BuildExtension}, note


modules, commands, reason = plan()
if not modules:
    print(f"lorax_kernels._C {reason}")
    (Path(__file__).resolve().parent / "lorax_kernels" / NOTE).write_text(reason + "\n")
setup(ext_modules=modules, cmdclass=commands)
