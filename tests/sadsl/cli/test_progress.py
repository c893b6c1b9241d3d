"""Progress: one line on a terminal after a second, which goes away; else nothing."""

import io
import time

import pytest

from sadsl.cli.progress import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_long_step_shows_a_line_and_erases_it():
    out = Terminal()
    with progress("planning", stream=out, patience=0.0):
        begin = time.perf_counter()
        while not out.getvalue() and time.perf_counter() - begin < 10:
            time.sleep(0.01)
    line = "planning ... 0 s"
    assert out.getvalue() == f"\r{line}\r{' ' * len(line)}\r"


def test_a_short_step_shows_nothing():
    out = Terminal()
    with progress("planning", stream=out, patience=10.0):
        pass
    assert out.getvalue() == ""


def test_a_file_gets_nothing():
    out = io.StringIO()
    with progress("planning", stream=out, patience=0.0):
        time.sleep(0.02)
    assert out.getvalue() == ""


def test_an_error_passes_and_the_line_goes():
    out = Terminal()
    with (
        pytest.raises(ValueError, match="refused"),
        progress("planning", stream=out, patience=10.0),
    ):
        raise ValueError("refused")
    assert out.getvalue() == ""
