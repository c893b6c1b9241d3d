"""Runs command lines in this process."""

import json

import pytest

from sadsl.cli.main import main


@pytest.fixture
def run(capsys):
    """Runs a command line that must succeed: what it prints."""

    def run(*args):
        code = main(args)
        found = capsys.readouterr()
        assert (code, found.err) == (0, ""), found.err
        return found.out.removesuffix("\n")

    return run


@pytest.fixture
def values(run):
    """The values that a command line prints with ``--json``."""
    return lambda *args: json.loads(run(*args, "--json"))


@pytest.fixture
def fail(capsys):
    """Runs a command line that must fail: its exit code and its line on stderr."""

    def fail(*args):
        code = main(args)
        found = capsys.readouterr()
        assert found.out == ""
        assert found.err.count("\n") == 1
        return code, found.err.removesuffix("\n")

    return fail
