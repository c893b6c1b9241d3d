"""``progress``: one line on a terminal that says what a long step is doing."""

import sys
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import TextIO

# Steps that end sooner show nothing.
PATIENCE = 1.0
PERIOD = 0.5


@contextmanager
def progress(
    text: str, *, stream: TextIO | None = None, patience: float = PATIENCE
) -> Generator[None, None, None]:
    """Shows ``text`` and the seconds so far while its block runs, and then erases it.

    Args:
      text: what runs.
      stream: where to write, stderr if None; nothing is written unless it is a
        terminal.
      patience: seconds before the line appears.
    """
    out = stream or sys.stderr
    if not out.isatty():
        yield
        return
    done = threading.Event()
    line = threading.Thread(target=_show, args=(text, out, patience, done), daemon=True)
    line.start()
    try:
        yield
    finally:
        done.set()
        line.join()


def _show(text: str, out: TextIO, patience: float, done: threading.Event) -> None:
    begin = time.perf_counter()
    if done.wait(patience):
        return
    shown = ""
    while True:
        shown = f"{text} ... {time.perf_counter() - begin:.0f} s"
        out.write(f"\r{shown}")
        out.flush()
        if done.wait(PERIOD):
            break
    out.write(f"\r{' ' * len(shown)}\r")
    out.flush()
