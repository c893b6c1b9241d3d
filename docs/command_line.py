"""Writes the outputs in ``howto/command_line.md``: runs each ``$ sadsl`` line.

    python docs/command_line.py

Blocks of ``text`` and of ``sh`` are not touched: they depend on the machine.
"""

import contextlib
import io
import re
import shlex
from pathlib import Path

from sadsl.cli.main import main

PAGE = Path(__file__).parent / "howto" / "command_line.md"
BLOCK = re.compile(
    r"^```console\n\$ sadsl ([^\n]*)\n.*?^```$", re.MULTILINE | re.DOTALL
)


def page() -> str:
    """The text of the page with the outputs as they are now."""
    return BLOCK.sub(_with_output, PAGE.read_text())


def _with_output(block: re.Match[str]) -> str:
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown):
        main(shlex.split(block[1]))
    return f"```console\n$ sadsl {block[1]}\n{shown.getvalue()}```"


if __name__ == "__main__":
    PAGE.write_text(page())
