# SPDX-License-Identifier: Apache-2.0
"""Run a script or a console command with every door open: `python -m lorax_kernels.compat ...`."""

import os
import runpy
import sys
from importlib.metadata import entry_points

from . import enable

_USAGE = """usage: python -m lorax_kernels.compat PROGRAM [ARGUMENTS]

PROGRAM is a Python script, or the name of an installed console command such as
mergekit-extract-lora; it runs with lorax_kernels behind the SVDs of PEFT and mergekit."""


def main(arguments: list[str]) -> None:
    """Run a program under the switch; its exit status is ours."""
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.exit(_USAGE if not arguments else print(_USAGE))  # noqa: T201
    program = arguments[0]
    commands = {point.name: point for point in entry_points(group="console_scripts")}
    if not os.path.isfile(program) and program not in commands:
        sys.exit(f"error: {program} is neither a Python script nor an installed console command")
    try:
        enable()
    except RuntimeError as error:
        sys.exit(f"error: {error}")
    sys.argv = arguments
    if os.path.isfile(program):
        sys.path[0] = os.path.dirname(os.path.abspath(program))
        runpy.run_path(program, run_name="__main__")
    else:
        sys.exit(commands[program].load()())


if __name__ == "__main__":
    main(sys.argv[1:])
