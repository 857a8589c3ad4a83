# Copyright 2026 The flowback_hf team. Licensed under the Apache License, Version 2.0.
"""What the scripts in training/ and pipelines/ share."""

import os
from pathlib import Path

import PIL.Image


# What PIL raises for files that are not images, truncated, or malformed inside.
UNREADABLE = (OSError, SyntaxError, ValueError, TypeError, PIL.Image.DecompressionBombError)


def write_atomically(path: Path, text: str):
    """Under a temporary name first, then renamed: the file is whole or as it was before."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    os.replace(partial, path)
