# SPDX-License-Identifier: Apache-2.0
"""Builds the program that launches every kernel; nvcc is all that it takes."""

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCES = sorted(HERE.glob("*.cu"))
FAMILIES = [path.stem for path in SOURCES if path.stem != "main"]
CSRC = HERE.parents[1] / "csrc"
# Without the second the compiler launches through a function that main.cu does not see.
FLAGS = [f"-I{CSRC}", "-Xcompiler", "-D__NV_LEGACY_LAUNCH", "-std=c++17"]


def run(command: list[str]) -> str:
    """What a compiler printed; raises RuntimeError with it where it failed."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def build(nvcc: str, architecture: str, folder: Path) -> Path:
    """The program, compiled and linked in a folder.

    Args:
        nvcc: Path of the compiler.
        architecture: What is compiled for, as "sm_90".
        folder: Where objects and program go.

    Returns:
        Path of the program.

    Raises:
        RuntimeError: Where compiler or linker fail, with what they printed.
    """
    objects = [str(folder / f"{source.stem}.o") for source in SOURCES]
    commands = [
        [nvcc, *FLAGS, "-O3", "-lineinfo", f"-arch={architecture}", "-c", str(source), "-o", target]
        for source, target in zip(SOURCES, objects, strict=True)
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(run, commands))
    program = folder / "launch_kernels"
    wrap = ["-Xlinker", "--wrap=cudaLaunchKernel"]
    run([nvcc, f"-arch={architecture}", *wrap, *objects, "-o", str(program)])
    return program
