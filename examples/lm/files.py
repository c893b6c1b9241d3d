"""Writes files so that a kill leaves the old one or the new one, never a part."""

import os
from collections.abc import Callable
from pathlib import Path


def replace_file(path: Path, writer: Callable[[Path], object]) -> None:
    """Writes a whole file, or leaves the one before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    writer(part)
    os.replace(part, path)
