# SPDX-License-Identifier: Apache-2.0
"""What every result file carries: machine, versions, commit and command."""

import json
import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = ("torch", "triton", "lorax-kernels", "transformers", "peft", "safetensors")


def _version(package):
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor()


def _commit():
    """LORAX_COMMIT where a copy ran that git does not know; else HEAD, and whether it changed."""
    if named := os.environ.get("LORAX_COMMIT"):
        return named
    try:
        head = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            check=True,
            cwd=Path(__file__).parent,
        )
        return head.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def header():
    """Machine, versions, commit and command of this process."""
    machine = {"cpu": _cpu(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    if torch.cuda.is_available():
        machine["gpu"] = torch.cuda.get_device_name()
    versions = {package: _version(package) for package in PACKAGES}
    versions |= {"python": platform.python_version(), "cuda": torch.version.cuda}
    command = shlex.join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]])
    return {"machine": machine, "versions": versions, "commit": _commit(), "command": command}


def save(path, rows, **more):
    """Writes a result file in one piece."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(header() | more | {"rows": rows}, indent=1) + "\n")
    temporary.replace(path)
