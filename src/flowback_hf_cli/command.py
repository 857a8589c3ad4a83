# Copyright 2026 The flowback_hf team. Licensed under the Apache License, Version 2.0.
"""How every script ends: well, with a sentence about a mistake of its user's, or with the traceback of a bug."""

import argparse
import linecache
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path


# What argparse ends with, too.
MISTAKE = 2


def add_debug_argument(parser: argparse.ArgumentParser):
    """Add `--debug`, which [`run_command`] takes out of the arguments again: it is no setting of a run."""
    parser.add_argument(
        "--debug",
        action="store_true",
        default=argparse.SUPPRESS,
        help="Show the traceback of every error. Default: show one sentence about what can be put right.",
    )


def run_command(main: Callable[[argparse.Namespace], None], args: argparse.Namespace):
    """
    Run a script. A mistake of its user's ends it with one sentence on stderr and exit code 2.

    Everything else that is raised, such as a bug, a loss that is not finite, or too little memory, passes through:
    Python shows its traceback and ends with exit code 1.

    Args:
        main (`Callable`): The script's work, a function of its arguments.
        args (`argparse.Namespace`): What a parser with [`add_debug_argument`] returned. With `--debug`, all errors
            pass through.
    Raises:
        SystemExit: with code 2, for a user's mistake.

    Example:
        ```py
        >>> import argparse
        >>> from flowback_hf_cli.command import add_debug_argument, run_command

        >>> parser = argparse.ArgumentParser()
        >>> add_debug_argument(parser)
        >>> run_command(lambda args: print("done"), parser.parse_args([]))
        done
        ```
    """
    debug = vars(args).pop("debug", False)
    try:
        main(args)
    except Exception as error:
        if debug or not is_users_mistake(error):
            raise
        # Of several processes, all find a wrong value. A file may be missing for one of them.
        if os.environ.get("RANK", "0") != "0" and not isinstance(error, OSError):
            sys.exit(MISTAKE)
        print(f"{Path(sys.argv[0]).name}: error: {str(error) or type(error).__name__}", file=sys.stderr)
        for note in getattr(error, "__notes__", []):
            print(note, file=sys.stderr)
        sys.exit(MISTAKE)


def is_users_mistake(error: Exception) -> bool:
    """
    Tell what a user can put right from a bug.

    A file, a network or a package that is missing is a user's matter wherever it is noticed. A wrong value is one if
    it was found by a check, which ends in a `raise`. A ValueError that an operation gives by itself, such as unpacking
    too few values or adding arrays of other shapes, is a bug.
    """
    if isinstance(error, OSError | ModuleNotFoundError):
        return True
    return isinstance(error, ValueError | ImportError | OverflowError) and was_raised_by_a_check(error)


def was_raised_by_a_check(error: Exception) -> bool:
    *_, (frame, line) = traceback.walk_tb(error.__traceback__)
    return linecache.getline(frame.f_code.co_filename, line).lstrip().startswith("raise ")
