"""Keeps what compilers wrote, so that one program is compiled once.

The folder is ``$SADSL_CACHE_DIR``, else ``sadsl`` in ``$XDG_CACHE_HOME`` or in
``~/.cache``. ``SADSL_CACHE_DIR=off`` keeps nothing. It holds at most ``LIMIT`` bytes:
what was read longest ago goes first. Any of its files may be deleted at any time.
"""

import gzip
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

VARIABLE = "SADSL_CACHE_DIR"
LIMIT = 256 << 20


def cache_folder() -> Path | None:
    """The folder, or None if nothing is kept."""
    named = os.environ.get(VARIABLE)
    if named == "off":
        return None
    if named:
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "sadsl"


def load(key: str) -> Any:
    """What ``save`` has kept under a key, or None."""
    folder = cache_folder()
    path = folder / f"{key}.json.gz" if folder else None
    if path is None or not path.exists():
        return None
    try:
        found = json.loads(gzip.decompress(path.read_bytes()))
        _touch(path)
    except (OSError, EOFError, ValueError):
        # Deleted by another process, or damaged: then it is compiled again.
        return None
    return found


def save(key: str, value: Any) -> None:
    """Keeps a value that JSON can hold; does nothing where the folder is read-only."""
    folder = cache_folder()
    if folder is None:
        return
    data = gzip.compress(json.dumps(value).encode(), compresslevel=3)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Another process must never read half of a file.
        made, name = tempfile.mkstemp(dir=folder, suffix=".new")
        with os.fdopen(made, "wb") as new:
            new.write(data)
        _touch(Path(name))
        Path(name).replace(folder / f"{key}.json.gz")
        _shrink(folder)
    except OSError:
        return


def _touch(path: Path) -> None:
    """Says that a file was read now, more finely than the clock of a file system."""
    now = time.time_ns()
    os.utime(path, ns=(now, now))


def _shrink(folder: Path) -> None:
    """Deletes what was read longest ago, until the rest is within the limit."""
    files = [(x, x.stat()) for x in folder.glob("*.json.gz")]
    files.sort(key=lambda pair: pair[1].st_mtime)
    total = sum(stat.st_size for _, stat in files)
    for path, stat in files:
        if total <= LIMIT:
            return
        path.unlink(missing_ok=True)
        total -= stat.st_size
